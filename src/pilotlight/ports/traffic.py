"""Load on the data path, behind a port so that loops never read the gateway's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What the data path does for one endpoint at one moment.

    Attributes:
        held: Requests waiting for a worker.
        oldest_held_ms: Since when the oldest of them waits; None when none does.
        overdue_held: Held requests that have waited longer than the threshold asked for.
        occupied: Slots in use per worker id, requests and leased jobs together.
        capacity: Slots in all per worker id: fewer than configured while its engine shows strain
            (`core.engine_capacity`), none while it is passed over because it fails.
        idle_since_ms: Per worker id with no slot in use: since when.
        requests_in_flight: Requests (not jobs) being served, all workers together.
    """

    held: int = 0
    oldest_held_ms: int | None = None
    overdue_held: int = 0
    occupied: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    capacity: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    idle_since_ms: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    requests_in_flight: int = 0


class TrafficReader(Protocol):
    """Gives loops the data path's counters."""

    async def traffic(self, endpoint_id: str, *, overdue_before_ms: int) -> Traffic:
        """The endpoint's load now; all zero for an endpoint nobody has called.

        Args:
            endpoint_id: Whose load.
            overdue_before_ms: Held requests that arrived earlier than this count as overdue.
        """
        ...
