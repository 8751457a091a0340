"""Clients of a queue: `KEY=… python -m pilotlight.bench.harness.job_clients MODE PORT ENDPOINT …`.

* `submit … SECONDS CONNECTIONS [COUNT]`: every connection submits one job after the other (closed loop), for
  so long or until there are COUNT.
* `drive … SECONDS CONNECTIONS WINDOW`: submits jobs and reads the status of each one, oldest first, while not
  more than WINDOW are under way; a job that is not ready yet is looked at again. What counts is jobs whose
  COMPLETED status was read, per second.
* `paced … SECONDS RATE`: submits on a fixed schedule, however long answers take (open loop). The payload
  carries the moment of sending and `job_worker` returns the time until it had the job; the statuses of all
  jobs are read afterwards.

Each prints one JSON object with `cpu_s`, the CPU time of this program, beside what it measured.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import deque
from typing import Any

import msgspec
import uvloop

from pilotlight.bench.harness.lean import LeanConnection, lean_connect, lean_request

PAYLOAD_BYTES = 85
"""Of the whole body; what the measurements in other queues' documentation use, too."""

_AGAIN_S = 0.005
"""Pause of a connection that has nothing to do."""

_READERS = 16
"""Connections that read statuses at once: all of them would mostly find jobs that are not ready."""

_REST_S = 0.015
"""Pause of all reading after a job that was not ready."""

_DRAIN_S = 60.0
_TERMINAL_S = 30.0


class Seen(msgspec.Struct):
    """What a client needs of a job object."""

    id: str = ""
    status: str = ""
    output: Any = None


_seen = msgspec.json.Decoder(Seen)


def payload(moment_ns: int = 0) -> bytes:
    """A body of `PAYLOAD_BYTES` bytes that holds a moment."""
    shell = b'{"input":{"t":%d,"pad":"%b"}}'
    return shell % (moment_ns, b"x" * (PAYLOAD_BYTES - len(shell % (moment_ns, b""))))


class _Failures:
    """Counts answers that should not have come and remembers a few."""

    def __init__(self) -> None:
        self.count = 0
        self.told: list[str] = []

    def add(self, status: int, body: bytes) -> None:
        self.count += 1
        if len(self.told) < 3:
            self.told.append(f"{status} {body[:200]!r}")


class _Submitter:
    """One connection of `submit`."""

    def __init__(self, load: _Submit, connection: LeanConnection) -> None:
        self._load = load
        self._connection = connection
        connection.send(load.request, self._answered)

    def _answered(self, status: int, body: bytes) -> None:
        load = self._load
        if status == 200:
            load.answered += 1
        else:
            load.failures.add(status, body)
        if load.answered + load.failures.count < load.most and time.perf_counter() < load.until and status:
            self._connection.send(load.request, self._answered)
        else:
            load.open -= 1
            if not load.open:
                load.done.set()


class _Submit:
    def __init__(self, request: bytes, most: int, seconds: float) -> None:
        self.request = request
        self.most = most
        self.until = time.perf_counter() + seconds
        self.answered = 0
        self.failures = _Failures()
        self.open = 0
        self.done = asyncio.Event()


async def submit(
    port: int, endpoint: str, seconds: float, connections: int, most: int = 1 << 60
) -> dict[str, Any]:
    """Submit as fast as answers come."""
    opened = [await lean_connect(port) for _ in range(connections)]
    request = lean_request("POST", f"/v2/{endpoint}/run", _key(), payload())
    started = time.perf_counter()
    load = _Submit(request, most, seconds)
    load.open = len(opened)
    for connection in opened:
        _Submitter(load, connection)
    await load.done.wait()
    took = time.perf_counter() - started
    return {
        "jobs": load.answered,
        "seconds": took,
        "jobs_per_s": load.answered / took,
        "failed": load.failures.count,
        "failures": load.failures.told,
    }


class _Driver:
    """One connection of `drive`."""

    def __init__(self, load: _Drive, connection: LeanConnection) -> None:
        self._load = load
        self._connection = connection
        self._job = ""
        self._next()

    def _next(self) -> None:
        load = self._load
        if not load.stopped and len(load.pending) + load.asking < load.window:
            load.asking += 1
            self._connection.send(load.submission, self._submitted)
        elif load.pending and not load.resting and load.reading < _READERS:
            self._look()
        elif load.stopped and not load.asking and not load.pending:
            load.finish()
        else:
            asyncio.get_running_loop().call_later(_AGAIN_S, self._next)

    def _look(self) -> None:
        load = self._load
        self._job = load.pending.popleft()
        load.asking += 1
        load.reading += 1
        load.reads += 1
        self._connection.send(load.status_head + self._job.encode() + load.status_tail, self._read)

    def _submitted(self, status: int, body: bytes) -> None:
        load = self._load
        load.asking -= 1
        if status == 200:
            load.pending.append(_seen.decode(body).id)
        else:
            load.failures.add(status, body)
            if not status:
                load.finish()
                return
        self._next()

    def _read(self, status: int, body: bytes) -> None:
        load = self._load
        load.asking -= 1
        load.reading -= 1
        job = _seen.decode(body) if status == 200 else None
        if job is not None and job.status in {"IN_QUEUE", "IN_PROGRESS"}:
            # Younger ones are hardly ready, either.
            load.pending.appendleft(self._job)
            load.rest()
        elif job is not None and job.status == "COMPLETED":
            load.completed += not load.stopped
            load.finished += 1
        else:
            load.failures.add(status, body)
            if not status:
                load.finish()
                return
        self._next()


