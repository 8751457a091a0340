"""The owner of all living workers: starts, follows, drains, ends and accounts for them.

The only writer of a worker's state. The autoscaler asks it to start and drain, the gateway's protocol
routes tell it what worker programs report, the cluster tells it when a process has ended. It tells the
gateway through `WorkerListener` what may be done with a worker.

    start ──► STARTING ──registered or first take──► READY ──drain──► DRAINING ──no slot in use──► STOPPING
                 │ failed, silent too long, exit        │ exit            │                            │
                 ▼                                      ▼                 └────────── exit ────────────┤
               FAILED                                 FAILED                                        STOPPED

From READY a worker may also become FROZEN and come back, or go from there to STOPPING (`loops.freezing`).
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import structlog

from pilotlight.core.freezing import FrozenView
from pilotlight.core.lifecycle import check_worker_transition
from pilotlight.core.placement import HostResources, NotPlaced, Resources
from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.domain.ids import short_id
from pilotlight.domain.key import hash_secret
from pilotlight.domain.usage import StartRecord
from pilotlight.domain.worker import Failure, ProcessIdentity, Stage, Worker, WorkerState
from pilotlight.errors import ClusterError, StoreError
from pilotlight.loops.account import UsageAccount
from pilotlight.loops.failures import FailureLog, explain_exit
from pilotlight.loops.freezing import Freezing, Owner
from pilotlight.loops.leftovers import end_leftovers
from pilotlight.loops.living import Living
from pilotlight.loops.needs import resources_of, worker_spec
from pilotlight.loops.placing import Place, find_place, frozen_views
from pilotlight.loops.records import Records
from pilotlight.loops.resuming import Resuming
from pilotlight.loops.tasks import Tasks
from pilotlight.ports.clock import Clock
from pilotlight.ports.cluster import Cluster, WorkerExit
from pilotlight.ports.door import WorkerDoor
from pilotlight.ports.fleet import Health, StageReport, WorkerListener
from pilotlight.ports.store import StartLog, UsageStore, WorkerStore
from pilotlight.settings import WorkerSettings

_log = structlog.get_logger()

_OPEN_STATES = frozenset({WorkerState.STARTING, WorkerState.READY})

_GONE_S = 15.0
"""How long the end of a frozen worker is waited for: one that cannot be ended holds up nothing else."""


class FleetStore(WorkerStore, UsageStore, StartLog, Protocol):
    """What the fleet remembers."""


class WorkerFleet:
    """Implements the port `Fleet`.

    Args:
        store: Remembers workers, usage, starts.
        cluster: Runs them.
        door: Asks them to freeze and thaw their engines.
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
        on_start: Called with a start that has succeeded.
        on_frozen: Called when one more worker is frozen.
    """

    def __init__(
        self,
        *,
        store: FleetStore,
        cluster: Cluster,
        door: WorkerDoor,
        listener: WorkerListener,
        clock: Clock,
        settings: WorkerSettings,
        entropy: Callable[[int], bytes],
        environment: Callable[[Endpoint, str, str], Mapping[str, str]],
        command: Sequence[str],
        host: Callable[[], HostResources],
        last_line: Callable[[str], Awaitable[str]] | None = None,
        on_change: Callable[[str], None] = lambda _: None,
        on_start: Callable[[StartRecord], None] = lambda _: None,
        on_frozen: Callable[[], None] = lambda: None,
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
        self.on_start = on_start
        self.on_frozen = on_frozen
        self._live: dict[str, Living] = {}
        self._failures = FailureLog(clock, settings)
        self._account = UsageAccount(store)
        self._records = Records(store)
        self._tasks = Tasks()
        # Workers whose process is gone and whose end is still being recorded.
        self._ending: dict[str, asyncio.Task[object]] = {}
        self._refusal: str | None = None
        self._closing = False
        self._resuming = Resuming(self, store, self._account, clock)
        self._freezing = Freezing(
            Owner(
                change=self._change,
                reopen=lambda live: self._open(live, live.asked),
                started=self._started,
                record=lambda live: self._tasks.spawn(self._records.put_current(live), "put-worker"),
                put_start=self._records.put_start,
                end=self._end,
            ),
            self._live.values,
            door=door,
            cluster=cluster,
            listener=listener,
            clock=clock,
            settings=settings,
        )

    # What others ask.

    def worker(self, worker_id: str) -> Worker | None:
        """One living worker; None when unknown or ended."""
        live = self._live.get(worker_id)
        return None if live is None else live.worker

    def workers(self, endpoint_id: str | None = None) -> Sequence[Worker]:
        """Living workers, of one endpoint or of all, oldest first."""
        return [live.worker for live in self._live.values() if endpoint_id in {None, live.worker.endpoint_id}]

    def capacity(self, worker_id: str) -> int:
        """Slots of a worker; 0 before it is ready."""
        live = self._live.get(worker_id)
        return 0 if live is None else live.capacity

    def authenticate(self, endpoint_id: str, worker_id: str, secret_hash: str) -> Worker | None:
        """The living worker whose credential this is; None when anything does not match."""
        live = self._live.get(worker_id)
        if live is None or live.worker.endpoint_id != endpoint_id:
            return None
        return live.worker if hmac.compare_digest(live.worker.key_hash, secret_hash) else None

    def stages(self, worker_id: str) -> Sequence[tuple[str, int]]:
        """Steps of a living worker's start so far, each with its moment in ms; empty when unknown."""
        live = self._live.get(worker_id)
        return tuple(live.stages) if live is not None else ()

    def health(self, endpoint_id: str) -> Health:
        """The endpoint's recent starts, and until when no worker is started."""
        return self._failures.health(endpoint_id)

    def forgive(self, endpoint_id: str) -> None:
        """Forget an endpoint's failures: it was revised or deleted."""
        self._failures.forgive(endpoint_id)

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
            ClusterError: No room for it, its process could not be spawned, or it was told to end before.
        """
        if self._refusal is not None:
            raise ClusterError(self._refusal)
        if worker_id in self._live:
            raise ClusterError(f"worker {worker_id} lives already")
        now = self._clock.now_ms()
        need = resources_of(endpoint, memory_default_bytes=self._settings.memory_default_bytes)
        place = self._place(endpoint, need)
        placed = self._clock.now_ms()
        worker_id = worker_id or short_id(self._entropy(14))
        secret = short_id(self._entropy(40), 40)
        worker = Worker(
            id=worker_id,
            endpoint_id=endpoint.id,
            version=endpoint.revision.version,
            key_hash=hash_secret(secret),
            devices=place.devices,
            memory_bytes=need.memory_bytes,
            created_ms=now,
            state_ms=now,
        )
        live = Living(
            worker=worker,
            endpoint=endpoint,
            stages=[("decision", now), ("placement", placed)],
            metered_ms=now,
            usage_sequence=usage_sequence,
        )
        self._live[worker_id] = live
        reason = f"its room is needed for worker {worker_id}"
        evicted = [self._end(self._live[each], reason) for each in place.evict]
        try:
            process = await self._run(live, secret, evicted)
        except BaseException as error:
            if self._live.get(worker_id) is live:
                del self._live[worker_id]
            noted = self._not_started(live, error)
            if isinstance(error, asyncio.CancelledError):
                self._tasks.spawn(noted, f"not-started-{worker_id}")
            else:
                await noted
            raise
        live.note("spawned", self._clock.now_ms())
        live.worker = replace(live.worker, process=process)
        self._watch_start(live)
        self._listener.spawned(live.worker, endpoint)
        if live.worker.state is not WorkerState.STARTING:
            # Told to end while it was being spawned; the grace that began then goes on.
            await self._cluster.terminate(worker_id)
        await self._records.put(live.worker)
        pid = None if process is None else process.pid
        _log.info("worker_started", endpoint=endpoint.id, worker=worker_id, pid=pid, devices=place.devices)
        return live.worker

    async def _run(
        self, live: Living, secret: str, evicted: Collection[asyncio.Task[None]]
    ) -> ProcessIdentity | None:
        """Record the worker and spawn its process, unless it is told to end meanwhile."""
        worker, endpoint = live.worker, live.endpoint
        # On disk before there is a process, so that a later life of ours looks for it.
        await self._store.put_worker(worker)
        if evicted:
            await asyncio.wait(evicted, timeout=_GONE_S)
        if live.killed or self._refusal is not None:
            raise ClusterError(self._refusal or f"worker {worker.id} was told to end before it had started")
        env = self._environment(endpoint, worker.id, secret)
        spec = worker_spec(worker, endpoint, env=env, program=self._command)
        process = await self._cluster.start(spec, self._exited)
        if live.killed:
            self._grace_over(live)
        return process

    async def _not_started(self, live: Living, error: BaseException) -> None:
        """Record a worker without a process; only what is the worker's fault counts as a failed start."""
        if isinstance(error, StoreError):
            return
        # No process of it ever ran, so its life has no length and nothing to account for.
        ended = live.worker.created_ms
        gone = replace(live.worker, state=WorkerState.STOPPED, state_ms=ended, ended_ms=ended)
        unwanted = isinstance(error, asyncio.CancelledError) or live.killed or self._refusal is not None
        if not unwanted:
            failure = Failure(kind="spawn_failed", cause=str(error) or repr(error))
            self._failures.note(live.worker.endpoint_id, failure, started=False)
            gone = replace(gone, state=WorkerState.FAILED, failure=failure)
            live.failure = failure
            await self._records.put_start(live.finish_start("failed", self._clock.now_ms()))
        await self._records.put(gone)

    async def resume(self, endpoint: Endpoint, worker_id: str) -> Worker:
        """Start a worker that was scaled down once more, under its own id; see the port."""
        return await self._resuming.resume(endpoint, worker_id)

    async def recorded(self, worker_id: str) -> None:
        """Return when the end of a worker whose process is gone is on record."""
        if (ending := self._ending.get(worker_id)) is not None:
            await asyncio.wait({ending})

    def _place(self, endpoint: Endpoint, need: Resources) -> Place:
        reserve = self._settings.memory_reserve_bytes
        place = find_place(need, self._host(), self._live.values(), memory_reserve_bytes=reserve)
        self._failures.throttle(endpoint.id, place.message if isinstance(place, NotPlaced) else None)
        if isinstance(place, NotPlaced):
            raise ClusterError(place.message)
        return place

    def _watch_start(self, live: Living) -> None:
        """Restart the deadline of a start: it has moved on.

        Deadlines of other states are somebody else's: a report must not lengthen the grace of a worker
        that was told to end. How long a load-balancing worker may take is seen by its health checks.
        """
        by_checks = live.endpoint.kind is EndpointKind.LOAD_BALANCER
        if live.worker.state is WorkerState.STARTING and not by_checks:
            live.set_deadline(self._settings.start_timeout_s, self._start_timed_out)

    def _start_timed_out(self, live: Living) -> None:
        cause = f"no progress for {self._settings.start_timeout_s} s in stage {live.worker.stage}"
        live.failure = Failure(
            kind="timeout", cause=cause, advice="see `pilotlight logs`; raise workers.start_timeout_s"
        )
        self._tasks.spawn(self.kill(live.worker.id, reason=cause), f"kill-{live.worker.id}")

    # What worker programs report.

    async def reported(self, worker_id: str, report: StageReport) -> None:
        """Take a stage report of a living worker; reports after its end are ignored."""
        live = self._live.get(worker_id)
        if live is None:
            return
        live.take(report, self._clock.now_ms())
        goes_on = report.stage is live.worker.stage is Stage.DOWNLOADING
        known = live.worker.progress if goes_on else None
        progress = report.progress or known
        # One that stands still says so again and again, and so does one that waits for another's download.
        moved = report.stage is not live.worker.stage or progress != known
        live.worker = replace(live.worker, stage=report.stage, progress=progress)
        if report.failure is not None:
            live.failure = report.failure
        if report.registration is not None:
            live.registration = report.registration
        if moved:
            self._watch_start(live)
        if goes_on:
            # It comes every second, and nobody decides anything of it.
            return
        if report.stage is Stage.READY:
            if "thawed_by" in report.detail:
                self._freezing.woke(live)
            self._open(live, report.registration.max_concurrency if report.registration else live.asked or 1)
        elif report.stage in {Stage.UNHEALTHY, Stage.INITIALIZING}:
            self._listener.withdrawn(live.worker)
        elif report.stage is Stage.FAILED:
            # Its engine is gone and it is about to end: nobody may be sent there any more.
            self._leave_frozen(live)
            self._listener.closed(live.worker)
            live.set_deadline(self._settings.stop_grace_s, self._grace_over)
        elif report.stage is Stage.DRAINING:
            await self.drain(worker_id, reason="the worker was told to stop")
            self._listener.closed(live.worker)
        await self._records.put(live.worker)
        self.on_change(live.worker.endpoint_id)

    def answered(self, worker_id: str, arrival_ms: int, first_token_ms: int) -> None:
        """Note when a request of a worker arrived and its answer began, which may end a recorded start."""
        live = self._live.get(worker_id)
        if live is not None and (start := live.first_token(arrival_ms, first_token_ms)) is not None:
            self._tasks.spawn(self._records.put_start(start), "put-start")

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
        await self._records.put(live.worker)
        self.on_change(live.worker.endpoint_id)

    def _open(self, live: Living, slots: int) -> None:
        if live.worker.state is WorkerState.STARTING:
            self._change(live, WorkerState.READY)
            live.worker = replace(live.worker, ready_ms=live.worker.state_ms)
            live.set_deadline(0, None)
            self._failures.note_start(live.worker.endpoint_id)
            self._started(live)
        if live.worker.state is WorkerState.READY:
            live.asked = slots
            live.capacity = max(1, min(slots, live.endpoint.concurrency))
            self._listener.opened(live.worker, live.registration, live.capacity)

    def _started(self, live: Living) -> None:
        """A start has succeeded, of whatever kind."""
        start = live.finish_start("ready", live.worker.state_ms)
        # What is still missing will be looked for again, and nothing is while a thaw was enough.
        self._failures.throttle(live.worker.endpoint_id, None)
        self.on_start(start)
        self._tasks.spawn(self._records.put_start(start), "put-start")

    def resize(self, endpoint: Endpoint) -> None:
        """Apply an endpoint's changed concurrency to its living workers."""
        for live in self._live.values():
            if live.worker.endpoint_id != endpoint.id:
                continue
            live.endpoint = replace(endpoint, revision=live.endpoint.revision)
            # One that is out of rotation comes back when it is healthy, and then with the new bound.
            if live.worker.state is WorkerState.READY and live.worker.stage is Stage.READY and live.asked:
                self._open(live, live.asked)

    # Freezing.

    def freezable(self, worker_id: str) -> bool:
        """Whether freezing a worker makes sense: it is ready, well, and of a kind that can be frozen."""
        live = self._live.get(worker_id)
        return live is not None and self._refusal is None and self._freezing.freezable(live)

    async def freeze(self, worker_id: str, *, reason: str) -> bool:
        """Stop a ready worker in place; False when it has work and stays ready, or had to be ended.

        What has begun is brought to its end also when the caller is cancelled; so are thaws.
        """
        live = self._live.get(worker_id)
        if live is None or self._refusal is not None:
            return False
        freeze = self._freezing.freeze(live, reason=reason)
        frozen = bool(await self._tasks.whole(freeze, f"freeze-{worker_id}"))
        if frozen:
            self.on_frozen()
        return frozen

    async def thaw(self, worker_id: str) -> bool:
        """Let a frozen worker go on; see the port."""
        live = self._live.get(worker_id)
        if live is None or self._refusal is not None:
            return False
        thawed = await self._tasks.whole(self._freezing.thaw(live), f"thaw-{worker_id}")
        self.on_change(live.worker.endpoint_id)
        return bool(thawed)

    def frozen(self) -> Sequence[FrozenView]:
        """The workers that are frozen and nobody is waking."""
        return frozen_views(self._live.values())

    async def evict(self, worker_id: str, *, reason: str) -> None:
        """End a frozen worker, unless somebody is waking it; returns when it is gone, or after a while."""
        live = self._live.get(worker_id)
        if live is not None and live.asleep:
            await asyncio.wait({self._end(live, reason)}, timeout=_GONE_S)

    def _end(self, live: Living, reason: str) -> asyncio.Task[None]:
        """End a worker as it is, in the background; from now on it counts as leaving."""
        self._leave_frozen(live)
        return self._tasks.spawn(self.kill(live.worker.id, reason=reason), f"kill-{live.worker.id}")

    def _leave_frozen(self, live: Living) -> None:
        """Nobody shall wake a worker that is going to end."""
        if live.worker.state is WorkerState.FROZEN:
            self._change(live, WorkerState.STOPPING)

    # Ending.

    async def drain(self, worker_id: str, *, reason: str, grace_s: float = 0) -> None:
        """See `Fleet.drain`."""
        live = self._live.get(worker_id)
        if live is not None and live.worker.state is WorkerState.FROZEN:
            # It has nothing in hand, and could not hear that it shall end.
            self._end(live, reason)
        if live is None or live.worker.state not in _OPEN_STATES:
            return
        live.wanted_end, live.grace_s = reason, grace_s
        self._change(live, WorkerState.DRAINING)
        bound_s = min(live.endpoint.execution_timeout_ms / 1000, self._settings.drain_max_s)
        live.set_deadline(bound_s, self._drain_over)
        self._listener.withdrawn(live.worker)
        _log.info("worker_draining", endpoint=live.worker.endpoint_id, worker=worker_id, reason=reason)
        await self._records.put(live.worker)
        await self._stop_if_free(live)

    def slots_idle(self, endpoint_id: str) -> None:
        """A worker of the endpoint has no slot in use any more: a draining one may go now."""
        for live in self._live.values():
            if live.worker.state is WorkerState.DRAINING and live.worker.endpoint_id == endpoint_id:
                self._tasks.spawn(self._stop_if_free(live), f"stop-{live.worker.id}")

    async def _stop_if_free(self, live: Living) -> None:
        if live.worker.state is WorkerState.DRAINING and not self._listener.occupied(live.worker.id):
            await self._stop(live)

    def _drain_over(self, live: Living) -> None:
        """Its time for what it has in hand is over; signalled, it may still finish that (§6.3)."""
        if live.worker.state is WorkerState.DRAINING:
            self._tasks.spawn(self._stop(live), f"stop-{live.worker.id}")

    async def _stop(self, live: Living) -> None:
        if live.worker.state is not WorkerState.DRAINING:
            return
        self._change(live, WorkerState.STOPPING)
        live.set_deadline(max(live.grace_s, self._settings.stop_grace_s), self._grace_over)
        # The signal before the answers to its open polls: one that has not been told would open new ones,
        # and its end would have to wait for those (worker-protocol.md §6.3).
        await self._cluster.terminate(live.worker.id)
        self._listener.closed(live.worker)
        await self._records.put(live.worker)

    def _grace_over(self, live: Living) -> None:
        self._tasks.spawn(self.kill(live.worker.id, reason="did not end in time"), f"kill-{live.worker.id}")

    async def kill(self, worker_id: str, *, reason: str) -> None:
        """End the worker at once; returns when it is gone; idempotent."""
        live = self._live.get(worker_id)
        if live is None:
            return
        live.wanted_end = live.wanted_end or (reason if live.failure is None else None)
        live.killed = True
        self._leave_frozen(live)
        _log.info("worker_killed", endpoint=live.worker.endpoint_id, worker=worker_id, reason=reason)
        self._listener.closed(live.worker)
        await self._cluster.kill(worker_id)

    async def dismiss(self, *, reason: str) -> None:
        """End all workers at once and start none until `recover`; returns when they are gone."""
        self._refusal = self._refusal or reason
        await asyncio.gather(*(self.kill(worker_id, reason=reason) for worker_id in list(self._live)))

    def _exited(self, gone: WorkerExit) -> None:
        live = self._live.pop(gone.worker_id, None)
        if live is not None:
            live.failure = live.failure or gone.failure
            ending = self._tasks.spawn(self._ended(live, gone.code), f"ended-{gone.worker_id}")
            self._ending[gone.worker_id] = ending
            ending.add_done_callback(lambda _: self._ending.pop(gone.worker_id))

    async def _ended(self, live: Living, code: int | None) -> None:
        worker = live.worker
        live.set_deadline(0, None)
        was_ready = worker.ready_ms is not None
        was_frozen = live.frozen is not None or worker.state is WorkerState.FROZEN
        if live.wanted_end is None and live.failure is None:
            live.failure = await explain_exit(live, code, self._last_line)
        failed = live.failure if live.wanted_end is None else None
        if worker.state not in {WorkerState.DRAINING, WorkerState.STOPPING} and failed is None:
            # Killed on purpose: there was no time for the states between.
            self._change(live, WorkerState.STOPPING)
        self._change(live, WorkerState.FAILED if failed else WorkerState.STOPPED)
        live.worker = replace(live.worker, failure=failed, ended_ms=live.worker.state_ms)
        reason = failed.sentence if failed else live.wanted_end or "ended"
        _log.info(
            "worker_ended", endpoint=worker.endpoint_id, worker=worker.id, code=code, reason=reason,
            failure=failed.kind if failed else None,
        )  # fmt: skip
        # What becomes of a frozen worker costs a slower start, and says nothing about the next one.
        if failed is not None and not was_frozen:
            self._failures.note(worker.endpoint_id, failed, started=was_ready)
        try:
            await self._listener.ended(live.worker, reason)
            await self._records.put_current(live)
            if not live.start_outcome:
                outcome = "failed" if failed else "stopped"
                await self._records.put_start(live.finish_start(outcome, live.worker.state_ms))
        finally:
            self.on_change(worker.endpoint_id)

    # Accounting.

    def _change(self, live: Living, state: WorkerState) -> None:
        """The one place where a worker's state changes; closes the usage interval of the old one."""
        check_worker_transition(live.worker.state, state)
        now = self._clock.now_ms()
        if self._account.close(live, now):
            self._tasks.spawn(self._account.flush(), "write-usage")
        live.worker = replace(live.worker, state=state, state_ms=now)

    def meter(self) -> None:
        """Close the running interval of every living worker, so that a crash loses little of the account."""
        now = self._clock.now_ms()
        for live in self._live.values():
            self._account.close(live, now)
        self._tasks.spawn(self._account.flush(), "write-usage")

    # Life of the fleet itself.

    async def recover(self) -> int:
        """End what an earlier life of ours left behind; returns how many workers still ran."""
        swept = await end_leftovers(
            self._store, self._cluster, self._account, self._records.put, self._clock.now_ms
        )
        if not self._closing:
            self._refusal = None
        return swept

    async def close(self) -> None:
        """End all workers; returns when no process is left and everything is recorded."""
        self._closing, self._refusal = True, "the gateway is stopping"
        try:
            for worker_id, live in list(self._live.items()):
                live.wanted_end = live.wanted_end or "gateway stopped"
                await self.drain(worker_id, reason="gateway stopped")
                # There is no time to wait for jobs in hand: whoever can, finishes within the cluster's grace.
                await self._cluster.terminate(worker_id)
                self._listener.closed(live.worker)
        finally:
            await self._cluster.close()
            while waiting := [*self._tasks.pending, *self._resuming.tasks]:
                await asyncio.gather(*waiting, return_exceptions=True)
            await self._account.flush()
