"""What is wired to what: the one place where an installation is put together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvicorn
from starlette.routing import Router

from pilotlight.client.discovery import KEY_FILE, SERVER_FILE
from pilotlight.clusters.devices import read_host
from pilotlight.clusters.local import LocalCluster
from pilotlight.clusters.run_folder import RunFolder
from pilotlight.core.admission import AdmissionLimits
from pilotlight.core.worker_environment import worker_environment
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.ids import api_key_secret, short_id
from pilotlight.domain.key import ApiKey, Scope, hash_secret
from pilotlight.domain.worker import Address, Registration, Worker
from pilotlight.engines.manifest import EngineManifest, load_manifest
from pilotlight.errors import SettingsError
from pilotlight.gateway.app import Gateway
from pilotlight.gateway.asgi import App
from pilotlight.gateway.data_path import DataPath, StartFailedError
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.errors import native_error
from pilotlight.gateway.jobs import JobService, job_routes
from pilotlight.gateway.protocol import GatewayProtocol
from pilotlight.gateway.recorder import RequestRecorder
from pilotlight.gateway.slots import SlotTable
from pilotlight.gateway.upstream import UpstreamPool
from pilotlight.gateway.worker_protocol import worker_routes
from pilotlight.loops.autoscaler import Autoscaler
from pilotlight.loops.fleet import WorkerFleet
from pilotlight.loops.meter import Meter
from pilotlight.loops.reaper import Reaper
from pilotlight.management import EndpointService, KeyService, management_app
from pilotlight.ports.clock import Clock
from pilotlight.ports.store import Store
from pilotlight.settings import Settings
from pilotlight.stores.sqlite import open_sqlite_store
from pilotlight.system import SystemClock

_log = structlog.get_logger()

ADMIN_KEY_NAME = "admin"
CLI_KEY_NAME = "cli"


class _Listener:
    """Passes the fleet's news on to slots and queue (port `WorkerListener`)."""

    def __init__(self, slots: SlotTable, pool: UpstreamPool, run_folder: RunFolder) -> None:
        self._slots = slots
        self._pool = pool
        self._run_folder = run_folder
        self.jobs: JobService | None = None

    def opened(self, worker: Worker, registration: Registration | None, capacity: int) -> None:
        self._slots.open_worker(worker.endpoint_id, worker.id, capacity=capacity, registration=registration)
        if self.jobs is not None:
            self.jobs.slots_freed(worker.endpoint_id)

    def closed(self, worker: Worker) -> None:
        self._slots.close_worker(worker.id)
        if self.jobs is not None:
            self.jobs.release_polls(worker.id)

    def occupied(self, worker_id: str) -> int:
        slots = self._slots.worker(worker_id)
        return 0 if slots is None else slots.occupied

    async def ended(self, worker: Worker, reason: str) -> None:
        slots = self._slots.worker(worker.id)
        if slots is not None and slots.registration is not None:
            addresses = [slots.registration.engine, slots.registration.listener]
            self._pool.drop([address.url for address in addresses if address is not None])
        # First the slots: a slot that a lost job gives back must not go to a held request.
        self._slots.drop_worker(worker.id)
        if self.jobs is not None:
            await self.jobs.worker_ended(worker.id, reason)
        self._run_folder.remove(worker.id)


@dataclass(frozen=True, slots=True)
class FirstStart:
    """What a first start has to tell once.

    Attributes:
        admin_key: Secret of the admin key; only its hash was stored.
    """

    admin_key: str


