"""A worker that does nothing, as leanly as possible: takes jobs in batches and posts results in batches.

`python -m pilotlight.bench.harness.job_worker LOOPS BATCH` in the environment of a worker. Every loop takes
up to BATCH jobs over one connection and posts their results over it, which brings the next jobs as it does
for our worker program; with BATCH 1 by the routes for single ones, where it does not.
The output of a job is the time from the moment in its input to its arrival here, in nanoseconds; both are of
the machine's monotonic clock. Like every worker it listens for stops and sends heartbeats.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import msgspec
import uvloop

from pilotlight.bench.harness.lean import LeanConnection, lean_connect, lean_request, target_of
from pilotlight.worker.config import PlatformUrls

_PING_S = 2.0
_PAUSE_S = 0.2
"""Pause after a refusal or a lost connection."""


class _Input(msgspec.Struct):
    t: int = 0


class _Job(msgspec.Struct):
    id: str
    input: _Input


class _Done(msgspec.Struct, rename={"is_stream": "isStream"}):
    id: str
    is_stream: bool
    body: dict[str, Any]


class _Answer(msgspec.Struct):
    jobs: list[_Job]


_one = msgspec.json.Decoder(_Job)
_many = msgspec.json.Decoder(list[_Job])
_next = msgspec.json.Decoder(_Answer)
_encoder = msgspec.json.Encoder()


class NoopWorker:
    """The loops of one worker process."""

    def __init__(self, worker_id: str, key: str, urls: PlatformUrls, batch: int) -> None:
        self._key = key
        self._batch = batch
        self._running: set[str] = set()
        take = (
            urls.take if batch == 1 else f"{urls.batch}{'&' if '?' in urls.batch else '?'}batch_size={batch}"
        )
        self._port, path = target_of(take)
        self._take = self._get(path + ("&" if "?" in path else "?") + "job_in_progress=1")
        assert urls.output is not None
        assert urls.stop is not None
        assert urls.ping is not None
        self._output = target_of(urls.output)[1]
        self._batch_output = f"{urls.take.partition('/job-take/')[0]}/job-done-batch/{worker_id}"
        self._batch_output = f"{target_of(self._batch_output)[1]}?take={batch}"
        self._stop = self._get(target_of(urls.stop)[1])
        self._ping = target_of(urls.ping)[1]

    async def run(self, loops: int) -> None:
        """Work until the process is ended."""
        await asyncio.gather(self._stops(), self._pings(), *(self._work() for _ in range(loops)))

    def _get(self, path: str) -> bytes:
        return lean_request("GET", path, self._key)

    async def _work(self) -> None:
        connection = await lean_connect(self._port)
        while True:
            status, body = await connection.ask(self._take)
            if status == 200:
                jobs = [_one.decode(body)] if self._batch == 1 else _many.decode(body)
                while jobs:
                    jobs = await self._finish(connection, jobs, time.monotonic_ns())
            elif status != 204:
                await asyncio.sleep(_PAUSE_S)
                connection.close()
                connection = await lean_connect(self._port)

    async def _finish(self, connection: LeanConnection, jobs: list[_Job], now: int) -> list[_Job]:
        """Post the results of jobs that came at a moment; the next jobs, if any came with the answer."""
        ids = {job.id for job in jobs}
        self._running |= ids
        if self._batch == 1:
            path = self._output.replace("$ID", jobs[0].id)
            path += ("&" if "?" in path else "?") + "isStream=false"
            body = _encoder.encode({"output": now - jobs[0].input.t})
        else:
            path = self._batch_output
            body = _encoder.encode([_Done(job.id, False, {"output": now - job.input.t}) for job in jobs])
        status, answer = await connection.ask(lean_request("POST", path, self._key, body))
        self._running -= ids
        return _next.decode(answer).jobs if status == 200 and self._batch > 1 else []

    async def _stops(self) -> None:
        connection = await lean_connect(self._port)
        while True:
            status, _ = await connection.ask(self._stop)
            if status not in {200, 204}:
                await asyncio.sleep(_PAUSE_S)
                connection = await lean_connect(self._port)

    async def _pings(self) -> None:
        connection = await lean_connect(self._port)
        while True:
            query = f"{'&' if '?' in self._ping else '?'}job_id={','.join(self._running)}"
            await connection.ask(self._get(self._ping + query))
            await asyncio.sleep(_PING_S)


def main(loops: int, batch: int) -> None:
    """Work until the process is ended."""
    worker_id = os.environ["RUNPOD_POD_ID"]
    urls = PlatformUrls.from_environment(os.environ, worker_id)
    uvloop.run(NoopWorker(worker_id, os.environ["RUNPOD_AI_API_KEY"], urls, batch).run(loops))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
