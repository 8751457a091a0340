"""The autoscaler: one task that reads an endpoint's load, asks `core.autoscaling`, and acts.

Woken by events (a request begins to wait, a job arrives, a worker changed or became idle) and by time
(`ScaleDecision.next_ms`); there is no polling tick. One endpoint is looked at at a time, and a wake-up
that comes meanwhile causes another look.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

import structlog

from pilotlight.core.autoscaling import (
    ScaleDecision,
    ScaleReason,
    ScaleSettings,
    ScaleSnapshot,
    WorkerView,
    decide_scale,
)
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.worker import Worker, WorkerState
from pilotlight.errors import ClusterError, StoreError
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

    def capacity(self, worker_id: str) -> int:
        """Slots of a worker; 0 before it is ready."""
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
    ) -> None:
        self._endpoint = endpoint
        self._store = store
        self._traffic = traffic
        self._fleet = fleet
        self._clock = clock
        self._on_give_up = on_give_up
        self._dirty: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._task: asyncio.Task[None] | None = None
        self._looking: str | None = None
        self._resting: dict[str, bool] = {}

    def wake(self, endpoint_id: str) -> None:
        """Look at this endpoint soon; cheap, callable from anywhere in the event loop.

        At once, unless it was looked at a moment ago: thousands of jobs a second need a few looks, not
        thousands.
        """
        if endpoint_id in self._resting:
            self._resting[endpoint_id] = True
            return
        self._dirty[endpoint_id] = None
        self._wake.set()

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
        if looking or timer is None or timer.when() > asyncio.get_running_loop().time() + timeout_s:
            self.wake(endpoint_id)

    def start(self) -> None:
        """Begin."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="autoscaler")

    async def stop(self) -> None:
        """End; nothing is started or drained afterwards."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

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
        """Read, decide, apply, record; the decision taken, None for an endpoint that is gone."""
        endpoint = self._endpoint(endpoint_id)
        if endpoint is None:
            return None
        now = self._clock.now_ms()
        snapshot = await self._read(endpoint, now)
        decision = decide_scale(snapshot, now, scale_settings(endpoint))
        if decision.start or decision.drain:
            _log.info(
                "scale", endpoint=endpoint_id, start=decision.start, drain=decision.drain,
                desired=decision.desired, reason=decision.reason, waiting=snapshot.waiting,
                in_progress=snapshot.in_progress,
            )  # fmt: skip
        for worker_id in decision.drain:
            await self._fleet.drain(worker_id, reason=decision.reason)
        retry_ms = await self._start(endpoint, decision)
        if decision.reason is ScaleReason.BACKING_OFF and not snapshot.workers and snapshot.retry_ms:
            self._on_give_up(endpoint, snapshot.retry_ms)
        moments = [moment for moment in (decision.next_ms, retry_ms) if moment is not None]
        self._look_again(endpoint_id, min(moments, default=None))
        return decision

    async def _read(self, endpoint: Endpoint, now_ms: int) -> ScaleSnapshot:
        overdue_before_ms = now_ms - int(endpoint.scaler_value * 1000)
        traffic = await self._traffic.traffic(endpoint.id, overdue_before_ms=overdue_before_ms)
        demand = await self._store.demand(endpoint.id, overdue_before_ms=overdue_before_ms)
        since = [moment for moment in (traffic.oldest_held_ms, demand.oldest_ms) if moment is not None]
        return ScaleSnapshot(
            workers=tuple(
                self._view(endpoint, worker, traffic) for worker in self._fleet.workers(endpoint.id)
            ),
            waiting=traffic.held + demand.queued,
            waiting_low=demand.queued_low,
            oldest_ms=min(since, default=None),
            overdue=traffic.overdue_held + demand.overdue,
            in_progress=traffic.requests_in_flight + demand.in_progress,
            retry_ms=self._fleet.health(endpoint.id).retry_ms,
        )

    def _view(self, endpoint: Endpoint, worker: Worker, traffic: Traffic) -> WorkerView:
        return WorkerView(
            id=worker.id,
            state=worker.state,
            current=worker.version == endpoint.revision.version,
            occupied=traffic.occupied.get(worker.id, 0),
            capacity=self._fleet.capacity(worker.id),
            idle_since_ms=traffic.idle_since_ms.get(worker.id) if worker.state is WorkerState.READY else None,
            healthy=not worker.out_of_rotation,
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
            loop = asyncio.get_running_loop()
            self._timers[endpoint_id] = loop.call_later(delay_s, self.wake, endpoint_id)


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
    )
