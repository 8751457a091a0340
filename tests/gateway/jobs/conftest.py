"""A gateway without data path and cluster: job routes, worker routes, memory store, and a fleet that only
remembers what it was told."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
import uvicorn

from pilotlight.core.admission import AdmissionLimits
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.key import ApiKey, Scope, hash_secret
from pilotlight.domain.usage import RequestRecord
from pilotlight.domain.worker import Worker, WorkerState
from pilotlight.errors import NotFoundError
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.jobs import JobService, job_routes
from pilotlight.gateway.jobs.batch_routes import batch_routes
from pilotlight.gateway.jobs.buckets import Buckets
from pilotlight.gateway.jobs.http import JobRoad
from pilotlight.gateway.jobs.openai import JobOpenAI
from pilotlight.gateway.key_limits import KeyLimits
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.protocol import GatewayProtocol
from pilotlight.gateway.slots import SlotTable
from pilotlight.gateway.worker_protocol import worker_routes
from pilotlight.net import GuardedHttp
from pilotlight.net.s3 import S3Uploader
from pilotlight.ports.fleet import Health, StageReport
from pilotlight.ports.store import Store
from pilotlight.sealing import InstallationSecret
from pilotlight.settings import JobSettings, LimitSettings, Settings
from pilotlight.stores import MemoryStore, open_sqlite_store
from pilotlight.system import SystemClock

ADMIN = "rpa_ADMIN"
RUNNER = "rpa_RUNNER"
ENDPOINT = "ep1"


class ShiftedClock:
    """The real clocks plus a shift, so that hours pass at once."""

    def __init__(self) -> None:
        self.shift_ms = 0
        self.frozen: tuple[int, int] | None = None

    def now_ms(self) -> int:
        return (self.frozen[0] if self.frozen else time.time_ns()) // 1_000_000 + self.shift_ms

    def monotonic_ns(self) -> int:
        return (self.frozen[1] if self.frozen else time.monotonic_ns()) + self.shift_ms * 1_000_000

    def freeze(self) -> None:
        """From now on time passes by `advance` only: a slow machine changes nothing."""
        self.frozen = time.time_ns(), time.monotonic_ns()

    def advance(self, seconds: float) -> None:
        self.shift_ms += int(seconds * 1000)


@dataclass
class RecordingFleet:
    """Implements the port `Fleet`; `kill` ends a worker at once, `drain` only marks it."""

    slots: SlotTable
    living: dict[str, Worker] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)
    reports: list[tuple[str, StageReport]] = field(default_factory=list)
    drained: list[tuple[str, str]] = field(default_factory=list)
    killed: list[tuple[str, str]] = field(default_factory=list)
    fixed: set[str] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    state: Health = field(default_factory=Health)
    steps: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    service: JobService | None = None

    def add(self, worker_id: str = "w1", *, endpoint_id: str = ENDPOINT, capacity: int | None = None) -> str:
        self.living[worker_id] = Worker(id=worker_id, endpoint_id=endpoint_id, version=1)
        self.secrets[worker_id] = f"secret-{worker_id}"
        if capacity is not None:
            self.fixed.add(worker_id)
            self.become(worker_id, WorkerState.READY)
            self.slots.open_worker(endpoint_id, worker_id, capacity=capacity, registration=None)
        return self.secrets[worker_id]

    def become(self, worker_id: str, state: WorkerState) -> None:
        self.living[worker_id] = replace(self.living[worker_id], state=state)

    def worker(self, worker_id: str) -> Worker | None:
        return self.living.get(worker_id)

    def workers(self, endpoint_id: str) -> list[Worker]:
        return [worker for worker in self.living.values() if worker.endpoint_id == endpoint_id]

    def authenticate(self, endpoint_id: str, worker_id: str, secret_hash: str) -> Worker | None:
        worker = self.living.get(worker_id)
        ok = (
            worker
            and worker.endpoint_id == endpoint_id
            and hash_secret(self.secrets[worker_id]) == secret_hash
        )
        return worker if ok else None

    def stages(self, worker_id: str) -> list[tuple[str, int]]:
        return self.steps.get(worker_id, [])

    def health(self, endpoint_id: str) -> Health:
        return self.state

    async def reported(self, worker_id: str, report: StageReport) -> None:
        self.reports.append((worker_id, report))

    async def took(self, worker_id: str, *, slots: int) -> None:
        worker = self.living[worker_id]
        if worker.state is WorkerState.STARTING:
            self.become(worker_id, WorkerState.READY)
            self.slots.open_worker(worker.endpoint_id, worker_id, capacity=slots, registration=None)
            self.changed.set()
        elif worker.state is WorkerState.READY and worker_id not in self.fixed:
            self.slots.open_worker(worker.endpoint_id, worker_id, capacity=slots, registration=None)

    async def resume(self, endpoint: Endpoint, worker_id: str) -> Worker:
        raise NotFoundError(worker_id)

    async def thaw(self, worker_id: str) -> bool:
        return self.living[worker_id].state is WorkerState.READY

    async def drain(self, worker_id: str, *, reason: str, grace_s: float = 0) -> None:
        self.drained.append((worker_id, reason))
        self.become(worker_id, WorkerState.DRAINING)
        self.changed.set()

    async def kill(self, worker_id: str, *, reason: str) -> None:
        self.killed.append((worker_id, reason))
        await self.end(worker_id, reason)
        self.changed.set()

    async def end(self, worker_id: str, reason: str = "exit status 1") -> None:
        """What the real fleet does when the last process of a worker is gone."""
        self.living.pop(worker_id, None)
        self.slots.drop_worker(worker_id)
        if self.service is not None:
            await self.service.worker_ended(worker_id, reason)


@dataclass
class Platform:
    """Everything a test may want to look at."""

    store: Store
    clock: ShiftedClock
    slots: SlotTable
    fleet: RecordingFleet
    directory: Directory
    settings: Settings
    service: JobService
    app: JobRoad
    records: list[RequestRecord]
    woken: list[str]
    notes: list[tuple[str, str]]
    outlook: Outlook
    estimates: dict[str, int]
    base: str = ""
    client: httpx.AsyncClient = field(default=None)  # type: ignore[assignment]

    @property
    def endpoint(self) -> Endpoint:
        endpoint = self.directory.endpoint(ENDPOINT)
        assert endpoint is not None
        return endpoint

    @property
    def key(self) -> ApiKey:
        key = self.directory.key(ADMIN)
        assert key is not None
        return key

    async def call(
        self, method: str, path: str, *, key: str | None = ADMIN, endpoint: str = ENDPOINT, **arguments: Any
    ) -> httpx.Response:
        """A client's request to `/v2/{endpoint}{path}`."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return await self.client.request(
            method, f"/v2/{endpoint}{path}", headers=headers | arguments.pop("headers", {}), **arguments
        )

    async def ask(
        self, method: str, path: str, *, worker: str = "w1", secret: str | None = None, **arguments: Any
    ) -> httpx.Response:
        """A worker's request to `/v2/{ENDPOINT}{path}`."""
        headers = {"authorization": secret or f"secret-{worker}"}
        return await self.client.request(method, f"/v2/{ENDPOINT}{path}", headers=headers, **arguments)

    async def run(self, body: Mapping[str, Any] | None = None) -> str:
        """Submit by `/run`; the job's id."""
        answer = await self.call("POST", "/run", json=body or {"input": {"n": 1}})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    async def take(self, worker: str = "w1", *, holding: bool = False, batch: int = 0) -> httpx.Response:
        """One take of a worker."""
        verb, size = ("job-take-batch", f"&batch_size={batch}") if batch else ("job-take", "")
        return await self.ask(
            "GET", f"/{verb}/{worker}?gpu=x{size}&job_in_progress={int(holding)}", worker=worker
        )

    async def done(
        self, job_id: str, body: Any, worker: str = "w1", *, stream: bool = False
    ) -> httpx.Response:
        """Post a result as the library does: JSON under a form's content type."""
        content = body if isinstance(body, bytes) else httpx.Response(200, json=body).content
        return await self.client.post(
            f"/v2/{ENDPOINT}/job-done/{worker}/{job_id}?gpu=x&isStream={str(stream).lower()}",
            content=content,
            headers={
                "authorization": f"secret-{worker}",
                "content-type": "application/x-www-form-urlencoded",
            },
        )

    async def chunk(self, job_id: str, value: Any, worker: str = "w1") -> httpx.Response:
        """Post one stream chunk."""
        return await self.ask(
            "POST",
            f"/job-stream/{worker}/{job_id}?gpu=x&isStream=false",
            worker=worker,
            json={"output": value},
        )

    async def pass_time(self, seconds: int) -> None:
        """Let time pass, second by second, with the reaper's look at workers and hand-outs after each."""
        for _ in range(seconds):
            self.clock.advance(1)
            await self.service.lose_unconfirmed()
            await self.service.kill_stuck()

    async def ping(self, *job_ids: str, worker: str = "w1") -> httpx.Response:
        """Send a heartbeat."""
        listed = f"&job_id={'%2C'.join(job_ids)}" if job_ids else ""
        return await self.ask("GET", f"/ping/{worker}?gpu=x{listed}&runpod_version=1.12.0", worker=worker)

    async def status(self, job_id: str) -> dict[str, Any]:
        """The job object."""
        answer = await self.call("GET", f"/status/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def watched(self, number: int = 1) -> None:
        """Return when that many requests wait for a job to change."""
        watches = self.service._ledger.signals._watches
        while sum(len(events) for events in watches.values()) < number:
            await asyncio.sleep(0.001)

    async def reshape(self, **changes: Any) -> None:
        """Change the endpoint."""
        await self.store.update_endpoint(replace(self.endpoint, **changes))
        await self.directory.refresh()

    async def parked(self, number: int = 1) -> None:
        """Return when that many takes are parked. Signalled by the event loop: each turn lets I/O happen."""
        while sum(len(link.polls) for link in self.service._ledger.links.values()) != number:
            await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def serving(app: JobRoad) -> AsyncIterator[str]:
    """Serve an app with the production HTTP stack on a free loopback port; yields the base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=GatewayProtocol,
        proxy_headers=False,
        log_level="error",
        lifespan="off",
        ws="none",
        loop="asyncio",
        timeout_keep_alive=75,
    )
    server = uvicorn.Server(config)
    server.config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listener])
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        await server.shutdown(sockets=[listener])


def job_openai(platform: Platform) -> JobOpenAI:
    """What serves OpenAI's routes by jobs."""
    return JobOpenAI(
        platform.service,
        platform.directory,
        platform.settings.limits,
        platform.outlook,
        KeyLimits(SystemClock()),
    )


def settings_with(
    home: Any, *, jobs: Mapping[str, Any] | None = None, limits: Mapping[str, Any] | None = None
) -> Settings:
    return Settings(home=home, jobs=JobSettings(**(jobs or {})), limits=LimitSettings(**(limits or {})))


async def _fill(store: Store) -> None:
    """Two endpoints and two keys."""
    await store.add_endpoint(
        Endpoint(id=ENDPOINT, name="one", revision=Revision(endpoint_id=ENDPOINT, version=1, model="m"))
    )
    await store.add_endpoint(
        Endpoint(
            id="ep2", name="two", revision=Revision(endpoint_id="ep2", version=1, model="m"), workers_max=0
        )
    )
    await store.add_key(ApiKey(id="k1", name="admin", scope=Scope.ADMIN, hash=hash_secret(ADMIN)))
    await store.add_key(
        ApiKey(
            id="k2",
            name="runner",
            scope=Scope.RUN,
            endpoint_ids=frozenset({ENDPOINT}),
            hash=hash_secret(RUNNER),
        )
    )


def _digits(number: int, size: int) -> bytes:
    """A number in bytes below 36, so that ids that use each byte modulo 36 differ, too."""
    return bytes(number // 36**place % 36 for place in reversed(range(size)))


async def build(settings: Settings, store: Store) -> Platform:
    if not await store.endpoints():
        await _fill(store)
    directory = Directory(store)
    await directory.refresh()
    clock = ShiftedClock()
    slots = SlotTable(clock, AdmissionLimits(requests=10, bytes=1000))
    fleet = RecordingFleet(slots)
    records: list[RequestRecord] = []
    woken: list[str] = []
    notes: list[tuple[str, str]] = []
    counter = itertools.count(1)
    estimates: dict[str, int] = {}
    outlook = Outlook(fleet=fleet, clock=clock, estimate=estimates.get)
    secret = InstallationSecret(bytes(32))
    uploader = S3Uploader(http=GuardedHttp(allow_private=True), clock=clock, timeout_s=30)
    service = JobService(
        store=store,
        slots=slots,
        fleet=fleet,
        directory=directory,
        clock=clock,
        settings=settings,
        entropy=lambda size: _digits(next(counter), size) if size > 1 else b"\x80",
        record=records.append,
        wake=woken.append,
        buckets=Buckets(secret, uploader, store),
        webhook_due=lambda: woken.append("webhooks"),
        note=lambda worker_id, text: notes.append((worker_id, text)),
        start_s=outlook.start_s,
    )
    fleet.service = service
    slots.on_free = service.slots_freed
    routes = [
        *worker_routes(service, fleet, limits=settings.limits),
        *job_routes(
            service,
            directory,
            slots=slots,
            fleet=fleet,
            limits=settings.limits,
            key_limits=KeyLimits(clock),
        ),
        *batch_routes(service.batches, directory, limits=settings.limits, rates=service.rates),
    ]
    app = JobRoad(routes)
    return Platform(
        store,
        clock,
        slots,
        fleet,
        directory,
        settings,
        service,
        app,
        records,
        woken,
        notes,
        outlook,
        estimates,
    )


@pytest.fixture
def make_platform(tmp_path: Any) -> Callable[..., contextlib.AbstractAsyncContextManager[Platform]]:
    @contextlib.asynccontextmanager
    async def make(
        *,
        jobs: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
        sqlite: bool = False,
    ) -> AsyncIterator[Platform]:
        store = await open_sqlite_store(tmp_path / "data") if sqlite else MemoryStore()
        made = await build(settings_with(tmp_path, jobs=jobs, limits=limits), store)
        async with serving(made.app) as base, httpx.AsyncClient(base_url=base, timeout=50) as client:
            made.base, made.client = base, client
            try:
                yield made
            finally:
                await made.service.close()
                await store.close()

    return make


@pytest.fixture
async def platform(make_platform: Any) -> AsyncIterator[Platform]:
    """Production-like, with short holds."""
    async with make_platform(jobs={"take_hold_s": 1, "stop_hold_s": 1}) as made:
        yield made
