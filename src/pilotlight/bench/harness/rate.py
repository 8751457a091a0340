"""Sends requests on a fixed schedule, whatever answers take, by several roads in turn; their latencies.

`KEY=… python -m pilotlight.bench.harness.rate RATE SECONDS NAME=PORT:PATH …`: by each road RATE requests a
second for SECONDS seconds, a second at a time, the roads changing. A request that finds every kept connection
busy waits for one, and that time counts. Prints the milliseconds of every answered request by road, how many
failed, and how late the schedule was kept at worst: what this program lost by itself.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import uvloop

from pilotlight.bench.harness.first_token import road
from pilotlight.bench.harness.wire import Connection, ConnectionLostError, connect, request_bytes

CONNECTIONS = 64
"""Kept per road; at 500 requests a second they are all busy only when answers take longer than 128 ms."""

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello " * 50}], "max_tokens": 200}
_WARM_UP = 3
"""Requests on every connection that are not counted."""


class Road:
    """One way to the engine, with its idle connections and what was measured of it.

    Attributes:
        took_ms: Per answered request, from the moment it was due to its last byte.
        failures: What went wrong, in words.
    """

    def __init__(self, port: int, path: str) -> None:
        self._port = port
        self._request = request_bytes(path, BODY)
        self._idle: asyncio.Queue[Connection] = asyncio.LifoQueue()
        self.took_ms: list[float] = []
        self.failures: list[str] = []

    async def open(self) -> None:
        """Open the connections and use each, one after the other."""
        for _ in range(CONNECTIONS):
            connection = await connect(self._port)
            for _ in range(_WARM_UP):
                await connection.ask(self._request, lambda _: None)
            self._idle.put_nowait(connection)

    async def ask(self) -> None:
        """One request."""
        started = time.perf_counter_ns()
        connection = await self._idle.get()
        try:
            status = await connection.ask(self._request, lambda _: None)
        except (ConnectionLostError, TimeoutError) as error:
            self.failures.append(f"lost: {error}")
            connection = await connect(self._port)
        else:
            if status == 200:
                self.took_ms.append((time.perf_counter_ns() - started) / 1e6)
            else:
                self.failures.append(f"status {status}")
        self._idle.put_nowait(connection)


async def main(rate: int, seconds: int, roads: dict[str, tuple[int, str]]) -> None:
    """Print what was seen as one JSON object."""
    loop = asyncio.get_running_loop()
    by_name = {name: Road(port, path) for name, (port, path) in roads.items()}
    for way in by_name.values():
        await way.open()
    slipped_s = 0.0
    names = list(by_name)
    for second in range(seconds):
        for name in names if second % 2 == 0 else reversed(names):
            started = loop.time()
            tasks = []
            for number in range(rate):
                due = started + number / rate
                if (wait_s := due - loop.time()) > 0:
                    await asyncio.sleep(wait_s)
                slipped_s = max(slipped_s, loop.time() - due)
                tasks.append(asyncio.ensure_future(by_name[name].ask()))
            await asyncio.gather(*tasks)
    result = {
        name: {"took_ms": way.took_ms, "failed": len(way.failures), "failures": sorted(set(way.failures))[:3]}
        for name, way in by_name.items()
    }
    sys.stdout.write(json.dumps({"roads": result, "slipped_ms": slipped_s * 1000}) + "\n")


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), dict(map(road, sys.argv[3:]))))
