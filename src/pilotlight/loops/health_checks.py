"""Asks load-balancing workers for their health, and tells the fleet what changes (serverless-api.md §3).

One task for each worker, from its spawn to its drain or end. What an answer means is decided by
`core.health_check`; the fleet takes the news as it takes the stage reports of our own worker program. The
listener that `bootstrap` gives to the fleet calls `watch` and `forget`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from pilotlight.core.health_check import HealthHistory, HealthVerdict, health_path, note_check
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.worker import (
    Address,
    DownloadProgress,
    Failure,
    Registration,
    Stage,
    Worker,
    WorkerState,
)
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet, StageReport
from pilotlight.settings import LoadBalancerSettings

_log = structlog.get_logger()

_WATCHED = frozenset({WorkerState.STARTING, WorkerState.READY})
_STARTING_SHARE = 5
"""A worker that is not routable is asked so many times as often: somebody waits for it."""

_SLOTS = 1_000_000
"""Requests at once that a worker claims for itself: any number. The endpoint bounds them, and a changed bound
reaches workers that live already."""

_STAGES = {
    HealthVerdict.ROUTABLE: Stage.READY,
    HealthVerdict.INITIALIZING: Stage.INITIALIZING,
    HealthVerdict.UNHEALTHY: Stage.UNHEALTHY,
}


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """What one check has shown.

    Attributes:
        status: HTTP status; None without an answer.
        silent: Whether the port was open but nothing came in time.
        detail: The same for people.
    """

    status: int | None
    silent: bool
    detail: str


Check = Callable[[Address, str], Awaitable[CheckOutcome]]


class HealthChecker:
    """Follows the health of load-balancing workers.

    Args:
        check: Asks a worker once: (address, path) → what it showed.
        address: Where a worker listens.
        busy: Whether a worker has requests in hand.
        fleet: Is told what changes, and ends workers that stay unhealthy.
        clock: Time.
        settings: Pauses and bounds.
    """

    def __init__(
        self,
        *,
        check: Check,
        address: Callable[[str], Address],
        busy: Callable[[str], bool],
        fleet: Fleet,
        clock: Clock,
        settings: LoadBalancerSettings,
    ) -> None:
        self._check = check
        self._address = address
        self._busy = busy
        self._fleet = fleet
        self._clock = clock
        self._settings = settings
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def watch(self, worker: Worker, endpoint: Endpoint) -> None:
        """Begin to follow a worker."""
        task = asyncio.create_task(self._watch(worker.id, endpoint), name=f"health-{worker.id}")
        self._tasks[worker.id] = task

    def forget(self, worker_id: str) -> None:
        """Ask a worker no more; it has ended."""
        task = self._tasks.pop(worker_id, None)
        if task is not None:
            task.cancel()

    async def stop(self) -> None:
        """Ask nobody any more; returns when every task has ended."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, worker_id: str, endpoint: Endpoint) -> None:
        while self._living(worker_id):
            try:
                await self._follow(worker_id, endpoint)
            except Exception:  # noqa: BLE001 - a worker that nobody asks any more would be used for ever
                _log.exception("health_check_failed", worker=worker_id)
                await asyncio.sleep(self._settings.check_interval_ms / 1000)

    async def _follow(self, worker_id: str, endpoint: Endpoint) -> None:
        address, path = self._address(worker_id), health_path(endpoint.revision.env)
        history, told = HealthHistory(), None
        progress: DownloadProgress | None = None
        while self._living(worker_id):
            outcome = await self._check(address, path)
            worker = self._living(worker_id)
            if worker is None:
                return
            if worker.progress != progress:
                # Its image is being fetched, or has just been. While that goes on nothing can listen, so its
                # time begins anew; a registry that has fallen silent gets no more time than a server.
                history, progress = HealthHistory(), worker.progress
            history = note_check(
                history,
                outcome.status,
                self._clock.now_ms(),
                silent=outcome.silent,
                busy=self._busy(worker_id),
                patience_ms=self._settings.request_s * 1000,
            )
            starting = worker.state is WorkerState.STARTING
            # A port that is not open yet is no news of a worker that starts.
            quiet = starting and outcome.status is None
            if history.verdict is not None and history.verdict is not told and not quiet:
                told = history.verdict
                await self._tell(worker, endpoint, address, told, outcome)
            if failure := self._overdue(history, endpoint, path, outcome):
                await self._give_up(worker, failure)
                return
            pause_s = self._settings.check_interval_ms / 1000
            routable = history.verdict is HealthVerdict.ROUTABLE and not history.silences
            await asyncio.sleep(pause_s if routable else pause_s / _STARTING_SHARE)

    def _living(self, worker_id: str) -> Worker | None:
        worker = self._fleet.worker(worker_id)
        return worker if worker is not None and worker.state in _WATCHED else None

    async def _tell(
        self,
        worker: Worker,
        endpoint: Endpoint,
        address: Address,
        verdict: HealthVerdict,
        outcome: CheckOutcome,
    ) -> None:
        registration = None
        if verdict is HealthVerdict.ROUTABLE:
            registration = Registration(engine=address, max_concurrency=_SLOTS)
        _log.info(
            "worker_health", endpoint=endpoint.id, worker=worker.id, verdict=verdict, detail=outcome.detail
        )
        await self._fleet.reported(worker.id, StageReport(stage=_STAGES[verdict], registration=registration))

    def _overdue(
        self, history: HealthHistory, endpoint: Endpoint, path: str, outcome: CheckOutcome
    ) -> Failure | None:
        now_ms, settings = self._clock.now_ms(), self._settings
        advice = (
            f"listen on the port in PORT, answer GET {path} with 200; see `pilotlight logs {endpoint.name}`"
        )
        since = history.unhealthy_ms
        if since is not None and now_ms - since >= settings.unhealthy_s * 1000:
            cause = f"unhealthy for {settings.unhealthy_s} s: {outcome.detail}"
            return Failure(kind="unhealthy", cause=cause, advice=advice)
        since = history.not_routable_ms
        initializing = history.verdict is HealthVerdict.INITIALIZING
        # A worker that says now this, now that, is not unhealthy for long, but never routable either.
        if initializing and since is not None and now_ms - since >= settings.initializing_s * 1000:
            cause = f"still initializing after {settings.initializing_s} s: {outcome.detail}"
            return Failure(kind="timeout", cause=cause, advice=advice)
        return None

    async def _give_up(self, worker: Worker, failure: Failure) -> None:
        await self._fleet.reported(worker.id, StageReport(stage=Stage.FAILED, failure=failure))
        await self._fleet.kill(worker.id, reason=failure.cause)
