"""What is wired to what: the one place where an installation is put together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import structlog

from pilotlight import roads
from pilotlight.client.discovery import SERVER_FILE
from pilotlight.clusters.container_engine import ContainerEngine
from pilotlight.clusters.containers import ContainerCluster
from pilotlight.clusters.devices import read_host
from pilotlight.clusters.launchers import Launchers
from pilotlight.clusters.local import LocalCluster
from pilotlight.clusters.logfiles import LogSource
from pilotlight.clusters.memory import read_memory
from pilotlight.clusters.places import Places
from pilotlight.clusters.ports import PortBook
from pilotlight.clusters.run_folder import RunFolder
from pilotlight.clusters.variables import WorkerVariables
from pilotlight.core.admission import AdmissionLimits
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.worker import Address, DownloadProgress, Registration, Stage
from pilotlight.engines.manifest import EngineManifest
from pilotlight.engines.versions import load_version
from pilotlight.first_start import FirstStart, ensure_keys, installation_secret, write_private
from pilotlight.gateway.addressing import is_served_directly
from pilotlight.gateway.data_path import StartFailedError
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.elsewhere import Elsewhere, FleetElsewhere, JobsElsewhere
from pilotlight.gateway.engine_metrics import engine_load
from pilotlight.gateway.jobs import JobService
from pilotlight.gateway.jobs.buckets import Buckets
from pilotlight.gateway.key_limits import KeyLimits
from pilotlight.gateway.listener import FleetListener
from pilotlight.gateway.load_balancer.checks import check_health
from pilotlight.gateway.observability import Observability
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.recorder import RequestRecorder
from pilotlight.gateway.router import FleetRouter
from pilotlight.gateway.slots import SlotTable
from pilotlight.gateway.upstream import UpstreamPool
from pilotlight.gateway.worker_door import HttpDoor
from pilotlight.huge_pages import keep_in_huge_pages
from pilotlight.launchable import Launchable
from pilotlight.loops.autoscaler import Autoscaler
from pilotlight.loops.estimates import Estimates
from pilotlight.loops.fleet import WorkerFleet
from pilotlight.loops.freezer import Freezer
from pilotlight.loops.health_checks import HealthChecker
from pilotlight.loops.leadership import Leadership
from pilotlight.loops.meter import Meter
from pilotlight.loops.reaper import Reaper
from pilotlight.loops.tasks import Endless
from pilotlight.loops.webhooks import WebhookSender
from pilotlight.management import (
    RegistryLogins,
)
from pilotlight.net import GuardedHttp
from pilotlight.net.s3 import S3Uploader
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import StageReport
from pilotlight.ports.store import Store
from pilotlight.sealing import InstallationSecret
from pilotlight.serving import Listening, Server, listen, server_config
from pilotlight.settings import Settings
from pilotlight.stores import open_store
from pilotlight.system import SystemClock, calm_collector, share_interpreter

_log = structlog.get_logger()

_LEAST_S = 1.0
"""Time that fronts have to end in any case."""

_LAST_LINES = 20
_LAST_LINE_MAX = 300


class Installation:
    """One gateway with its loops, cluster and store. Make it with `open_installation`.

    Args:
        settings: Everything tunable.
        store: What is remembered.
        listening: Where workers on this machine and clients reach us.
        secret: Signs webhooks and seals credentials.
        worker_descriptors: Soft limit on open files of workers; None means the gateway's own.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        listening: Listening,
        secret: InstallationSecret,
        worker_descriptors: int | None = None,
    ) -> None:
        self.settings = settings
        self._worker_descriptors = worker_descriptors
        self.store = store
        self.local_url = listening.local_url
        self.url = (settings.server.public_url or listening.url).rstrip("/")
        self.clock: Clock = SystemClock()
        self.directory = Directory(store)
        self.recorder = RequestRecorder(store)
        held = AdmissionLimits(requests=settings.limits.hold_requests, bytes=settings.limits.hold_bytes)
        self.key_limits = KeyLimits(self.clock)
        self.router = FleetRouter(clock=self.clock, endpoint_of=self.directory.endpoint, draw=random.random)
        self.slots = SlotTable(self.clock, held, router=self.router)
        self.pool = UpstreamPool(idle_s=settings.limits.upstream_idle_s)
        self.run_folder = RunFolder(settings.home)
        self.secret = secret
        self._bucket_http = GuardedHttp(allow_private=settings.uploads.allow_private)
        self.webhooks = self._sender()
        self.ports = PortBook(lambda worker_id: self.fleet.worker(worker_id) is not None)
        self.listener = FleetListener(self.slots, self.pool, self.run_folder, self.ports)
        self.cluster = self._cluster()
        self.container_engine = ContainerEngine(
            settings.containers.url, timeout_s=settings.containers.call_timeout_s
        )
        self.variables = self._variables()
        self.launchers = self._launchers()
        self.variables.launcher = self.launchers.socket
        self.fleet = self._fleet()
        self.roster = FleetElsewhere(self.fleet, store, leads=lambda: self.leadership.leading)
        self.estimates = self._estimates()
        estimates = self.estimates
        self.outlook = Outlook(
            fleet=self.roster, clock=self.clock, estimate=estimates.next_ms, rung=estimates.next_rung
        )
        self.autoscaler = self._autoscaler()
        self.jobs = self._jobs()
        self.checker = self._health_checker()
        self.engine_load = engine_load(self.slots, self.directory.endpoint, self.clock)
        self.reaper = Reaper(self.jobs, store, self.clock, settings, prune_logs=self.cluster.logs.prune)
        self.meter = Meter(self.fleet)
        self.freezer = Freezer(self.fleet, read_memory, self.clock, settings.workers)
        self._connect()
        self.balancer = roads.load_balancer(self)
        self.leadership = Leadership(
            lead=store.lead, begin=self._begin_to_lead, cut=self.jobs.ledger.suspend, end=self._end_to_lead
        )
        self.elsewhere = Elsewhere(
            jobs=JobsElsewhere(self.jobs.ledger),
            directory=self.directory,
            changed=self.endpoint_changed,
            deleted=self.endpoint_deleted,
            served=lambda: {worker.endpoint_id for worker in self.fleet.workers()},
            fleet=self.roster,
            webhook_due=self.webhooks.wake,
        )
        self.observability = Observability(self)
        self.desk = roads.desk(self)
        self.app = roads.gateway(self)

    def _connect(self) -> None:
        """Let those hear of each other that could not be given each other when they were made."""
        self.router.on_suspend = self.slots.suspend_worker
        self.router.on_resume = self.slots.resume_worker
        self.router.on_ready = self.slots.serve_held
        self.listener.jobs = self.jobs
        self.listener.checker = self.checker
        self.recorder.on_answer = self.fleet.answered
        self.fleet.on_start = self.estimates.note
        self.fleet.on_frozen = self.freezer.wake
        self.fleet.on_change = self.autoscaler.wake
        self.slots.on_demand = self.autoscaler.note_held
        self.slots.on_idle = self._idle
        self.slots.on_free = self.jobs.slots_freed

    async def start(self) -> FirstStart | None:
        """Recover from an earlier life and begin to work; what a first start must tell, else None."""
        await self.directory.refresh()
        await self.leadership.start()
        if not self.leadership.leading:
            await self.estimates.load()
        # Last of all that can fail: a key that is told once must not get lost in a start that did not happen.
        first = await ensure_keys(self.store, self.settings.home, self.clock)
        await self.directory.refresh()
        self.recorder.start()
        self.engine_load.start()
        for endpoint in self.directory.endpoints():
            self.endpoint_changed(endpoint.id)
        self.store.listen(self.elsewhere)
        return first

    async def _begin_to_lead(self) -> None:
        """Recover what an earlier leader left, a life of ours or another gateway, and begin with workers."""
        # First, and harmless without workers: should the lead be lost meanwhile, that is not undone.
        self.jobs.ledger.resume()
        await self.directory.refresh()
        swept = await self.fleet.recover()
        self.run_folder.open()
        requeued = await self.jobs.recover()
        if swept or requeued:
            _log.info("recovered", leftover_workers_ended=swept, jobs_requeued=requeued)
        await self.estimates.load()
        self.launchers.begin(self.directory.endpoints())
        self.autoscaler.start()
        self.reaper.start()
        self.meter.start()
        self.freezer.start()
        self.webhooks.start()
        for endpoint in self.directory.endpoints():
            self.autoscaler.wake(endpoint.id)

    async def _end_to_lead(self) -> None:
        """End everything that only a leader may do; its jobs are another gateway's by now.

        Nothing is handed out any more since the lead was lost. Workers go first: what they still do is done
        a second time elsewhere, and the loops need the store, which may be away.
        """
        self.directory.touch()
        await _attempt("autoscaler", self.autoscaler.stop())
        await _attempt("freezer", self.freezer.stop())
        await _attempt("workers", self.fleet.dismiss(reason="the gateway lost the lead"))
        await _attempt("launchers", self.launchers.stop())
        for endpoint in self.directory.endpoints():
            self.slots.fail_held(endpoint.id, StartFailedError("the gateway lost the lead", retry_after_s=2))
        await _attempt("reaper", self.reaper.stop())
        await _attempt("meter", self.meter.stop())
        await _attempt("webhooks", self.webhooks.stop())
        self.run_folder.close()

    async def stop(self) -> None:
        """Refuse what is new, end all workers, write everything down.

        No step is left out because another failed.
        """
        self.app.closing = True
        self.directory.touch()
        await _attempt("leadership", self.leadership.stop())
        await _attempt("autoscaler", self.autoscaler.stop())
        await _attempt("freezer", self.freezer.stop())
        for endpoint in self.directory.endpoints():
            self.slots.fail_held(endpoint.id, StartFailedError("the gateway is stopping", retry_after_s=5))
        # From here on a job that loses its worker is requeued without using up its retry. Workers are told to
        # end before their polls are answered, or they would ask again instead (worker-protocol.md §6.3).
        self.jobs.begin_close()
        await _attempt("workers", self.fleet.close())
        await _attempt("launchers", self.launchers.stop())
        await _attempt("jobs", self.jobs.close())
        await _attempt("health checks", self.checker.stop())
        await _attempt("engine load", self.engine_load.stop())
        await _attempt("reaper", self.reaper.stop())
        await _attempt("meter", self.meter.stop())
        await _attempt("webhooks", self.webhooks.stop())
        self.pool.close()
        self.balancer.pool.close()
        self.run_folder.close()
        self.app.interrupt()

    async def close(self) -> None:
        """Write the last rows and release the store; after the server has answered its last request."""
        await _attempt("news", self.elsewhere.close())
        await _attempt("recorder", self.recorder.stop())
        await _attempt("uploads", self._bucket_http.close())
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
        self.launchers.changed(endpoint)
        self.autoscaler.wake(endpoint.id)
        self.elsewhere.acted_on(endpoint)

    async def endpoint_deleted(self, endpoint_id: str) -> None:
        """Cancel the jobs of a deleted endpoint and drain its workers; its slots go once those are gone."""
        self.slots.fail_held(endpoint_id, StartFailedError("the endpoint was deleted", retry_after_s=1))
        self.slots.drop_worker(_fixed_engine(endpoint_id))
        self.launchers.deleted(endpoint_id)
        await self.jobs.endpoint_deleted(endpoint_id)
        self.estimates.forget(endpoint_id)
        self.elsewhere.forget(endpoint_id)
        await self.autoscaler.look(endpoint_id)

    def _sender(self) -> WebhookSender:
        settings = self.settings.webhooks
        return WebhookSender(
            store=self.store,
            http=GuardedHttp(allow_private=settings.allow_private),
            clock=self.clock,
            settings=settings,
            secret=self.secret.webhook_secret,
        )

    def _buckets(self) -> Buckets:
        timeout_s = self.settings.uploads.timeout_s
        uploader = S3Uploader(http=self._bucket_http, clock=self.clock, timeout_s=timeout_s)
        return Buckets(self.secret, uploader, self.store)

    def serves_directly(self, endpoint_id: str) -> bool:
        """Whether the engines of an endpoint are reached from here; also asked of unknown ones."""
        return is_served_directly(self.directory.endpoint(endpoint_id), leads=self.leadership.leading)

    def _cluster(self) -> LocalCluster:
        return LocalCluster(
            self.settings.home / "logs",
            log_bytes=self.settings.workers.log_bytes,
            base_env=os.environ,
            host_has_gpus=bool(read_host().gpus),
            close_grace_s=self.settings.server.shutdown_s / 2,
            descriptors=self._worker_descriptors,
        )

    def _containers(self) -> ContainerCluster:
        settings, logins = self.settings.containers, RegistryLogins(self.secret)
        return ContainerCluster(
            self.container_engine,
            self.cluster.logs,
            installation=self.secret.installation_id,
            network=settings.network,
            shm_bytes=settings.shm_bytes,
            gpu_driver=None if settings.gpu_driver == "auto" else settings.gpu_driver,
            login=logins.of,
            on_progress=self._image_progress,
            on_fetched=self._image_fetched,
            volume_roots=self.settings.volume_roots,
            close_grace_s=self.settings.server.shutdown_s / 2,
        )

    def _fleet(self) -> WorkerFleet:
        return WorkerFleet(
            store=self.store,
            cluster=Places(self.cluster, self._containers()),
            door=HttpDoor(),
            listener=self.listener,
            clock=self.clock,
            settings=self.settings.workers,
            entropy=os.urandom,
            environment=self.variables,
            command=(sys.executable, "-m", "pilotlight.worker"),
            host=read_host,
            last_line=self._last_line,
        )

    def _variables(self) -> WorkerVariables:
        return WorkerVariables(
            self.settings,
            self.local_url,
            ports=self.ports,
            run_folder=self.run_folder.path,
            host=read_host,
        )

    def _launchers(self) -> Launchers:
        return Launchers(
            Launchable(
                self.settings,
                variables=self.variables.before_launcher,
                cluster=self.cluster,
                socket=self.run_folder.launcher,
            ),
            logs=self.cluster.logs,
            settings=self.settings.launchers,
            available=lambda: read_host().memory_bytes_available,
            reserve_bytes=self.settings.workers.memory_reserve_bytes,
        )

    def _estimates(self) -> Estimates:
        return Estimates(
            endpoint=self.directory.endpoint,
            store=self.store,
            workers=self.roster.workers,
            launchable=self.launchers.launchable,
        )

    def _autoscaler(self) -> Autoscaler:
        return Autoscaler(
            endpoint=self.directory.endpoint,
            store=self.store,
            traffic=self.slots,
            fleet=self.fleet,
            clock=self.clock,
            on_give_up=self._give_up,
            estimate=self.estimates.next_ms,
        )

    def _health_checker(self) -> HealthChecker:
        return HealthChecker(
            check=partial(check_health, timeout_s=self.settings.load_balancer.check_timeout_s),
            address=lambda worker_id: Address(url=self.ports.url(worker_id)),
            busy=lambda worker_id: self.listener.occupied(worker_id) > 0,
            fleet=self.fleet,
            clock=self.clock,
            settings=self.settings.load_balancer,
        )

    def _jobs(self) -> JobService:
        return JobService(
            store=self.store,
            slots=self.slots,
            fleet=self.roster,
            directory=self.directory,
            clock=self.clock,
            settings=self.settings,
            entropy=os.urandom,
            record=self.recorder.record,
            wake=self.autoscaler.wake,
            buckets=self._buckets(),
            webhook_due=self.webhooks.wake,
            note=self.cluster.logs.note,
            start_s=self.outlook.start_s,
        )

    def manifest(self, version: str | None) -> EngineManifest:
        """The manifest of an engine version; of the default one for None."""
        return load_version(self.settings.engine_home, self.settings.engine.homes, version)

    async def _last_line(self, worker_id: str) -> str:
        """What an ended worker wrote last, shortened, "" for nothing."""
        lines = await self.cluster.logs.tail(worker_id, _LAST_LINES)
        written = [line.text.strip() for line in lines if line.source is LogSource.CONTAINER]
        return next((text[:_LAST_LINE_MAX] for text in reversed(written) if text), "")

    async def _image_progress(self, worker_id: str, done_bytes: int, total_bytes: int) -> None:
        progress = DownloadProgress(done_bytes=done_bytes, total_bytes=total_bytes or None)
        await self.fleet.reported(worker_id, StageReport(stage=Stage.DOWNLOADING, progress=progress))

    async def _image_fetched(self, worker_id: str) -> None:
        await self.fleet.reported(worker_id, StageReport(stage=Stage.STARTING))

    def _idle(self, endpoint_id: str) -> None:
        self.fleet.slots_idle(endpoint_id)
        self.autoscaler.note_idle(endpoint_id)

    def _give_up(self, endpoint: Endpoint, retry_ms: int) -> None:
        failure = self.fleet.health(endpoint.id).failure
        cause = failure.sentence if failure else "unknown"
        retry_after_s = max(1, -(-(retry_ms - self.clock.now_ms()) // 1000))
        error = StartFailedError(f"no worker could be started: {cause}", retry_after_s=retry_after_s)
        self.slots.fail_held(endpoint.id, error, retry_ms=retry_ms)


async def _attempt(step: str, work: Awaitable[object]) -> None:
    """Do a step of the end; what goes wrong is logged, and the end goes on."""
    try:
        await work
    except Exception:  # noqa: BLE001 - see above
        _log.exception("stop_failed", step=step)


def _fixed_engine(endpoint_id: str) -> str:
    """The name under which the slots of a fixed engine are counted."""
    return f"{endpoint_id}-engine"


@contextlib.asynccontextmanager
async def open_installation(
    settings: Settings,
    *,
    announce: Callable[[Installation, FirstStart | None], None] = lambda *_: None,
    worker_descriptors: int | None = None,
) -> AsyncIterator[Installation]:
    """A running installation: serving, scaling, recording; ended completely when the block ends.

    Args:
        settings: Everything tunable.
        announce: Called once requests are answered, with what a first start must tell.
        worker_descriptors: Soft limit on open files of workers; None means this process's own.

    Raises:
        SettingsError: The port is in use, or the installation's secret or certificate cannot be used.
        DataFolderError: The data folder is in use or not writable.
        StoreError: The database that is set cannot be used.
    """
    store = await open_store(settings.home, url=settings.store.url, synchronous=settings.store.synchronous)
    try:
        secret = installation_secret(settings)
        listening = listen(settings)
    except BaseException:
        await store.close()
        raise
    installation = Installation(settings, store, listening, secret, worker_descriptors)
    server = Server(server_config(installation.app), listening.secured)
    fronts = roads.fronts(installation, listening.fronts, server.adopt) if listening.fronts else None
    serving: asyncio.Task[None] | None = None
    memory = Endless(keep_in_huge_pages, "huge pages")
    server_file = settings.home / SERVER_FILE
    try:
        first = await installation.start()
        serving = asyncio.create_task(server.serve(sockets=[listening.plain]), name="server")
        answering = asyncio.create_task(server.answering.wait(), name="server-answering")
        await asyncio.wait({serving, answering}, return_when=asyncio.FIRST_COMPLETED)
        answering.cancel()
        if serving.done():
            serving.result()
        if fronts is not None:
            await fronts.start()
        write_private(server_file, json.dumps({"url": listening.local_url, "pid": os.getpid()}))
        calm_collector()
        share_interpreter()
        if settings.server.huge_pages:
            memory.start()
        announce(installation, first)
        yield installation
    finally:
        began_s = time.monotonic()
        await _attempt("huge pages", memory.stop())
        await installation.stop()
        server.should_exit = True
        ending: list[Awaitable[None]] = [] if serving is None else [serving]
        if fronts is not None:
            # They go on with what is under way for as long as the whole end may take.
            left_s = settings.server.shutdown_s + began_s - time.monotonic()
            ending.append(fronts.stop(max(_LEAST_S, left_s)))
        await asyncio.gather(*ending)
        listening.close()
        await installation.close()
        server_file.unlink(missing_ok=True)