class Installation:
    """One gateway with its loops, cluster and store. Make it with `open_installation`.

    Args:
        settings: Everything tunable.
        store: What is remembered.
        local_url: Where workers on this machine reach us.
    """

    def __init__(self, settings: Settings, store: Store, local_url: str) -> None:
        self.settings = settings
        self.store = store
        self.local_url = local_url
        self.url = (settings.server.public_url or local_url).rstrip("/")
        self.clock: Clock = SystemClock()
        self.directory = Directory(store)
        self.recorder = RequestRecorder(store)
        self.slots = SlotTable(
            self.clock,
            AdmissionLimits(requests=settings.limits.hold_requests, bytes=settings.limits.hold_bytes),
        )
        self.pool = UpstreamPool(idle_s=settings.limits.upstream_idle_s)
        self.run_folder = RunFolder(settings.home)
        self._listener = _Listener(self.slots, self.pool, self.run_folder)
        self.cluster = LocalCluster(
            settings.home / "logs",
            log_bytes=settings.workers.log_bytes,
            base_env=os.environ,
            host_has_gpus=bool(read_host().gpus),
            close_grace_s=settings.server.shutdown_s / 2,
        )
        self.fleet = WorkerFleet(
            store=store,
            cluster=self.cluster,
            listener=self._listener,
            clock=self.clock,
            settings=settings.workers,
            entropy=os.urandom,
            environment=self._worker_environment,
            command=(sys.executable, "-m", "pilotlight.worker"),
            host=read_host,
        )
        self.autoscaler = Autoscaler(
            endpoint=self.directory.endpoint,
            store=store,
            traffic=self.slots,
            fleet=self.fleet,
            clock=self.clock,
            on_give_up=self._give_up,
        )
        self.jobs = JobService(
            store=store,
            slots=self.slots,
            fleet=self.fleet,
            directory=self.directory,
            clock=self.clock,
            settings=settings,
            entropy=os.urandom,
            record=self.recorder.record,
            wake=self.autoscaler.wake,
        )
        self._listener.jobs = self.jobs
        self.reaper = Reaper(self.jobs, store, self.clock, settings, prune_logs=self.cluster.logs.prune)
        self.meter = Meter(self.fleet)
        self.slots.on_demand = self.autoscaler.wake
        self.slots.on_idle = self._idle
        self.slots.on_free = self.jobs.slots_freed
        self.fleet.on_change = self.autoscaler.wake
        self.app = Gateway(data_path=self._data_path(), jobs=self._job_road(), management=self._management())

    async def start(self) -> FirstStart | None:
        """Recover from an earlier life and begin to work; what a first start must tell, else None."""
        await self.directory.refresh()
        swept = await self.fleet.recover()
        self.run_folder.open()
        requeued = await self.jobs.recover()
        if swept or requeued:
            _log.info("recovered", leftover_workers_ended=swept, jobs_requeued=requeued)
        # Last of all that can fail: a key that is told once must not get lost in a start that did not happen.
        first = await self._ensure_keys()
        await self.directory.refresh()
        self.recorder.start()
        self.autoscaler.start()
        self.reaper.start()
        self.meter.start()
        for endpoint in self.directory.endpoints():
            self.endpoint_changed(endpoint.id)
        return first

    async def stop(self) -> None:
        """Refuse what is new, end all workers, write everything down.

        No step is left out because another failed.
        """
        self.app.closing = True
        await _attempt("autoscaler", self.autoscaler.stop())
        for endpoint in self.directory.endpoints():
            self.slots.fail_held(endpoint.id, StartFailedError("the gateway is stopping", retry_after_s=5))
        # From here on a job that loses its worker is requeued without using up its retry.
        await _attempt("jobs", self.jobs.close())
        await _attempt("workers", self.fleet.close())
        await _attempt("reaper", self.reaper.stop())
        await _attempt("meter", self.meter.stop())
        self.pool.close()
        self.run_folder.close()
        self.app.interrupt()

    async def close(self) -> None:
        """Write the last rows and release the store; after the server has answered its last request."""
        await _attempt("recorder", self.recorder.stop())
        await self.store.close()

    def endpoint_changed(self, endpoint_id: str) -> None:
        """Make slots and workers follow a created or changed endpoint."""
        endpoint = self.directory.endpoint(endpoint_id)
        if endpoint is None:
            return
        fixed = _fixed_engine(endpoint.id)
        if endpoint.revision.engine_url is None:
            self.slots.drop_worker(fixed)
        else:
            address = Address(url=endpoint.revision.engine_url)
            registration = Registration(engine=address)
            self.slots.open_worker(
                endpoint.id, fixed, capacity=endpoint.concurrency, registration=registration
            )
        self.fleet.forgive(endpoint.id)
        self.slots.forgive(endpoint.id)
        self.fleet.resize(endpoint)
        self.autoscaler.wake(endpoint.id)

    async def endpoint_deleted(self, endpoint_id: str) -> None:
        """Cancel the jobs of a deleted endpoint and forget its slots once its workers are gone."""
        self.slots.fail_held(endpoint_id, StartFailedError("the endpoint was deleted", retry_after_s=1))
        self.slots.drop_worker(_fixed_engine(endpoint_id))
        await self.jobs.endpoint_deleted(endpoint_id)
        self.fleet.forgive(endpoint_id)

    def _data_path(self) -> DataPath:
        return DataPath(
            directory=self.directory,
            slots=self.slots,
            pool=self.pool,
            fleet=self.fleet,
            clock=self.clock,
            limits=self.settings.limits,
            entropy=os.urandom,
            record=self.recorder.record,
        )

    def _job_road(self) -> App:
        limits = self.settings.limits
        for_clients = job_routes(
            self.jobs, self.directory, slots=self.slots, fleet=self.fleet, clock=self.clock, limits=limits
        )
        for_workers = worker_routes(self.jobs, self.fleet, limits=limits)
        return Router([*for_clients, *for_workers], default=native_error(404, "not found"))

    def _management(self) -> App:
        service = EndpointService(
            store=self.store,
            directory=self.directory,
            fleet=self.fleet,
            settings=self.settings,
            clock=self.clock,
            entropy=os.urandom,
            wake=self.endpoint_changed,
            manifest_loader=self._manifest,
            host_reader=read_host,
            on_deleted=self.endpoint_deleted,
            base_url=lambda: self.url,
        )
        return management_app(
            service=service,
            keys=KeyService(store=self.store, directory=self.directory, clock=self.clock, entropy=os.urandom),
            key_reader=self.directory,
            records=self.store,
            slots=self.slots,
            logs=self.cluster.logs,
            clock=self.clock,
            home=str(self.settings.home),
        )

    def _manifest(self) -> EngineManifest:
        return load_manifest(self.settings.engine_home)

    def _worker_environment(self, endpoint: Endpoint, worker_id: str, secret: str) -> Mapping[str, str]:
        variables = dict(endpoint.revision.env)
        bypassed = variables.get("NO_PROXY", "")
        variables |= worker_environment(
            self.local_url,
            endpoint.id,
            worker_id,
            secret,
            ping_interval_ms=self.settings.jobs.ping_interval_ms,
            host_name=socket.gethostname(),
        )
        variables["PILOTLIGHT_WORKER_RUN_DIR"] = str(self.run_folder.path(worker_id))
        variables["NO_PROXY"] = ",".join(filter(None, (bypassed, variables["NO_PROXY"])))
        variables["PILOTLIGHT_ENGINE_HOME"] = str(self.settings.engine_home)
        variables["MAX_CONCURRENCY"] = str(endpoint.concurrency)
        drain_s = min(endpoint.execution_timeout_ms // 1000, self.settings.workers.drain_max_s)
        variables.setdefault("DRAIN_TIMEOUT", str(drain_s))
        if self.settings.engine.command:
            variables["PILOTLIGHT_ENGINE_COMMAND"] = json.dumps(self.settings.engine.command)
        return variables

    def _idle(self, endpoint_id: str) -> None:
        self.fleet.slots_idle(endpoint_id)
        self.autoscaler.note_idle(endpoint_id)

    def _give_up(self, endpoint: Endpoint, retry_ms: int) -> None:
        failure = self.fleet.health(endpoint.id).failure
        cause = f"{failure.cause} ({failure.advice or failure.kind})" if failure else "unknown"
        retry_after_s = max(1, -(-(retry_ms - self.clock.now_ms()) // 1000))
        error = StartFailedError(f"no worker could be started: {cause}", retry_after_s=retry_after_s)
        self.slots.fail_held(endpoint.id, error, retry_ms=retry_ms)

    async def _ensure_keys(self) -> FirstStart | None:
        """Make the admin key and the CLI's own key where they are missing."""
        keys = await self.store.keys()
        cli_file = self.settings.home / KEY_FILE
        cli_secret = cli_file.read_text().strip() if cli_file.exists() else ""
        if not any(key.hash == hash_secret(cli_secret) for key in keys):
            write_private(cli_file, await self._add_admin_key(CLI_KEY_NAME) + "\n")
        if any(key.scope is Scope.ADMIN and key.name != CLI_KEY_NAME for key in keys) or keys:
            return None
        return FirstStart(admin_key=await self._add_admin_key(ADMIN_KEY_NAME))

    async def _add_admin_key(self, name: str) -> str:
        secret = api_key_secret(os.urandom(40))
        await self.store.add_key(
            ApiKey(
                id=short_id(os.urandom(10), 10),
                name=name,
                scope=Scope.ADMIN,
                hash=hash_secret(secret),
                created_ms=self.clock.now_ms(),
            )
        )
        return secret


def _calm_collector() -> None:
    """Keep the garbage collector from walking over everything that lives as long as the process.

    Without this a full collection stops the data path for tens of milliseconds under load.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


async def _attempt(step: str, work: Awaitable[object]) -> None:
    """Do a step of the end; what goes wrong is logged, and the end goes on."""
    try:
        await work
    except Exception:  # noqa: BLE001 - see above
        _log.exception("stop_failed", step=step)


def _fixed_engine(endpoint_id: str) -> str:
    """The name under which the slots of a fixed engine are counted."""
    return f"{endpoint_id}-engine"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    draft = path.with_suffix(path.suffix + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    draft.replace(path)


def bind(settings: Settings) -> socket.socket:
    """The listening socket.

    Raises:
        SettingsError: The port is in use or the address is not ours.
    """
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"port {port} on {host} is in use; choose another with `pilotlight up --port`, "
                "or stop what uses it"
            ) from error
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    listener.set_inheritable(False)
    return listener


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: `up` decides what a signal means."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answering = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answering.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def open_installation(
    settings: Settings, *, announce: Callable[[Installation, FirstStart | None], None] = lambda *_: None
) -> AsyncIterator[Installation]:
    """A running installation: serving, scaling, recording; ended completely when the block ends.

    Args:
        settings: Everything tunable.
        announce: Called once requests are answered, with what a first start must tell.

    Raises:
        SettingsError: The port is in use.
        DataFolderError: The data folder is in use or not writable.
    """
    store = await open_sqlite_store(settings.home, synchronous=settings.store.synchronous)
    try:
        listener = bind(settings)
    except SettingsError:
        await store.close()
        raise
    host, port = listener.getsockname()[:2]
    reached_at = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 - compared, not bound
    local_url = f"http://{reached_at}:{port}"
    installation = Installation(settings, store, local_url)
    config = uvicorn.Config(
        installation.app,
        http=GatewayProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = _Server(config)
    serving: asyncio.Task[None] | None = None
    server_file = settings.home / SERVER_FILE
    try:
        first = await installation.start()
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="server")
        answering = asyncio.create_task(server.answering.wait(), name="server-answering")
        await asyncio.wait({serving, answering}, return_when=asyncio.FIRST_COMPLETED)
        answering.cancel()
        if serving.done():
            serving.result()
        write_private(server_file, json.dumps({"url": local_url, "pid": os.getpid()}))
        _calm_collector()
        announce(installation, first)
        yield installation
    finally:
        await installation.stop()
        server.should_exit = True
        if serving is not None:
            await serving
        listener.close()
        await installation.close()
        server_file.unlink(missing_ok=True)