class _Drive:
    def __init__(self, endpoint: str, window: int) -> None:
        key = _key()
        self.submission = lean_request("POST", f"/v2/{endpoint}/run", key, payload())
        head, _, tail = lean_request("GET", f"/v2/{endpoint}/status/JOB", key).partition(b"JOB")
        self.status_head, self.status_tail = head, tail
        self.window = window
        self.pending: deque[str] = deque()
        self.asking = 0
        self.reading = 0
        self.resting = False
        self.reads = 0
        self.completed = 0
        self.finished = 0
        self.failures = _Failures()
        self.stopped = False
        self.done = asyncio.Event()

    def rest(self) -> None:
        """Read nothing for a while: the oldest job was not ready."""
        if not self.resting:
            self.resting = True
            asyncio.get_running_loop().call_later(_REST_S, self._rested)

    def _rested(self) -> None:
        self.resting = False

    def finish(self) -> None:
        self.stopped = True
        self.done.set()


async def drive(port: int, endpoint: str, seconds: float, connections: int, window: int) -> dict[str, Any]:
    """Submit and read results as fast as they come."""
    opened = [await lean_connect(port) for _ in range(connections)]
    load = _Drive(endpoint, window)
    started = time.perf_counter()
    for connection in opened:
        _Driver(load, connection)
    await asyncio.sleep(seconds)
    took = time.perf_counter() - started
    completed = load.completed
    load.stopped = True
    async with asyncio.timeout(_DRAIN_S):
        await load.done.wait()
    return {
        "jobs": completed,
        "seconds": took,
        "jobs_per_s": completed / took,
        "finished": load.finished,
        "reads": load.reads,
        "failed": load.failures.count,
        "failures": load.failures.told,
    }


class _Paced:
    """The open loop: a free connection for every request, a new one where none is free."""

    def __init__(self, port: int, endpoint: str) -> None:
        self._port = port
        self._path = f"/v2/{endpoint}/run"
        self._free: list[LeanConnection] = []
        self.took_ms: list[float] = []
        self.jobs: list[str] = []
        self.failures = _Failures()

    async def prepare(self, connections: int) -> None:
        self._free = [await lean_connect(self._port) for _ in range(connections)]

    async def one(self) -> None:
        connection = self._free.pop() if self._free else await lean_connect(self._port)
        sent = time.monotonic_ns()
        status, body = await connection.ask(lean_request("POST", self._path, _key(), payload(sent)))
        self.took_ms.append((time.monotonic_ns() - sent) / 1e6)
        if status == 200:
            self.jobs.append(_seen.decode(body).id)
        else:
            self.failures.add(status, body)
        self._free.append(connection)


async def paced(port: int, endpoint: str, seconds: float, rate: float) -> dict[str, Any]:
    """Submit on schedule; then read what became of every job."""
    load = _Paced(port, endpoint)
    await load.prepare(64)
    loop = asyncio.get_running_loop()
    tasks = []
    begin = loop.time()
    for number in range(max(1, round(seconds * rate))):
        pause = begin + number / rate - loop.time()
        if pause > 0:
            await asyncio.sleep(pause)
        tasks.append(asyncio.create_task(load.one()))
    await asyncio.gather(*tasks)
    waits_ms = []
    reader = await lean_connect(port)
    deadline = loop.time() + _TERMINAL_S
    for job_id in load.jobs:
        while True:
            status, body = await reader.ask(lean_request("GET", f"/v2/{endpoint}/status/{job_id}", _key()))
            job = _seen.decode(body) if status == 200 else Seen()
            if job.status == "COMPLETED":
                waits_ms.append(job.output / 1e6)
                break
            if job.status not in {"IN_QUEUE", "IN_PROGRESS"} or loop.time() > deadline:
                load.failures.add(status, body)
                break
            await asyncio.sleep(_AGAIN_S)
    return {
        "jobs": len(load.jobs),
        "submit_ms": load.took_ms,
        "wait_ms": waits_ms,
        "failed": load.failures.count,
        "failures": load.failures.told,
    }


def _key() -> str:
    return os.environ.get("KEY", "none")


def main(arguments: list[str]) -> None:
    """Run one mode and print what it measured."""
    mode, port, endpoint, seconds, *more = arguments
    numbers = [int(number) for number in more]
    run = {"submit": submit, "drive": drive, "paced": paced}[mode]
    result = uvloop.run(run(int(port), endpoint, float(seconds), *numbers))  # type: ignore[operator]
    result["cpu_s"] = time.process_time()
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
