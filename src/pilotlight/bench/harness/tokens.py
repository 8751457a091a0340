"""Asks an engine for a fixed number of tokens on many streams at once, and measures tokens per second.

`KEY=… python -m pilotlight.bench.harness.tokens PORT PATH MODEL STREAMS TOKENS`. Every stream must be
complete and carry a usage block that says exactly TOKENS; otherwise the program fails, because then there
is nothing to compare.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Sequence

import uvloop

from pilotlight.bench.harness.wire import Connection, connect, request_bytes

_COMPLETION = re.compile(rb'"completion_tokens":\s*(\d+)')
_TAIL_BYTES = 2048
_EVENT = b"data: "


class _Answer:
    """The first moment and the end of a stream, and how many events it had; nothing is parsed."""

    def __init__(self) -> None:
        self.first_ns = 0
        self.events = 0
        self.tail = b""

    def on_body(self, body: bytes) -> None:
        if not self.first_ns:
            self.first_ns = time.perf_counter_ns()
        # A piece may begin inside the mark; what is kept of the one before is too short to be counted twice.
        self.events += (self.tail[-len(_EVENT) + 1 :] + body).count(_EVENT)
        self.tail = (self.tail + body)[-_TAIL_BYTES:]


async def _one(connection: Connection, request: bytes, tokens: int) -> tuple[float, int]:
    answer, started = _Answer(), time.perf_counter_ns()
    status = await connection.ask(request, answer.on_body)
    said = _COMPLETION.findall(answer.tail)
    if status != 200 or b"data: [DONE]" not in answer.tail or not said or int(said[-1]) != tokens:
        raise SystemExit(f"status {status}, expected {tokens} tokens, the stream ends {answer.tail[-300:]!r}")
    return (answer.first_ns - started) / 1e6, answer.events


def question(number: int) -> list[dict[str, str]]:
    """The messages of one stream; each stream asks something else."""
    return [{"role": "user", "content": f"What is {number} plus {number + 1}?"}]


def _body(model: str, number: int, tokens: int) -> dict[str, object]:
    return {
        "model": model,
        "messages": question(number),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
    }


def write_result(tokens: int, seconds: float, firsts: Sequence[float], **more: float) -> None:
    """Print what streams of so many tokens each gave.

    Args:
        tokens: Per stream.
        seconds: All of them together.
        firsts: Milliseconds to each first token.
        more: What else was seen.
    """
    made = len(firsts) * tokens
    result = {
        "tokens": made,
        "seconds": seconds,
        "tokens_per_s": made / seconds,
        "first_ms_p50": sorted(firsts)[len(firsts) // 2],
        **more,
    }
    sys.stdout.write(json.dumps(result) + "\n")


async def main(port: int, path: str, model: str, streams: int, tokens: int) -> None:
    """Print tokens per second over the whole, connections already open."""
    connections = await asyncio.gather(*[connect(port) for _ in range(streams)])
    requests = [request_bytes(path, _body(model, number, tokens)) for number in range(streams)]
    started = time.perf_counter()
    seen = await asyncio.gather(
        *[
            _one(connection, request, tokens)
            for connection, request in zip(connections, requests, strict=True)
        ]
    )
    seconds = time.perf_counter() - started
    write_result(tokens, seconds, [first for first, _ in seen], events=sum(events for _, events in seen))


if __name__ == "__main__":
    _port, _streams, _tokens = (int(sys.argv[at]) for at in (1, 4, 5))
    uvloop.run(main(_port, sys.argv[2], sys.argv[3], _streams, _tokens))
