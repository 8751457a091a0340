"""Ends frozen workers that may not be kept: too old, too many for the memory they hold, or memory runs short.

While something is frozen it looks every few seconds, and at once when one more worker is frozen. What goes is
decided by `core.freezing`. Room for workers that are to be started is made by the fleet when it looks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from pilotlight.core.freezing import Evictions, FreezeSettings, FrozenView, HostMemory, decide_evictions
from pilotlight.loops.tasks import Endless
from pilotlight.ports.clock import Clock
from pilotlight.settings import WorkerSettings

_log = structlog.get_logger()

_RETRY_S = 5.0
"""Pause after a look that failed."""


class FreezerFleet(Protocol):
    """The fleet, as far as it is needed here."""

    def frozen(self) -> Sequence[FrozenView]:
        """The workers that are frozen and nobody is waking."""
        ...

    async def evict(self, worker_id: str, *, reason: str) -> None:
        """End a frozen worker, unless somebody is waking it by now."""
        ...


class Freezer:
    """A task that looks after frozen workers.

    Args:
        fleet: Has them, and ends them.
        memory: Reads the host's memory.
        clock: Time.
        settings: What may be kept.
    """

    def __init__(
        self,
        fleet: FreezerFleet,
        memory: Callable[[], HostMemory],
        clock: Clock,
        settings: WorkerSettings,
    ) -> None:
        self._fleet = fleet
        self._memory = memory
        self._clock = clock
        self._settings = FreezeSettings(
            memory_bytes=settings.frozen_memory_bytes,
            gpu_memory_bytes=settings.frozen_gpu_memory_bytes,
            age_ms=settings.frozen_age_s * 1000,
            pressure_percent=settings.frozen_pressure,
            available_bytes_min=settings.memory_reserve_bytes,
        )
        self._wake = asyncio.Event()
        self._loop = Endless(self._run, "freezer")

    def wake(self) -> None:
        """Look soon: one more worker is frozen."""
        self._wake.set()

    def start(self) -> None:
        """Begin; idempotent."""
        self._loop.start()

    async def stop(self) -> None:
        """End; idempotent."""
        await self._loop.stop()

    async def look(self) -> Evictions:
        """Read, decide, end what has to go; the decision taken."""
        frozen = self._fleet.frozen()
        if not frozen:
            return Evictions()
        decision = decide_evictions(frozen, self._memory(), self._clock.now_ms(), self._settings)
        for eviction in decision.evict:
            _log.info("frozen_worker_evicted", worker=eviction.id, reason=eviction.reason)
        reasons = ((each.id, f"frozen, and evicted: {each.reason}") for each in decision.evict)
        await asyncio.gather(*(self._fleet.evict(worker_id, reason=reason) for worker_id, reason in reasons))
        return decision

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                next_ms = (await self.look()).next_ms
                pause_s = None if next_ms is None else max(0.0, (next_ms - self._clock.now_ms()) / 1000)
            except Exception:  # noqa: BLE001 - memory that nobody looks after any more would run out
                _log.exception("freezer_failed")
                pause_s = _RETRY_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)
