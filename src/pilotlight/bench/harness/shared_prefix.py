"""Asks an engine chats that share their beginnings in groups; measures the time to each first token.

`KEY=… python -m pilotlight.bench.harness.shared_prefix PORT PATH MODEL GROUPS PER_GROUP CONCURRENCY TURN
SESSIONS`: GROUPS long system prompts, PER_GROUP questions to each, in a random order that TURN fixes, so many
requests at a time. TURN goes into every prompt, so no turn finds anything of another one in a cache. With
SESSIONS 1 each request names its group in `X-Session-Id`. Every answer must be a whole stream.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator

import uvloop

from pilotlight.bench.harness.streams import FIRST_TOKEN
from pilotlight.bench.harness.wire import Connection, connect, request_bytes

PREFIX_WORDS = 400
"""About 640 tokens of the built-in model."""
SUFFIX_WORDS = 20
TOKENS = 8
WORDS = (
    "the", "cat", "count", "number", "plus", "what", "is", "red", "blue", "green", "river", "stone", "house",
    "tree", "light", "small", "big", "one", "two", "three",
)  # fmt: skip


class _Answer:
    def __init__(self) -> None:
        self.first_ns = 0
        self.tail = b""

    def on_body(self, body: bytes) -> None:
        self.tail = (self.tail + body)[-512:]
        if not self.first_ns and FIRST_TOKEN.search(self.tail):
            self.first_ns = time.perf_counter_ns()


def chats(model: str, groups: int, per_group: int, turn: int) -> Iterator[tuple[int, dict[str, object]]]:
    """Group and body of every request, in the order in which they are sent."""
    draw = random.Random(turn)  # noqa: S311 - a workload that can be repeated, not a secret
    prefixes = [_words(draw, PREFIX_WORDS, f"turn {turn}, group {group}:") for group in range(groups)]
    order = [group for group in range(groups) for _ in range(per_group)]
    draw.shuffle(order)
    for number, group in enumerate(order):
        yield (
            group,
            {
                "model": model,
                "messages": [
                    {"role": "system", "content": prefixes[group]},
                    {"role": "user", "content": _words(draw, SUFFIX_WORDS, f"question {number}:")},
                ],
                "stream": True,
                "temperature": 0,
                "max_tokens": TOKENS,
                "ignore_eos": True,
            },
        )


def _words(draw: random.Random, count: int, beginning: str) -> str:
    return " ".join([beginning, *draw.choices(WORDS, k=count)])


async def _one(connection: Connection, requests: Iterator[bytes], firsts_ms: list[float]) -> None:
    for request in requests:
        answer, started = _Answer(), time.perf_counter_ns()
        status = await connection.ask(request, answer.on_body)
        if status != 200 or b"data: [DONE]" not in answer.tail or not answer.first_ns:
            raise SystemExit(f"status {status}, the answer ends {answer.tail!r}")
        firsts_ms.append((answer.first_ns - started) / 1e6)


async def main(
    port: int, path: str, model: str, shape: tuple[int, int], concurrency: int, turn: int, sessions: bool
) -> None:
    """Print what was seen as one JSON object."""
    firsts_ms: list[float] = []
    requests = iter(
        [
            request_bytes(path, body, headers={"x-session-id": f"{turn}-{group}"} if sessions else {})
            for group, body in chats(model, *shape, turn)
        ]
    )
    connections = await asyncio.gather(*[connect(port) for _ in range(concurrency)])
    started = time.perf_counter()
    await asyncio.gather(*[_one(connection, requests, firsts_ms) for connection in connections])
    result = {"first_ms": firsts_ms, "seconds": time.perf_counter() - started}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _port, _groups, _per_group, _concurrency, _turn = (int(sys.argv[at]) for at in (1, 4, 5, 6, 7))
    uvloop.run(
        main(_port, sys.argv[2], sys.argv[3], (_groups, _per_group), _concurrency, _turn, sys.argv[8] == "1")
    )
