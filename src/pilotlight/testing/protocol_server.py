"""A minimal platform for one worker program: hands out jobs, keeps what comes back.

Written from `worker-protocol.md` alone and shares no code with the gateway, so that a worker program that
works with this and with the gateway is right for the right reason. Used in process by tests: `submit` a
job, then wait for its result by name. Stopping and starting it again on the same port plays a restart of
the platform.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

HOLD_SECONDS = 30.0
"""How long empty polls are held open."""


@dataclass(slots=True)
class Refusal:
    """An answer to give instead of the right one, for as many requests as `times` says."""

    status: int
    times: int


@dataclass(slots=True)
class Recorded:
    """One request as it arrived."""

    kind: str
    query: dict[str, str]
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


class PlatformStub:
    """The platform's side of the protocol for one worker.

    Args:
        worker_id: The worker's id.
        key: Its key; other keys get 401.
        batches: Whether it knows our addition `job-done-batch`.
        take_batches: Whether it knows `job-take-batch`; older platforms do not.
    """

    def __init__(
        self,
        worker_id: str = "w1",
        key: str = "worker-secret",
        *,
        batches: bool = False,
        take_batches: bool = True,
    ) -> None:
        self.worker_id = worker_id
        self.key = key
        self.port = 0
        self.queue: deque[dict[str, Any]] = deque()
        self.stops: deque[str] = deque()
        self.results: dict[str, Any] = {}
        self.chunks: defaultdict[str, list[Any]] = defaultdict(list)
        self.pings: list[list[str]] = []
        self.states: list[dict[str, Any]] = []
        self.requests: list[Recorded] = []
        self.refusals: dict[str, Refusal] = {}
        self.draining = False
        self.batches = batches
        self.take_batches = take_batches
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listens on a free port, or on the same one as before."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_get("/v2/ep/job-take/{worker}", self._take)
        if self.take_batches:
            app.router.add_get("/v2/ep/job-take-batch/{worker}", self._take)
        app.router.add_get("/v2/ep/job-stop/{worker}", self._stop)
        app.router.add_post("/v2/ep/job-done/{worker}/{job}", self._done)
        if self.batches:
            app.router.add_post("/v2/ep/job-done-batch/{worker}", self._done_batch)
        app.router.add_post("/v2/ep/job-stream/{worker}/{job}", self._chunk)
        app.router.add_get("/v2/ep/ping/{worker}", self._ping)
        app.router.add_post("/state", self._state)
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=75, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Closes the port and every connection, as a crash would."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    def environment(self) -> dict[str, str]:
        """The variables that a worker of ours finds its platform by, state URL included."""
        return {
            **self.runpod_environment(),
            "PILOTLIGHT_WORKER_STATE_URL": f"http://127.0.0.1:{self.port}/state",
        }

    def runpod_environment(self) -> dict[str, str]:
        """Only what the protocol itself injects (`worker-protocol.md` §2.1): a worker on another platform."""
        base = f"http://127.0.0.1:{self.port}/v2/ep"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_AI_API_KEY": self.key,
            "RUNPOD_POD_ID": self.worker_id,
            "RUNPOD_PING_INTERVAL": "100",
            "RUNPOD_ENDPOINT_ID": "ep",
            "RUNPOD_POD_HOSTNAME": "host",
            "RUNPOD_LOG_LEVEL": "INFO",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "NO_PROXY": "127.0.0.1",
        }

    async def submit(self, job_id: str, job_input: Any, **extra: Any) -> None:
        """Queues a job."""
        await self._change(lambda: self.queue.append({"id": job_id, "input": job_input, **extra}))

    async def cancel(self, job_id: str) -> None:
        """Asks the worker to stop a job."""
        await self._change(lambda: self.stops.append(job_id))

    async def begin_drain(self) -> None:
        """Hands out nothing more and answers open polls, as a platform does before it ends a worker."""

        def drain() -> None:
            self.draining = True

        await self._change(drain)

    async def result(self, job_id: str, seconds: float = 20.0) -> Any:
        """The final result body of a job, once it is there."""
        await self.until(lambda: job_id in self.results, seconds)
        return self.results[job_id]

    async def stage(self, stage: str, seconds: float = 20.0) -> dict[str, Any]:
        """The last report of this stage, once there is one."""
        await self.until(lambda: any(report["stage"] == stage for report in self.states), seconds)
        return next(report for report in reversed(self.states) if report["stage"] == stage)

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Waits for a condition on what was recorded; TimeoutError after so many seconds."""
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(condition)

    async def _change(self, change: Callable[[], object]) -> None:
        async with self._changed:
            change()
            self._changed.notify_all()

    async def _take(self, request: web.Request) -> web.Response:
        if (refused := await self._admit(request, "take")) is not None:
            return refused
        wanted = int(request.query.get("batch_size", "1"))
        with contextlib.suppress(TimeoutError):
            await self.until(lambda: bool(self.queue) or self.draining, HOLD_SECONDS)
        if not self.queue or self.draining:
            return web.Response(status=204)
        jobs = [self.queue.popleft() for _ in range(min(wanted, len(self.queue)))]
        return web.json_response(jobs if "batch_size" in request.query else jobs[0])

    async def _stop(self, request: web.Request) -> web.Response:
        if (refused := await self._admit(request, "stop")) is not None:
            return refused
        with contextlib.suppress(TimeoutError):
            await self.until(lambda: bool(self.stops) or self.draining, HOLD_SECONDS)
        ids = [self.stops.popleft() for _ in range(len(self.stops))]
        return web.json_response({"jobsToStop": ids or ["-"]})

    async def _done(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        if (refused := await self._admit(request, "done", body)) is not None:
            return refused
        await self._change(lambda: self.results.setdefault(request.match_info["job"], body))
        return web.Response()

    async def _done_batch(self, request: web.Request) -> web.Response:
        items = json.loads(await request.read())
        if (refused := await self._admit(request, "done-batch", items)) is not None:
            return refused
        await self._change(lambda: self.results.update({item["id"]: item["body"] for item in items}))
        results = [{"id": item["id"], "status": 200} for item in items]
        if "take" not in request.query:
            return web.json_response(results)
        wanted = 0 if self.draining else int(request.query["take"])
        jobs = [self.queue.popleft() for _ in range(min(wanted, len(self.queue)))]
        return web.json_response({"results": results, "jobs": jobs})

    async def _chunk(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        if (refused := await self._admit(request, "stream", body)) is not None:
            return refused
        await self._change(lambda: self.chunks[request.match_info["job"]].append(body["output"]))
        return web.Response()

    async def _ping(self, request: web.Request) -> web.Response:
        if (refused := await self._admit(request, "ping")) is not None:
            return refused
        ids = [job for job in request.query.get("job_id", "").split(",") if job]
        await self._change(lambda: self.pings.append(ids))
        return web.Response()

    async def _state(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        if (refused := await self._admit(request, "state", body)) is not None:
            return refused
        await self._change(lambda: self.states.append(body))
        return web.Response()

    async def _admit(self, request: web.Request, kind: str, body: Any = None) -> web.Response | None:
        """Records the request; an answer only if it is refused."""
        record = Recorded(kind, dict(request.query), body, dict(request.headers))
        await self._change(lambda: self.requests.append(record))
        refusal = self.refusals.get(kind)
        if refusal is not None and refusal.times > 0:
            refusal.times -= 1
            return web.Response(status=refusal.status)
        if request.headers.get("Authorization") != self.key:
            return web.Response(status=401)
        if request.match_info.get("worker", self.worker_id) != self.worker_id:
            return web.Response(status=404)
        return None

    def of_kind(self, kind: str) -> Iterator[Recorded]:
        """Requests of one kind (take, stop, done, stream, ping, state), in order of arrival."""
        return (record for record in self.requests if record.kind == kind)
