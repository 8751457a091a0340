"""Closes the usage intervals of living workers once a minute, so that a crash loses little of the account."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

_INTERVAL_S = 60.0


class _Metered(Protocol):
    def meter(self) -> None:
        """Close the running intervals."""


class Meter:
    """A task that asks the fleet to meter.

    Args:
        fleet: Whose workers are metered.
    """

    def __init__(self, fleet: _Metered) -> None:
        self._fleet = fleet
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="meter")

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            self._fleet.meter()
