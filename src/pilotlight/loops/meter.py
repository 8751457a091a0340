"""Closes the usage intervals of living workers once a minute, so that a crash loses little of the account."""

from __future__ import annotations

import asyncio
from typing import Protocol

from pilotlight.loops.tasks import Endless

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
        self._loop = Endless(self._run, "meter")

    def start(self) -> None:
        """Begin."""
        self._loop.start()

    async def stop(self) -> None:
        """End."""
        await self._loop.stop()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            self._fleet.meter()
