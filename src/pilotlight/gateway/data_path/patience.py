"""How long a request will probably be held, from how long others had their slots (`core.deadlines`)."""

from __future__ import annotations

from pilotlight.core.deadlines import expected_wait_ms, smoothed_ms
from pilotlight.gateway.slots import Ask, SlotTable

_ENDPOINTS_MAX = 4096
"""Endpoints that averages are kept for; when there are more, all are learnt anew."""


class Patience:
    """Remembers service times, endpoint by endpoint.

    Args:
        slots: Knows who waits.
    """

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self._service_ms: dict[str, float] = {}

    def served(self, endpoint_id: str, service_ms: float) -> None:
        """A request had its slot for so long."""
        if len(self._service_ms) >= _ENDPOINTS_MAX and endpoint_id not in self._service_ms:
            self._service_ms.clear()
        self._service_ms[endpoint_id] = smoothed_ms(self._service_ms.get(endpoint_id), service_ms)

    def expected_ms(self, endpoint_id: str, ask: Ask) -> int | None:
        """How long one more request will probably be held; None if nobody knows."""
        return expected_wait_ms(*self._slots.ahead(endpoint_id, ask), self._service_ms.get(endpoint_id))
