"""Sends one streaming request at a time by several roads in turn; measures the time to the first event.

`KEY=… python -m pilotlight.bench.harness.first_token COUNT NAME=PORT:PATH …` asks COUNT times by every road,
over one kept connection each. The order changes from one turn to the next, so that no road always comes after
the same other one. Prints the milliseconds of every request by road, in the order of turns, so that they can
be paired.
"""

from __future__ import annotations

import json
import sys
import time

import uvloop

from pilotlight.bench.harness.streams import body
from pilotlight.bench.harness.wire import Connection, connect, request_bytes

WARM_UP = 20
"""Turns that are not counted."""

EVENTS = 8
"""Per stream; only the first one is timed."""


class _First:
    """The moment of the first event."""

    def __init__(self) -> None:
        self.ns = 0
        self.seen = b""

    def on_body(self, body: bytes) -> None:
        if not self.ns and b"data:" in body:
            self.ns = time.perf_counter_ns()
        self.seen = (self.seen + body)[-64:]


async def _ask_ms(connection: Connection, request: bytes) -> float:
    first, started = _First(), time.perf_counter_ns()
    status = await connection.ask(request, first.on_body)
    if status != 200 or b"data: [DONE]" not in first.seen:
        raise SystemExit(f"status {status}, end {first.seen!r}")
    return (first.ns - started) / 1e6


async def main(count: int, roads: dict[str, tuple[int, str]]) -> None:
    """Print `{road: [milliseconds, …]}`."""
    connections = {name: await connect(port) for name, (port, _) in roads.items()}
    requests = {name: request_bytes(path, body(EVENTS, 0.0)) for name, (_, path) in roads.items()}
    measured: dict[str, list[float]] = {name: [] for name in roads}
    names = list(roads)
    for turn in range(-WARM_UP, count):
        shift = turn % len(names)
        order = names[shift:] + names[:shift]
        for name in order if turn // len(names) % 2 else reversed(order):
            took = await _ask_ms(connections[name], requests[name])
            if turn >= 0:
                measured[name].append(took)
    sys.stdout.write(json.dumps(measured) + "\n")


def road(text: str) -> tuple[str, tuple[int, str]]:
    """Name, port and path of an argument `NAME=PORT:PATH`."""
    name, _, where = text.partition("=")
    port, _, path = where.partition(":")
    return name, (int(port), path)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), dict(map(road, sys.argv[2:]))))
