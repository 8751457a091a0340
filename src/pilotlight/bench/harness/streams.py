"""Opens streams through a proxy; checks that every event arrives, once and in order, and how late.

`KEY=… python -m pilotlight.bench.harness.streams PORT PATH STREAMS ROUNDS EVENTS PAUSE_S RAMP_S`: so many
streams at the same time, so many rounds one after the other on each connection, so many events per stream, so
many seconds apart. Of several PATHs, separated by commas, the streams take one each in turn. The first
requests are spread evenly over RAMP_S seconds, and with them the events of paced streams, which would
otherwise come in volleys.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time

import uvloop

from pilotlight.bench.harness.upstream import asking
from pilotlight.bench.harness.wire import ConnectionLostError, allow_descriptors, connect, request_bytes

MARK = re.compile(rb'"content": ?" (\d{6})@(\d{20})"')
FIRST_TOKEN = re.compile(rb'"delta": ?\{(?!"role")')
"""In the first event of a chat that stands for a token; the one before names the role. A token's text may be
empty, where it is a part of a character."""

_OTHER_DESCRIPTORS = 64


def body(events: int, pause_s: float) -> dict[str, object]:
    """A streaming request for so many events, so many seconds apart."""
    content = f"{asking(events, pause_s)} {'hello ' * 45}"
    message = {"role": "user", "content": content}
    return {"model": "m", "messages": [message], "stream": True, "max_tokens": events}


class Tally:
    """What all streams together saw.

    Attributes:
        late_ms: Per event, from its writing by the engine to its arrival here.
        first_ms: Per stream, from the request to the first byte of the body.
        failures: What went wrong, in words.
        open: Streams of which the first event has arrived and the last one has not.
        open_max: The most there were at the same time.
    """

    def __init__(self) -> None:
        self.open = 0
        self.open_max = 0
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
            self._tally.open += 1
            self._tally.open_max = max(self._tally.open_max, self._tally.open)
        self._text += body
        for mark in MARK.finditer(self._text):
            end = mark.end()
            self._tally.late_ms.append((now - int(mark[2])) / 1e6)
            if int(mark[1]) != self.next:
                self._tally.failures.append(f"event {mark[1].decode()} where {self.next} was due")
            self.next += 1
        self._text = self._text[end:]
        if not self.done and b"data: [DONE]" in self._text:
            self.done = True
            self._tally.open -= 1


async def _one(port: int, request: bytes, rounds: int, events: int, wait_s: float, tally: Tally) -> None:
    await asyncio.sleep(wait_s)
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


async def main(
    port: int, path: str, streams: int, rounds: int, events: int, pause_s: float, ramp_s: float
) -> None:
    """Print what was seen as one JSON object."""
    needed = streams + _OTHER_DESCRIPTORS
    if (allowed := allow_descriptors(needed)) < needed:
        raise SystemExit(f"{streams} streams need {needed} open files, and this machine allows {allowed}")
    requests = [request_bytes(one, body(events, pause_s)) for one in path.split(",")]
    tally, started = Tally(), time.perf_counter()
    await asyncio.gather(
        *[
            _one(port, requests[number % len(requests)], rounds, events, ramp_s * number / streams, tally)
            for number in range(streams)
        ]
    )
    seconds = time.perf_counter() - started
    late, first = sorted(tally.late_ms) or [0.0], sorted(tally.first_ms) or [0.0]
    result = {
        "streams": streams * rounds,
        "open_max": tally.open_max,
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
    _port, _streams, _rounds, _events = (int(sys.argv[at]) for at in (1, 3, 4, 5))
    _pause_s, _ramp_s = map(float, sys.argv[6:8])
    uvloop.run(main(_port, sys.argv[2], _streams, _rounds, _events, _pause_s, _ramp_s))
