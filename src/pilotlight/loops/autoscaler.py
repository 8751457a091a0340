"""The autoscaler: one task that reads an endpoint's load, asks `core.autoscaling`, and acts.

Woken by events (a request begins to wait, a job arrives, a worker changed or became idle) and by time
(`ScaleDecision.next_ms`); there is no polling tick. One endpoint is looked at at a time, and a wake-up
that comes meanwhile causes another look.

Thaws and freezes are waited for by nobody: they go on beside the looks, and a worker is seen as what it is
about to become. A request that begins to wait for a frozen worker does not wait for a look either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import structlog

from pilotlight.alarms import Alarm, alarm_at
from pilotlight.core.autoscaling import (
    ScaleDecision,
    ScaleReason,
    ScaleSettings,
    ScaleSnapshot,
    WorkerView,
    decide_scale,
)
from pilotlight.core.placement import Reservation, devices_in_use
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.job import QueueDemand
from pilotlight.domain.worker import Stage, Worker, WorkerState
from pilotlight.errors import ClusterError, StoreError
from pilotlight.loops.tasks import Endless
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet
from pilotlight.ports.store import JobStore
from pilotlight.ports.traffic import Traffic, TrafficReader

_log = structlog.get_logger()

_REST_S = 0.02
"""Pause between two looks at one endpoint; a cold start begins with the first one, so nobody waits for it."""

_RETRY_S = 5.0
"""Pause after a placement that found no room, or a store that could not answer."""


class ScalableFleet(Fleet, Protocol):
    """The fleet as the autoscaler needs it."""

    async def start(self, endpoint: Endpoint) -> Worker:
        """Start one worker; ClusterError when there is no room."""
        ...

    def forgive(self, endpoint_id: str) -> None:
        """Forget an endpoint's failures."""
        ...

    def workers(self, endpoint_id: str | None = None) -> Sequence[Worker]:
        """Living workers, of one endpoint or of all, oldest first."""
        ...

    def capacity(self, worker_id: str) -> int:
        """Slots of a worker; 0 before it is ready."""
        ...

    def freezable(self, worker_id: str) -> bool:
        """Whether a ready worker is of a kind that can be frozen."""
        ...

    async def freeze(self, worker_id: str, *, reason: str) -> bool:
        """Stop a ready worker in place; False when it had work and stays ready, or had to be ended."""
        ...

    async def thaw(self, worker_id: str) -> bool:
        """Let a frozen worker go on; True when it is ready then, False when it had to be ended."""
        ...


