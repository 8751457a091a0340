"""Opens streams through a proxy; checks that every event arrives, once and in order, and how late.

`KEY=… python -m pilotlight.bench.harness.streams PORT STREAMS ROUNDS EVENTS PATH`: so many streams at the
same time, so many rounds one after the other on each connection, so many events expected per stream.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time

import uvloop

from pilotlight.bench.harness.wire import ConnectionLostError, connect, request_bytes

MARK = re.compile(rb'"content":" (\d{6})@(\d{20})"')
BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": "hello " * 50}],
    "stream": True,
    "max_tokens": 200,
}


class Tally:
    """What all streams together saw.

    Attributes:
        late_ms: Per event, from its writing by the engine to its arrival here.
        first_ms: Per stream, from the request to the first byte of the body.
        failures: What went wrong, in words.
    """

    def __init__(self) -> None:
        self.late_ms: list[float] = []
        self.first_ms: list[float] = []
        self.failures: list[str] = []


class Answer:
    """Checks one stream, piece by piece."""

    def __init__(self, tally: Tally) -> None:
        self.next = 0
        self.done = False
        self._begun = False
        self._tally = tally
        self._text = b""
        self._started_ns = time.monotonic_ns()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body; it may end inside an event."""
        now, end = time.monotonic_ns(), 0
        if not self._begun:
            self._begun = True
            self._tally.first_ms.append((now - self._started_ns) / 1e6)
        self._text += body
        for mark in MARK.finditer(self._text):
            end = mark.end()
            self._tally.late_ms.append((now - int(mark[2])) / 1e6)
            if int(mark[1]) != self.next:
                self._tally.failures.append(f"event {mark[1].decode()} where {self.next} was due")
            self.next += 1
        self._text = self._text[end:]
        self.done = self.done or b"data: [DONE]" in self._text


async def _one(port: int, request: bytes, rounds: int, events: int, tally: Tally) -> None:
    try:
        connection = await connect(port)
    except OSError as error:
        tally.failures.append(f"no connection: {error.strerror}")
        return
    for _ in range(rounds):
        answer = Answer(tally)
        try:
            status = await connection.ask(request, answer.on_body)
        except (ConnectionLostError, TimeoutError) as error:
            tally.failures.append(f"lost after event {answer.next}: {error}")
            return
        if status != 200 or not answer.done or answer.next != events:
            tally.failures.append(f"status {status}, {answer.next} of {events} events, done {answer.done}")
    connection.close()


async def main(port: int, streams: int, rounds: int, events: int, path: str) -> None:
    """Print what was seen as one JSON object."""
    request, tally, started = request_bytes(path, BODY), Tally(), time.perf_counter()
    await asyncio.gather(*[_one(port, request, rounds, events, tally) for _ in range(streams)])
    seconds = time.perf_counter() - started
    late, first = sorted(tally.late_ms) or [0.0], sorted(tally.first_ms) or [0.0]
    result = {
        "streams": streams * rounds,
        "events": len(tally.late_ms),
        # An event that never came has failed as well, even where its stream failed only once.
        "failed": max(len(tally.failures), streams * rounds * events - len(tally.late_ms)),
        "failures": sorted(set(tally.failures))[:3],
        "seconds": seconds,
        "first_ms_p50": first[len(first) // 2],
        "first_ms_p99": first[int(len(first) * 0.99)],
        "late_ms_p50": late[len(late) // 2],
        "late_ms_p99": late[int(len(late) * 0.99)],
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _port, _streams, _rounds, _events = map(int, sys.argv[1:5])
    uvloop.run(main(_port, _streams, _rounds, _events, sys.argv[5]))
