"""The owner of all living workers: starts, follows, drains, ends and accounts for them.

The only writer of a worker's state. The autoscaler asks it to start and drain, the gateway's protocol
routes tell it what worker programs report, the cluster tells it when a process has ended. It tells the
gateway through `WorkerListener` what may be done with a worker.

    start ──► STARTING ──registered or first take──► READY ──drain──► DRAINING ──no slot in use──► STOPPING
                 │ failed, silent too long, exit        │ exit            │                            │
                 ▼                                      ▼                 └────────── exit ────────────┤
               FAILED                                 FAILED                                        STOPPED
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from pilotlight.core.lifecycle import check_worker_transition
from pilotlight.core.placement import HostResources, NotPlaced, Reservation, Resources, decide_placement
from pilotlight.core.supervision import CRASH_WINDOW_MS, BackoffSettings, decide_retry_at
from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.domain.ids import short_id
from pilotlight.domain.key import hash_secret
from pilotlight.domain.usage import StartRecord
from pilotlight.domain.worker import Failure, Registration, Stage, Worker, WorkerState
from pilotlight.errors import ClusterError, NotFoundError, StoreError
from pilotlight.loops.account import UsageAccount
from pilotlight.ports.clock import Clock
from pilotlight.ports.cluster import Cluster, WorkerExit, WorkerSpec
from pilotlight.ports.fleet import Health, StageReport, WorkerListener
from pilotlight.ports.store import StartLog, UsageStore, WorkerStore
from pilotlight.settings import WorkerSettings

_log = structlog.get_logger()

_OPEN_STATES = frozenset({WorkerState.STARTING, WorkerState.READY})


class FleetStore(WorkerStore, UsageStore, StartLog, Protocol):
    """What the fleet remembers."""


@dataclass(slots=True)
class _Live:
    """A living worker and what only its owner knows of it."""

    worker: Worker
    endpoint: Endpoint
    registration: Registration | None = None
    asked: int = 0
    capacity: int = 0
    stages: list[tuple[str, int]] = field(default_factory=list)
    metered_ms: int = 0
    usage_sequence: int = 0
    deadline: asyncio.TimerHandle | None = None
    wanted_end: str | None = None
    failure: Failure | None = None


@dataclass(slots=True)
class _Record:
    """Recent failures of one endpoint."""

    start_failures: int = 0
    crashes_ms: list[int] = field(default_factory=list)
    failure: Failure | None = None
    last_ms: int = 0
    throttled: str | None = None


class WorkerFleet:
    """Implements the port `Fleet`.

    Args:
        store: Remembers workers, usage, starts.
        cluster: Runs them.
        listener: Told what may be done with a worker.
        clock: Time.
        settings: Deadlines and pauses.
        entropy: Random bytes for ids and credentials.
        environment: Environment for a worker: (endpoint, worker id, credential) → variables.
        command: Our own worker program, for endpoints without a command of theirs.
        host: Reads what the machine has.
        last_line: Gives the last line that an ended worker wrote, "" for none: a program that is not ours
            tells the reason of its end nowhere else.
        on_change: Called with an endpoint id when a decision about it may come out differently now.
    """

    def __init__(
        self,
        *,
        store: FleetStore,
        cluster: Cluster,
        listener: WorkerListener,
        clock: Clock,
        settings: WorkerSettings,
        entropy: Callable[[int], bytes],
        environment: Callable[[Endpoint, str, str], Mapping[str, str]],
        command: Sequence[str],
        host: Callable[[], HostResources],
        last_line: Callable[[str], Awaitable[str]] | None = None,
        on_change: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._listener = listener
        self._clock = clock
        self._settings = settings
        self._entropy = entropy
        self._environment = environment
        self._command = command
        self._host = host
        self._last_line = last_line
        self.on_change = on_change
        self._live: dict[str, _Live] = {}
        self._records: dict[str, _Record] = {}
        self._account = UsageAccount(store)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    # What others ask.

    def worker(self, worker_id: str) -> Worker | None:
        """One living worker; None when unknown or ended."""
        live = self._live.get(worker_id)
        return None if live is None else live.worker

    def workers(self, endpoint_id: str) -> Sequence[Worker]:
        """The endpoint's living workers, oldest first."""
        return [live.worker for live in self._live.values() if live.worker.endpoint_id == endpoint_id]

    def capacity(self, worker_id: str) -> int:
        """Slots of a worker; 0 before it is ready."""
        live = self._live.get(worker_id)
        return 0 if live is None else live.capacity

    def authenticate(self, endpoint_id: str, worker_id: str, secret: str) -> Worker | None:
        """The living worker whose credential this is; None when anything does not match."""
        live = self._live.get(worker_id)
        if live is None or live.worker.endpoint_id != endpoint_id:
            return None
        return live.worker if hmac.compare_digest(live.worker.key_hash, hash_secret(secret)) else None

    def stages(self, worker_id: str) -> Sequence[tuple[str, int]]:
        """Steps of a living worker's start so far, each with its moment in ms; empty when unknown."""
        live = self._live.get(worker_id)
        return tuple(live.stages) if live is not None else ()

    def health(self, endpoint_id: str) -> Health:
        """The endpoint's recent starts, and until when no worker is started."""
        record = self._records.get(endpoint_id)
        if record is None:
            return Health()
        since = self._clock.now_ms() - CRASH_WINDOW_MS
        return Health(
            failures=record.start_failures or sum(moment > since for moment in record.crashes_ms),
            failure=record.failure,
            retry_ms=decide_retry_at(
                record.start_failures,
                record.crashes_ms,
                record.last_ms,
                BackoffSettings(
                    start_failures_max=self._settings.start_failures_max,
                    backoff_ms=self._settings.backoff_s * 1000,
                    backoff_max_ms=self._settings.backoff_max_s * 1000,
                ),
            ),
            throttled=record.throttled,
        )

    def forgive(self, endpoint_id: str) -> None:
        """Forget an endpoint's failures: it was revised or deleted."""
        self._records.pop(endpoint_id, None)

    # Starting.

    async def start(
        self, endpoint: Endpoint, *, worker_id: str | None = None, usage_sequence: int = 0
    ) -> Worker:
        """Start one worker of the endpoint's current revision.

        Args:
            endpoint: Whose.
            worker_id: The id of a worker that has ended, to be used again; None makes a new one.
            usage_sequence: The number of the last usage interval of that worker.

        Raises:
            ClusterError: No room for it, or its process could not be spawned.
        """
        if self._closing:
            raise ClusterError("the gateway is stopping")
        now = self._clock.now_ms()
        devices = self._place(endpoint)
        worker_id = worker_id or short_id(self._entropy(14))
        secret = short_id(self._entropy(40), 40)
        worker = Worker(
            id=worker_id,
            endpoint_id=endpoint.id,
            version=endpoint.revision.version,
            key_hash=hash_secret(secret),
            devices=devices,
            memory_bytes=self._need(endpoint).memory_bytes,
            created_ms=now,
            state_ms=now,
        )
        live = _Live(
            worker=worker,
            endpoint=endpoint,
            stages=[("decision", now)],
            metered_ms=now,
            usage_sequence=usage_sequence,
        )
        self._live[worker_id] = live
        # On disk before there is a process, so that a later life of ours looks for it.
        try:
            await self._store.put_worker(worker)
            process = await self._cluster.start(
                WorkerSpec(
                    worker_id=worker_id,
                    endpoint_id=endpoint.id,
                    env=self._environment(endpoint, worker_id, secret),
                    command=endpoint.revision.command or self._command,
                    devices=devices,
                    private_folders=endpoint.kind is not EndpointKind.VLLM,
                ),
                self._exited,
            )
        except BaseException as error:
            self._live.pop(worker_id, None)
            failure = Failure(kind="spawn_failed", cause=str(error) or repr(error))
            # No process of it ever ran, so its life has no length and nothing to account for.
            ended = worker.created_ms
            gone = replace(worker, state=WorkerState.FAILED, failure=failure, state_ms=ended, ended_ms=ended)
            if not isinstance(error, StoreError):
                self._note_failure(endpoint.id, failure, started=False)
                await self._put(gone)
            raise
        self._note(live, "spawned")
        live.worker = replace(live.worker, process=process)
        self._watch_start(live)
        self._listener.spawned(live.worker, endpoint)
        if live.worker.state is not WorkerState.STARTING:
            # Told to end while it was being spawned; the grace that began then goes on.
            await self._cluster.terminate(worker_id)
        await self._put(live.worker)
        _log.info("worker_started", endpoint=endpoint.id, worker=worker_id, pid=process.pid, devices=devices)
        return live.worker

    async def resume(self, endpoint: Endpoint, worker_id: str) -> Worker:
        """Start a worker that was scaled down once more, under its own id; see the port."""
        living = self._live.get(worker_id)
        if living is not None:
            return living.worker
        known = await self._store.workers(endpoint_id=endpoint.id, living=False)
        past = next((worker for worker in known if worker.id == worker_id), None)
        if past is None or past.state is not WorkerState.STOPPED:
            raise NotFoundError(f"endpoint {endpoint.id} has no worker {worker_id} that could be resumed")
        if worker_id in self._live:
            return self._live[worker_id].worker
        usage = await self._store.usage(worker_id=worker_id)
        sequence = max((interval.sequence for interval in usage), default=0)
        return await self.start(endpoint, worker_id=worker_id, usage_sequence=sequence)

    def _need(self, endpoint: Endpoint) -> Resources:
        return Resources(
            gpu_count=endpoint.revision.gpu_count,
            memory_bytes=endpoint.revision.memory_bytes or self._settings.memory_default_bytes,
        )

    def _place(self, endpoint: Endpoint) -> tuple[int, ...]:
        taken = [
            Reservation(
                devices=live.worker.devices,
                memory_bytes=live.worker.memory_bytes,
                starting=live.worker.state is WorkerState.STARTING,
            )
            for live in self._live.values()
        ]
        placement = decide_placement(
            self._need(endpoint),
            self._host(),
            taken,
            memory_reserve_bytes=self._settings.memory_reserve_bytes,
        )
        record = self._records.setdefault(endpoint.id, _Record())
        if isinstance(placement, NotPlaced):
            record.throttled = placement.message
            raise ClusterError(placement.message)
        record.throttled = None
        return placement.devices

    def _watch_start(self, live: _Live) -> None:
        """Restart the deadline of a start; every stage report is a sign of life.

        Deadlines of other states are somebody else's: a report must not lengthen the grace of a worker
        that was told to end. How long a load-balancing worker may take is seen by its health checks.
        """
        by_checks = live.endpoint.kind is EndpointKind.LOAD_BALANCER
        if live.worker.state is WorkerState.STARTING and not by_checks:
            self._set_deadline(live, self._settings.start_timeout_s, self._start_timed_out)

    def _set_deadline(self, live: _Live, delay_s: float, action: Callable[[_Live], None] | None) -> None:
        """Replace the worker's deadline; None for no deadline."""
        if live.deadline is not None:
            live.deadline.cancel()
        live.deadline = (
            None if action is None else asyncio.get_running_loop().call_later(delay_s, action, live)
        )

    def _start_timed_out(self, live: _Live) -> None:
        cause = f"no progress for {self._settings.start_timeout_s} s in stage {live.worker.stage}"
        live.failure = Failure(
            kind="timeout", cause=cause, advice="see `pilotlight logs`; raise workers.start_timeout_s"
        )
        self._spawn(self.kill(live.worker.id, reason=cause), f"kill-{live.worker.id}")

    # What worker programs report.

    async def reported(self, worker_id: str, report: StageReport) -> None:
        """Take a stage report of a living worker; reports after its end are ignored."""
        live = self._live.get(worker_id)
        if live is None:
            return
        self._note(live, report.stage)
        live.worker = replace(live.worker, stage=report.stage)
        if report.failure is not None:
            live.failure = report.failure
        if report.registration is not None:
            live.registration = report.registration
        self._watch_start(live)
        if report.stage is Stage.READY:
            self._open(live, report.registration.max_concurrency if report.registration else 1)
        elif report.stage in {Stage.UNHEALTHY, Stage.INITIALIZING}:
            self._listener.withdrawn(live.worker)
        elif report.stage is Stage.FAILED:
            # Its engine is gone and it is about to end: nobody may be sent there any more.
            self._listener.closed(live.worker)
            self._set_deadline(live, self._settings.stop_grace_s, self._grace_over)
        elif report.stage is Stage.DRAINING:
            await self.drain(worker_id, reason="the worker was told to stop")
            self._listener.closed(live.worker)
        await self._put(live.worker)
        self.on_change(live.worker.endpoint_id)

    async def took(self, worker_id: str, *, slots: int) -> None:
        """Note a take; the first makes the worker ready for jobs (worker-protocol.md §6.1)."""
        live = self._live.get(worker_id)
        if live is None or live.worker.state not in {WorkerState.STARTING, WorkerState.READY}:
            return
        if live.worker.state is WorkerState.READY:
            # A worker that registered nothing shows with its takes how many slots it has, and may change it.
            if live.registration is None and slots != live.asked:
                self._open(live, slots)
            return
        live.worker = replace(live.worker, stage=Stage.READY)
        self._open(live, slots)
        await self._put(live.worker)
        self.on_change(live.worker.endpoint_id)

    def _open(self, live: _Live, slots: int) -> None:
        if live.worker.state is WorkerState.STARTING:
            self._note(live, "ready")
            self._change(live, WorkerState.READY)
            live.worker = replace(live.worker, ready_ms=live.worker.state_ms)
            self._set_deadline(live, 0, None)
            record = self._records.setdefault(live.worker.endpoint_id, _Record())
            record.start_failures, record.failure = 0, None
            self._spawn(self._store.put_start(self._start_record(live, "ready")), "put-start")
        if live.worker.state is WorkerState.READY:
            live.asked = slots
            live.capacity = max(1, min(slots, live.endpoint.concurrency))
            self._listener.opened(live.worker, live.registration, live.capacity)

    def resize(self, endpoint: Endpoint) -> None:
        """Apply an endpoint's changed concurrency to its living workers."""
        for live in self._live.values():
            if live.worker.endpoint_id != endpoint.id:
                continue
            live.endpoint = replace(endpoint, revision=live.endpoint.revision)
            # One that is out of rotation comes back when it is healthy, and then with the new bound.
            if live.worker.state is WorkerState.READY and live.worker.stage is Stage.READY and live.asked:
                self._open(live, live.asked)

    # Ending.

    async def drain(self, worker_id: str, *, reason: str) -> None:
        """Hand out nothing more to the worker and let it finish and end; idempotent."""
        live = self._live.get(worker_id)
        if live is None or live.worker.state not in _OPEN_STATES:
            return
        live.wanted_end = reason
        self._change(live, WorkerState.DRAINING)
        bound_s = min(live.endpoint.execution_timeout_ms / 1000, self._settings.drain_max_s)
        self._set_deadline(live, bound_s, self._grace_over)
        self._listener.withdrawn(live.worker)
        _log.info("worker_draining", endpoint=live.worker.endpoint_id, worker=worker_id, reason=reason)
        await self._put(live.worker)
        await self._stop_if_free(live)

    def slots_idle(self, endpoint_id: str) -> None:
        """A worker of the endpoint has no slot in use any more: a draining one may go now."""
        for live in list(self._live.values()):
            if live.worker.endpoint_id == endpoint_id and live.worker.state is WorkerState.DRAINING:
                self._spawn(self._stop_if_free(live), f"stop-{live.worker.id}")

    async def _stop_if_free(self, live: _Live) -> None:
        if live.worker.state is not WorkerState.DRAINING or self._listener.occupied(live.worker.id):
            return
        self._change(live, WorkerState.STOPPING)
        self._set_deadline(live, self._settings.stop_grace_s, self._grace_over)
        # The signal before the answers to its open polls: one that has not been told would open new ones,
        # and its end would have to wait for those (worker-protocol.md §6.3).
        await self._cluster.terminate(live.worker.id)
        self._listener.closed(live.worker)
        await self._put(live.worker)

    def _grace_over(self, live: _Live) -> None:
        self._spawn(self.kill(live.worker.id, reason="did not end in time"), f"kill-{live.worker.id}")

    async def kill(self, worker_id: str, *, reason: str) -> None:
        """End the worker at once; returns when it is gone; idempotent."""
        live = self._live.get(worker_id)
        if live is None:
            return
        live.wanted_end = live.wanted_end or (reason if live.failure is None else None)
        _log.info("worker_killed", endpoint=live.worker.endpoint_id, worker=worker_id, reason=reason)
        self._listener.closed(live.worker)
        await self._cluster.kill(worker_id)

    async def dismiss(self, *, reason: str) -> None:
        """End all workers at once, but not the fleet; returns when they are gone."""
        await asyncio.gather(*(self.kill(worker_id, reason=reason) for worker_id in list(self._live)))

    def _exited(self, gone: WorkerExit) -> None:
        live = self._live.pop(gone.worker_id, None)
        if live is not None:
            self._spawn(self._ended(live, gone.code), f"ended-{gone.worker_id}")

    async def _ended(self, live: _Live, code: int | None) -> None:
        worker = live.worker
        self._set_deadline(live, 0, None)
        was_ready = worker.ready_ms is not None
        if live.wanted_end is None and live.failure is None:
            live.failure = await self._exit_failure(live, code)
        failed = live.failure if live.wanted_end is None else None
        if worker.state in {WorkerState.READY, WorkerState.STARTING} and failed is None:
            # Killed on purpose: there was no time for the states between.
            self._change(live, WorkerState.STOPPING)
        self._change(live, WorkerState.FAILED if failed else WorkerState.STOPPED)
        live.worker = replace(live.worker, failure=failed, ended_ms=live.worker.state_ms)
        reason = failed.cause if failed else live.wanted_end or "ended"
        _log.info(
            "worker_ended", endpoint=worker.endpoint_id, worker=worker.id, code=code, reason=reason,
            failure=failed.kind if failed else None,
        )  # fmt: skip
        if failed is not None:
            self._note_failure(worker.endpoint_id, failed, started=was_ready)
        try:
            await self._listener.ended(live.worker, reason)
            await self._put(live.worker)
            if not was_ready:
                await self._store.put_start(self._start_record(live, "failed" if failed else "stopped"))
        finally:
            self.on_change(worker.endpoint_id)

    async def _exit_failure(self, live: _Live, code: int | None) -> Failure:
        how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        cause = f"worker ended with {how} in stage {live.worker.stage}"
        if live.endpoint.kind is EndpointKind.VLLM or self._last_line is None:
            return Failure(kind="exited", cause=cause)
        line = await self._last_line(live.worker.id)
        return Failure(
            kind="exited",
            cause=f"{cause}: {line}" if line else f"{cause}, without a word",
            advice=f"see `pilotlight logs {live.endpoint.name}`",
        )

    def _note_failure(self, endpoint_id: str, failure: Failure, *, started: bool) -> None:
        record = self._records.setdefault(endpoint_id, _Record())
        record.failure = failure
        record.last_ms = self._clock.now_ms()
        if started:
            record.crashes_ms = [*record.crashes_ms[-99:], record.last_ms]
        else:
            record.start_failures += 1

    # Accounting.

    def _change(self, live: _Live, state: WorkerState) -> None:
        """The one place where a worker's state changes; closes the usage interval of the old one."""
        check_worker_transition(live.worker.state, state)
        now = self._clock.now_ms()
        self._close_interval(live, now)
        live.worker = replace(live.worker, state=state, state_ms=now)

    def _close_interval(self, live: _Live, now_ms: int) -> None:
        if now_ms <= live.metered_ms:
            return
        live.usage_sequence += 1
        self._account.close_interval(live.worker, live.usage_sequence, live.metered_ms, now_ms)
        live.metered_ms = now_ms
        self._spawn(self._account.flush(), "write-usage")

    def meter(self) -> None:
        """Close the running interval of every living worker, so that a crash loses little of the account."""
        now = self._clock.now_ms()
        for live in self._live.values():
            self._close_interval(live, now)
        self._spawn(self._account.flush(), "write-usage")

    async def _put(self, worker: Worker) -> None:
        """Record a worker. What must happen to it happens also while the store cannot write."""
        try:
            await self._store.put_worker(worker)
        except StoreError as error:
            _log.warning("worker_not_recorded", worker=worker.id, state=worker.state, error=str(error))

    def _note(self, live: _Live, stage: str) -> None:
        if all(name != stage for name, _ in live.stages):
            live.stages.append((stage, self._clock.now_ms()))

    def _start_record(self, live: _Live, outcome: str) -> StartRecord:
        return StartRecord(
            worker_id=live.worker.id,
            endpoint_id=live.worker.endpoint_id,
            version=live.worker.version,
            rung="cold",
            stages=tuple(live.stages),
            outcome=outcome,
        )

    # Life of the fleet itself.

    async def recover(self) -> int:
        """End what an earlier life of ours left behind; returns how many workers still ran."""
        left = {worker.id: worker for worker in await self._store.workers()}
        swept = set(await self._cluster.sweep({worker.id: worker.process for worker in left.values()}))
        now = self._clock.now_ms()
        for worker in left.values():
            known = await self._store.usage(worker_id=worker.id)
            # A resumed worker has intervals of its earlier life, before it was made anew.
            since = max((interval.end_ms for interval in known), default=0)
            since = max(since, worker.created_ms)
            # One that had ended by itself meanwhile is charged only for what is known of its life.
            until = now if worker.id in swept else max(since, min(now, worker.state_ms))
            ended = replace(
                worker,
                state=WorkerState.FAILED,
                failure=Failure(kind="orphaned", cause="the gateway ended without stopping this worker"),
                ended_ms=until,
                state_ms=until,
            )
            if until > since:
                sequence = max((interval.sequence for interval in known), default=0) + 1
                self._account.close_interval(worker, sequence, since, until)
            await self._put(ended)
        await self._account.flush()
        return len(swept)

    async def close(self) -> None:
        """End all workers; returns when no process is left and everything is recorded."""
        self._closing = True
        try:
            for worker_id, live in list(self._live.items()):
                live.wanted_end = live.wanted_end or "gateway stopped"
                await self.drain(worker_id, reason="gateway stopped")
                # There is no time to wait for jobs in hand: whoever can, finishes within the cluster's grace.
                await self._cluster.terminate(worker_id)
                self._listener.closed(live.worker)
        finally:
            await self._cluster.close()
            while self._tasks:
                await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._account.flush()

    def _spawn(self, work: object, name: str) -> None:
        assert asyncio.iscoroutine(work)
        task = asyncio.create_task(_logged(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _logged(work: object, name: str) -> None:
    assert asyncio.iscoroutine(work)
    try:
        await work
    except Exception:  # noqa: BLE001 - the end of a task: nobody above could know
        _log.exception("background_work_failed", work=name)