class Autoscaler:
    """Keeps every endpoint at the number of workers that `decide_scale` wants.

    Args:
        endpoint: Looks up a living endpoint by id.
        store: The queue.
        traffic: The data path's load.
        fleet: Starts and drains.
        clock: Time.
        on_give_up: Called with an endpoint and its health's moment of retry when starts are suspended
            after failures and no worker is left; held requests are answered then.
        estimate: How long the next start of an endpoint will take, in ms; None when nobody knows.
    """

    def __init__(
        self,
        *,
        endpoint: Callable[[str], Endpoint | None],
        store: JobStore,
        traffic: TrafficReader,
        fleet: ScalableFleet,
        clock: Clock,
        on_give_up: Callable[[Endpoint, int], None],
        estimate: Callable[[str], int | None] = lambda _: None,
    ) -> None:
        self._endpoint = endpoint
        self._store = store
        self._traffic = traffic
        self._fleet = fleet
        self._clock = clock
        self._on_give_up = on_give_up
        self._estimate = estimate
        self._moves = _Moves(fleet, clock, self.wake)
        self._dirty: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._timers: dict[str, Alarm] = {}
        self._loop = Endless(self._run, "autoscaler")
        self._looking: str | None = None
        self._resting: dict[str, bool] = {}

    def wake(self, endpoint_id: str) -> None:
        """Look at this endpoint soon; cheap, callable from anywhere in the event loop.

        At once, unless it was looked at a moment ago: thousands of jobs a second need a few looks, not
        thousands. Not at all while this is stopped.
        """
        if not self._loop.running:
            return
        if endpoint_id in self._resting:
            self._resting[endpoint_id] = True
            return
        self._dirty[endpoint_id] = None
        self._wake.set()

    def note_held(self, endpoint_id: str) -> None:
        """A request begins to wait: thaw for it at once, and look what else is to do.

        What only data path and fleet know is enough for that. A look may have to wait for the store, and for
        the look at another endpoint.
        """
        if self._loop.running:
            self._moves.hurry(endpoint_id, self._thaw_for_held)
        self.wake(endpoint_id)

    def note_idle(self, endpoint_id: str) -> None:
        """A worker has no slot in use: look, unless a look is due before its idle timeout anyway.

        This keeps a look from following every single request.
        """
        endpoint, timer = self._endpoint(endpoint_id), self._timers.get(endpoint_id)
        if endpoint is None or endpoint.revision.engine_url is not None:
            return
        timeout_s = endpoint.idle_timeout_ms / 1000
        # A look under way may have read the load before this moment, and will replace the timer.
        looking = endpoint_id == self._looking
        if looking or timer is None or timer.moment_s > asyncio.get_running_loop().time() + timeout_s:
            self.wake(endpoint_id)

    def start(self) -> None:
        """Begin."""
        self._loop.start()

    async def stop(self) -> None:
        """End; nothing is started, drained, thawed or frozen afterwards."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        await self._loop.stop()
        self._dirty.clear()
        await self._moves.stop()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._dirty:
                endpoint_id = next(iter(self._dirty))
                del self._dirty[endpoint_id]
                self._looking = endpoint_id
                try:
                    await self.look(endpoint_id)
                except StoreError as error:
                    _log.warning("autoscaler_store_failed", endpoint=endpoint_id, error=str(error))
                    self._look_again(endpoint_id, self._clock.now_ms() + int(_RETRY_S * 1000))
                except Exception:  # noqa: BLE001 - one endpoint's trouble must not stop the others
                    _log.exception("autoscaler_failed", endpoint=endpoint_id)
                    self._look_again(endpoint_id, self._clock.now_ms() + int(_RETRY_S * 1000))
                finally:
                    self._looking = None
                    self._rest(endpoint_id)

    def _rest(self, endpoint_id: str) -> None:
        """Put off what would look at this endpoint again until a little later."""
        self._resting[endpoint_id] = endpoint_id in self._dirty
        self._dirty.pop(endpoint_id, None)
        asyncio.get_running_loop().call_later(_REST_S, self._rested, endpoint_id)

    def _rested(self, endpoint_id: str) -> None:
        if self._resting.pop(endpoint_id):
            self.wake(endpoint_id)

    async def look(self, endpoint_id: str) -> ScaleDecision | None:
        """Read, decide, apply, record; the decision. None for an endpoint that is gone, whose workers end."""
        endpoint = self._endpoint(endpoint_id)
        if endpoint is None:
            self._look_again(endpoint_id, None)
            # Workers that ended after it was deleted have left something behind. One that was about to be
            # started meanwhile is known to nobody else.
            self._fleet.forgive(endpoint_id)
            for worker in self._fleet.workers(endpoint_id):
                await self._fleet.drain(worker.id, reason="endpoint deleted")
            return None
        now = self._clock.now_ms()
        snapshot = await self._read(endpoint, now)
        decision = decide_scale(snapshot, now, scale_settings(endpoint))
        self._log(endpoint_id, decision, snapshot)
        self._moves.thaw(endpoint_id, decision.thaw)
        self._moves.freeze(endpoint_id, decision.freeze, decision.reason)
        for worker_id in decision.drain:
            await self._fleet.drain(worker_id, reason=decision.reason)
        retry_ms = await self._start(endpoint, decision)
        # Frozen ones that could go on would be thawed.
        left = any(worker.state is not WorkerState.FROZEN for worker in snapshot.workers)
        # One that was deleted meanwhile has failed those that it held, and no moment of retry is kept of it.
        lives = self._endpoint(endpoint_id) is not None
        if lives and decision.reason is ScaleReason.BACKING_OFF and not left and snapshot.retry_ms:
            self._on_give_up(endpoint, snapshot.retry_ms)
        moments = [moment for moment in (decision.next_ms, retry_ms) if moment is not None]
        self._look_again(endpoint_id, min(moments, default=None))
        return decision

    async def _thaw_for_held(self, endpoint_id: str) -> None:
        endpoint = self._endpoint(endpoint_id)
        if endpoint is None:
            return
        now = self._clock.now_ms()
        traffic = await self._traffic.traffic(endpoint_id, overdue_before_ms=_overdue_before(endpoint, now))
        # Jobs that wait as well could only make more thaws of this.
        snapshot = self._snapshot(endpoint, traffic, QueueDemand())
        wanted = decide_scale(snapshot, now, scale_settings(endpoint))
        thaws = ScaleDecision(thaw=wanted.thaw, desired=wanted.desired, reason=wanted.reason)
        self._log(endpoint_id, thaws, snapshot)
        self._moves.thaw(endpoint_id, thaws.thaw)

    def _log(self, endpoint_id: str, decision: ScaleDecision, snapshot: ScaleSnapshot) -> None:
        if decision.thaw or decision.start or decision.freeze or decision.drain:
            _log.info(
                "scale", endpoint=endpoint_id, thaw=decision.thaw, start=decision.start,
                freeze=decision.freeze, drain=decision.drain, desired=decision.desired,
                reason=decision.reason, waiting=snapshot.waiting, in_progress=snapshot.in_progress,
            )  # fmt: skip

    async def _read(self, endpoint: Endpoint, now_ms: int) -> ScaleSnapshot:
        before_ms = _overdue_before(endpoint, now_ms)
        traffic = await self._traffic.traffic(endpoint.id, overdue_before_ms=before_ms)
        demand = await self._store.demand(endpoint.id, overdue_before_ms=before_ms)
        return self._snapshot(endpoint, traffic, demand)

    def _snapshot(self, endpoint: Endpoint, traffic: Traffic, demand: QueueDemand) -> ScaleSnapshot:
        since = [moment for moment in (traffic.oldest_held_ms, demand.oldest_ms) if moment is not None]
        workers = self._fleet.workers(endpoint.id)
        return ScaleSnapshot(
            workers=tuple(self._view(endpoint, worker, traffic) for worker in workers),
            waiting=traffic.held + demand.queued,
            waiting_low=demand.queued_low,
            oldest_ms=min(since, default=None),
            overdue=traffic.overdue_held + demand.overdue,
            in_progress=traffic.requests_in_flight + demand.in_progress,
            retry_ms=self._fleet.health(endpoint.id).retry_ms,
            start_estimate_ms=self._estimate(endpoint.id),
            devices_in_use=self._devices_in_use(workers),
        )

    def _devices_in_use(self, workers: Iterable[Worker]) -> frozenset[int]:
        if not any(worker.devices for worker in workers):
            return frozenset()
        return devices_in_use(
            Reservation(devices=worker.devices, frozen=self._moves.seen(worker)[0] is WorkerState.FROZEN)
            for worker in self._fleet.workers()
        )

    def _view(self, endpoint: Endpoint, worker: Worker, traffic: Traffic) -> WorkerView:
        state, since_ms = self._moves.seen(worker)
        if worker.state is WorkerState.STARTING:
            since_ms = _after_fetching(self._fleet.stages(worker.id), since_ms)
        idle_since_ms = traffic.idle_since_ms.get(worker.id) if state is WorkerState.READY else None
        refused = self._moves.refusal(worker.id, idle_since_ms)
        if idle_since_ms is not None:
            # Slots know nothing of a time for which the worker was frozen.
            idle_since_ms = max(idle_since_ms, since_ms, refused.answered_ms if refused is not None else 0)
        return WorkerView(
            id=worker.id,
            state=state,
            current=worker.version == endpoint.revision.version,
            occupied=traffic.occupied.get(worker.id, 0),
            capacity=traffic.capacity.get(worker.id, self._fleet.capacity(worker.id)),
            idle_since_ms=idle_since_ms,
            healthy=not worker.out_of_rotation,
            since_ms=since_ms,
            waking=self._moves.wakes(worker.id),
            fetching=worker.stage is Stage.DOWNLOADING,
            freezable=endpoint.flashboot and refused is None and self._fleet.freezable(worker.id),
            devices=worker.devices,
        )

    async def _start(self, endpoint: Endpoint, decision: ScaleDecision) -> int | None:
        """Start what was decided; the moment to try again where there was no room."""
        for _ in range(decision.start):
            try:
                await self._fleet.start(endpoint)
            except ClusterError as error:
                _log.warning("worker_not_started", endpoint=endpoint.id, error=str(error))
                return self._clock.now_ms() + int(_RETRY_S * 1000)
        return None

    def _look_again(self, endpoint_id: str, at_ms: int | None) -> None:
        timer = self._timers.pop(endpoint_id, None)
        if timer is not None:
            timer.cancel()
        if at_ms is not None:
            delay_s = max(0.001, (at_ms - self._clock.now_ms()) / 1000)
            moment_s = asyncio.get_running_loop().time() + delay_s
            self._timers[endpoint_id] = alarm_at(moment_s, self.wake, endpoint_id)


def scale_settings(endpoint: Endpoint) -> ScaleSettings:
    """The part of an endpoint that scaling obeys; one with a fixed engine has no workers of ours."""
    fixed = endpoint.revision.engine_url is not None
    return ScaleSettings(
        workers_min=0 if fixed else endpoint.workers_min,
        workers_max=0 if fixed else endpoint.workers_max,
        idle_timeout_ms=endpoint.idle_timeout_ms,
        scaler=endpoint.scaler,
        scaler_value=endpoint.scaler_value,
        concurrency=endpoint.concurrency,
        flashboot=endpoint.flashboot,
    )


def _overdue_before(endpoint: Endpoint, now_ms: int) -> int:
    return now_ms - int(endpoint.scaler_value * 1000)


def _after_fetching(stages: Sequence[tuple[str, int]], begun_ms: int) -> int:
    """Since when a start does what others did as well, which have found the model."""
    fetched_ms = [at_ms for (stage, _), (_, at_ms) in pairwise(stages) if stage == Stage.DOWNLOADING]
    return max(fetched_ms, default=begun_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    """When a worker was to be frozen, and when it turned out that it would not."""

    asked_ms: int
    answered_ms: int


class _Moves:
    """Thaws and freezes under way, each in a task of its own, and what became of earlier ones.

    Args:
        fleet: Does them.
        clock: Time.
        wake: Called with an endpoint id when one has ended.
    """

    def __init__(self, fleet: ScalableFleet, clock: Clock, wake: Callable[[str], None]) -> None:
        self._fleet = fleet
        self._clock = clock
        self._wake = wake
        # By worker, since when.
        self._thaws: dict[str, int] = {}
        self._freezes: dict[str, int] = {}
        # Frozen workers that could not be thawed, with the moment since when they were frozen: an id may be
        # used again.
        self._lost: dict[str, int] = {}
        self._refusals: dict[str, _Refusal] = {}
        self._hurried: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def seen(self, worker: Worker) -> tuple[WorkerState, int]:
        """The state that a worker counts with, and since when it is in it."""
        if worker.id in self._thaws:
            return WorkerState.STARTING, self._thaws[worker.id]
        if worker.id in self._freezes and worker.state is WorkerState.READY:
            return WorkerState.FROZEN, self._freezes[worker.id]
        if worker.state is WorkerState.FROZEN and self._lost.get(worker.id) == worker.state_ms:
            return WorkerState.STOPPING, worker.state_ms
        return worker.state, worker.state_ms

    def wakes(self, worker_id: str) -> bool:
        """Whether a worker is being thawed."""
        return worker_id in self._thaws

    def refusal(self, worker_id: str, idle_since_ms: int | None) -> _Refusal | None:
        """How a worker without work refused to be frozen; None when it did not, or has worked since then.

        It gets its idle timeout anew, and is not asked a second time.
        """
        refusal = self._refusals.get(worker_id)
        if refusal is None or idle_since_ms is None or idle_since_ms > refusal.asked_ms:
            return None
        return refusal

    def hurry(self, endpoint_id: str, decide: Callable[[str], Coroutine[object, object, None]]) -> None:
        """Have it decided on thaws now, if one of its workers is frozen and none is ready or being thawed."""
        workers = self._fleet.workers(endpoint_id)
        states = {self.seen(worker)[0] for worker in workers}
        coming = WorkerState.READY in states or any(self.wakes(worker.id) for worker in workers)
        if coming or WorkerState.FROZEN not in states:
            return
        if endpoint_id not in self._hurried:
            self._hurried.add(endpoint_id)
            task = self._spawn(decide(endpoint_id), f"hurry-{endpoint_id}")
            task.add_done_callback(lambda _: self._hurried.discard(endpoint_id))

    def thaw(self, endpoint_id: str, worker_ids: Iterable[str]) -> None:
        """Begin to thaw these."""
        for worker_id in worker_ids:
            self._thaws[worker_id] = self._clock.now_ms()
            self._spawn(self._thaw(endpoint_id, worker_id), f"thaw-{worker_id}")

    def freeze(self, endpoint_id: str, worker_ids: Iterable[str], reason: str) -> None:
        """Begin to freeze these."""
        for worker_id in worker_ids:
            self._freezes[worker_id] = self._clock.now_ms()
            self._spawn(self._freeze(endpoint_id, worker_id, reason), f"freeze-{worker_id}")

    async def stop(self) -> None:
        """Let go of all that is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # One that had not begun yet has tidied up nothing.
        self._thaws.clear()
        self._freezes.clear()

    async def _thaw(self, endpoint_id: str, worker_id: str) -> None:
        worker = self._fleet.worker(worker_id)
        try:
            thawed = await _answer(self._fleet.thaw(worker_id), "thaw_failed", worker_id)
            if not thawed and worker is not None:
                self._forget_ended()
                self._lost[worker_id] = worker.state_ms
        finally:
            del self._thaws[worker_id]
        self._wake(endpoint_id)

    async def _freeze(self, endpoint_id: str, worker_id: str, reason: str) -> None:
        try:
            frozen = await _answer(self._fleet.freeze(worker_id, reason=reason), "freeze_failed", worker_id)
            if not frozen:
                self._forget_ended()
                asked_ms = self._freezes[worker_id]
                self._refusals[worker_id] = _Refusal(asked_ms=asked_ms, answered_ms=self._clock.now_ms())
        finally:
            del self._freezes[worker_id]
        self._wake(endpoint_id)

    def _forget_ended(self) -> None:
        for known in (self._lost, self._refusals):
            for worker_id in [each for each in known if self._fleet.worker(each) is None]:
                del known[worker_id]

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _answer(call: Awaitable[bool], event: str, worker_id: str) -> bool:
    try:
        return await call
    except Exception:  # noqa: BLE001 - the end of a task: nobody above could know
        _log.exception(event, worker=worker_id)
        return False
