"""Asks as real clients do: no request like the one before it, its head and body in two writes.

`KEY=… python -m pilotlight.bench.harness.varied PORT PATH CONNECTIONS SECONDS`: one chat completion at a time
on each connection, not streamed, with the headers that OpenAI's Python package sends. Every body has another
length than the one before it on its connection. On asyncio's own event loop, which writes at once: uvloop's
would join the two writes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator

from pilotlight.bench.harness.wire import Connection, ConnectionLostError, connect

WORDS = range(20, 400, 7)
"""Lengths of the prompts, in words."""

_HEAD = (
    "POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept-Encoding: gzip, deflate\r\n"
    "Connection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
    "User-Agent: OpenAI/Python 2.8.1\r\nX-Stainless-Lang: python\r\nX-Stainless-Package-Version: 2.8.1\r\n"
    "X-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\nX-Stainless-Runtime: CPython\r\n"
    "X-Stainless-Runtime-Version: 3.11.7\r\nAuthorization: Bearer {key}\r\n"
    "X-Stainless-Async: false\r\nx-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\n"
    "Content-Length: {length}\r\n\r\n"
)


def varied(port: int, path: str, key: str) -> Iterator[tuple[bytes, bytes]]:
    """Heads and bodies without end, neighbours of different length, each with words of its own."""
    for number, words in enumerate(itertools.cycle(WORDS)):
        content = f"question {number}: {'hello ' * words}"
        message = {"role": "user", "content": content}
        body = json.dumps({"messages": [message], "model": "m", "max_tokens": 200}, separators=(",", ":"))
        yield _HEAD.format(path=path, port=port, key=key, length=len(body)).encode(), body.encode()


async def _one(
    port: int, connection: Connection, requests: Iterator[tuple[bytes, bytes]], until: float
) -> tuple[int, list[str]]:
    answered = 0
    failures: list[str] = []
    while not answered + len(failures) or time.perf_counter() < until:
        head, body = next(requests)
        try:
            status = await connection.ask(head, lambda _: None, rest=body)
        except (ConnectionLostError, TimeoutError) as error:
            failures.append(f"lost: {error}")
            connection = await connect(port)
            continue
        if status == 200:
            answered += 1
        else:
            failures.append(f"status {status}")
    connection.close()
    return answered, failures


async def main(port: int, path: str, connections: int, seconds: float) -> None:
    """Print what was seen as one JSON object."""
    requests = varied(port, path, os.environ.get("KEY", "none"))
    opened = [await connect(port) for _ in range(connections)]
    started = time.perf_counter()
    seen = await asyncio.gather(*[_one(port, one, requests, started + seconds) for one in opened])
    took = time.perf_counter() - started
    answered = sum(count for count, _ in seen)
    failures = [failure for _, some in seen for failure in some]
    result = {
        "requests": answered,
        "requests_per_s": answered / took,
        "failed": len(failures),
        "failures": sorted(set(failures))[:3],
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
