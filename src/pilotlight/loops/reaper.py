"""What must happen because time has passed.

Jobs that ran or waited too long, hand-outs nobody confirmed, workers that will not let go, and records past
their retention. A thin loop; jobs are changed by their owner, the gateway's job service, behind the port
`JobSweeper`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from pilotlight.errors import StoreError
from pilotlight.ports.clock import Clock
from pilotlight.ports.store import BatchStore, JobStore, RequestLog, WorkerStore
from pilotlight.settings import Settings

_log = structlog.get_logger()

_SWEEP_S = 1.0
"""Deadlines of jobs are seconds and more, so a second of delay does not matter to anybody."""

_PRUNE_JOBS_MS = 5_000
_PRUNE_BATCHES_MS = 60_000
_PRUNE_REQUESTS_MS = 60_000
_PRUNE_WORKERS_MS = 600_000
_PRUNE_SLICE = 200
"""Records deleted in one go, so that other users of the store get their turn."""

_SLICES_MAX = 100
"""Slices of a purged queue, and of expired jobs, deleted in one round; a million jobs must not hold up the
deadlines of others."""


class JobSweeper(Protocol):
    """Owner of the jobs, as the reaper sees it."""

    async def end_overdue(self) -> None:
        """End jobs whose time to live or execution timeout has passed."""
        ...

    async def lose_unconfirmed(self) -> None:
        """Requeue hand-outs that were not confirmed in time."""
        ...

    async def kill_stuck(self) -> None:
        """End workers that hold a stopped job too long and have nothing else."""
        ...


class ReaperStore(JobStore, BatchStore, RequestLog, WorkerStore, Protocol):
    """What is pruned."""


class Reaper:
    """Sweeps about once a second until stopped.

    Args:
        sweeper: Owner of the jobs.
        store: What is pruned.
        clock: Time.
        settings: Retention.
        prune_logs: Deletes the logs of workers that ended before a moment in ms.
    """

    def __init__(
        self,
        sweeper: JobSweeper,
        store: ReaperStore,
        clock: Clock,
        settings: Settings,
        *,
        prune_logs: Callable[[int], Awaitable[int]],
    ) -> None:
        self._sweeper = sweeper
        self._store = store
        self._clock = clock
        self._settings = settings
        self._prune_logs = prune_logs
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._pruned_ms: dict[str, int] = {}

    def start(self) -> None:
        """Begin to sweep; idempotent."""
        if self._task is None:
            self._stopping.clear()
            self._task = asyncio.create_task(self._run(), name="reaper")

    async def stop(self) -> None:
        """End; returns when the sweep under way is done; idempotent."""
        if self._task is not None:
            self._stopping.set()
            # Waited for in a way that a cancelled caller does not break the sweep off.
            await asyncio.wait({self._task})
            self._task = None

    async def sweep(self) -> None:
        """One round. A step that fails is reported and tried again in the next round."""
        for step in (self._sweeper.end_overdue, self._sweeper.lose_unconfirmed, self._sweeper.kill_stuck):
            await self._try(step)
        await self._try(self._delete_purged)
        for step, period_ms in (
            (self._prune_jobs, _PRUNE_JOBS_MS),
            (self._prune_batches, _PRUNE_BATCHES_MS),
            (self._prune_requests, _PRUNE_REQUESTS_MS),
            (self._prune_workers, _PRUNE_WORKERS_MS),
        ):
            now_ms = self._clock.now_ms()
            # A clock that was set back must not stop the pruning: only a small distance counts as recent.
            if not 0 <= now_ms - self._pruned_ms.get(step.__name__, -period_ms) < period_ms:
                self._pruned_ms[step.__name__] = now_ms
                await self._try(step)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            await self.sweep()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _SWEEP_S)

    async def _try(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except StoreError as error:
            _log.warning("reaper_step_failed", step=step.__name__, error=str(error))
        except Exception:  # noqa: BLE001 - one broken record must not end all deadlines
            _log.exception("reaper_step_broken", step=step.__name__)

    async def _delete_purged(self) -> None:
        now_ms = self._clock.now_ms()
        for _ in range(_SLICES_MAX):
            if self._stopping.is_set() or not await self._store.delete_purged(
                now_ms=now_ms, limit=_PRUNE_SLICE
            ):
                return

    async def _prune_jobs(self) -> None:
        now_ms = self._clock.now_ms()
        for _ in range(_SLICES_MAX):
            if await self._store.prune_jobs(now_ms=now_ms, limit=_PRUNE_SLICE) < _PRUNE_SLICE:
                return

    async def _prune_batches(self) -> None:
        before_ms = self._clock.now_ms() - self._settings.jobs.batch_retention_ms
        await self._store.prune_batches(ended_before_ms=before_ms, limit=_PRUNE_SLICE)

    async def _prune_requests(self) -> None:
        await self._store.prune_requests(keep=self._settings.store.request_log_rows)

    async def _prune_workers(self) -> None:
        before_ms = self._clock.now_ms() - self._settings.workers.history_s * 1000
        await self._store.prune_workers(ended_before_ms=before_ms)
        await self._prune_logs(before_ms)
