"""Counts what each API key asks of each endpoint, for the profile `runpod`; `core.rate_limits` decides.

An entry lives for as long as it says anything: ten seconds after its last request. So the table is bounded
by the number of keys and endpoints that are in use at the same time, and by a maximum on top.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from pilotlight.core.rate_limits import (
    RUNPOD_LIMITS,
    WINDOW_MS,
    OperationGroup,
    RateReason,
    RateSnapshot,
    decide_rate,
)
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.key import ApiKey
from pilotlight.domain.worker import WorkerState
from pilotlight.gateway.errors import RateLimitedError
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet

_SLICE_MS = 100
"""Requests are counted in slices of this length: at most a hundred numbers for an entry."""

_ENTRIES_MAX = 10_000

_Name = tuple[str, str, OperationGroup]


@dataclass(slots=True, eq=False)
class _Count:
    """One key, endpoint and group: (slice, requests in it), oldest first, and how many are under way."""

    slices: deque[tuple[int, int]] = field(default_factory=deque)
    counted: int = 0
    under_way: int = 0
    used_ms: int = 0

    def expire(self, now_ms: int) -> None:
        """Forget what is older than the window, or, after the clock was set back, of the future."""
        oldest, newest = (now_ms - WINDOW_MS) // _SLICE_MS, now_ms // _SLICE_MS
        while self.slices and not oldest < self.slices[0][0] <= newest:
            self.counted -= self.slices.popleft()[1]

    def add(self, now_ms: int) -> None:
        """Count a request."""
        number = now_ms // _SLICE_MS
        if self.slices and self.slices[-1][0] == number:
            self.slices[-1] = (number, self.slices[-1][1] + 1)
        else:
            self.slices.append((number, 1))
        self.counted += 1
        self.used_ms = now_ms


class RateTable:
    """The counts of one gateway.

    Args:
        clock: Time.
        fleet: Running workers raise a limit.
    """

    def __init__(self, clock: Clock, fleet: Fleet) -> None:
        self._clock = clock
        self._fleet = fleet
        self._counts: OrderedDict[_Name, _Count] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    @contextlib.contextmanager
    def admitted(self, group: OperationGroup, endpoint: Endpoint, key: ApiKey) -> Iterator[None]:
        """Count a request for as long as it is under way.

        Raises:
            RateLimitedError: It is over the limit and was not counted.
        """
        now_ms = self._clock.now_ms()
        count = self._count((key.id, endpoint.id, group), now_ms)
        count.expire(now_ms)
        snapshot = RateSnapshot(
            counted=count.counted,
            oldest_ms=count.slices[0][0] * _SLICE_MS if count.slices else None,
            under_way=count.under_way,
            workers_running=self._running(endpoint.id),
        )
        decision = decide_rate(snapshot, now_ms, RUNPOD_LIMITS[group])
        if not decision.admitted:
            how = "in 10 s" if decision.reason is RateReason.TOO_MANY else "at once"
            raise RateLimitedError(
                f"rate limit exceeded: {decision.limit} requests {how} to {group} of endpoint {endpoint.id}",
                retry_after_s=decision.retry_after_s,
            )
        count.add(now_ms)
        count.under_way += 1
        try:
            yield
        finally:
            count.under_way -= 1

    def _count(self, name: _Name, now_ms: int) -> _Count:
        count = self._counts.get(name)
        if count is None:
            self._expire(now_ms)
            count = self._counts[name] = _Count()
        else:
            self._counts.move_to_end(name)
        return count

    def _expire(self, now_ms: int) -> None:
        """Drop entries that say nothing any more, the longest unused first."""
        for name, count in [*self._counts.items()]:
            idle = not 0 <= now_ms - count.used_ms < WINDOW_MS
            if not idle and len(self._counts) < _ENTRIES_MAX:
                return
            if not count.under_way:
                del self._counts[name]

    def _running(self, endpoint_id: str) -> int:
        return sum(worker.state is WorkerState.READY for worker in self._fleet.workers(endpoint_id))
