"""How much may wait in an endpoint's queue: the one place that says no, for single jobs and for batches.

The store knows the length of a queue, but asking it for every submission would double the work. So the free
room is asked for once and counted down; jobs that leave the queue only make it larger.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pilotlight.core.rate_limits import queue_bound, retry_after_full_s
from pilotlight.domain.endpoint import Endpoint
from pilotlight.gateway.errors import QueueFullError
from pilotlight.ports.clock import Clock
from pilotlight.ports.store import JobStore
from pilotlight.settings import LimitSettings

_TRUSTED_MS = 1_000
"""How long a count is good for: other gateways may fill the same queue."""

_DRAIN_MS = 10_000
"""Over how long ended jobs are counted, to tell when there will be room."""


@dataclass(slots=True, eq=False)
class _Room:
    """One endpoint.

    Attributes:
        jobs: Jobs that may still be queued.
        size: Bytes of inputs that may still be queued.
        asked_ms: When the store was asked; None for never.
        pending_jobs: Of those granted, how many are on their way into the store.
        pending_size: Their bytes.
        asking: Held while the store is asked.
        ended: (second, jobs that ended in it), oldest first.
    """

    jobs: int = 0
    size: int = 0
    asked_ms: int | None = None
    pending_jobs: int = 0
    pending_size: int = 0
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: deque[tuple[int, int]] = field(default_factory=deque)


class _Reservation:
    """Room in a queue for as long as jobs are on their way into it.

    A class, as a generator would cost more than what it does, with every submission.
    """

    __slots__ = ("_bounds", "_endpoint", "_jobs", "_room", "_size")

    def __init__(self, bounds: QueueBounds, endpoint: Endpoint, jobs: int, size: int) -> None:
        self._bounds = bounds
        self._endpoint = endpoint
        self._jobs = jobs
        self._size = size

    async def __aenter__(self) -> None:
        self._room = await self._bounds.reserve(self._endpoint, self._jobs, self._size)

    async def __aexit__(self, *_: object) -> None:
        self._room.pending_jobs -= self._jobs
        self._room.pending_size -= self._size


class QueueBounds:
    """Bounds on jobs and on bytes, per endpoint.

    Args:
        store: The queue.
        clock: Time.
        limits: The bounds, and the profile that may narrow them.
        lives: Whether there is still an endpoint of this id; nothing is kept of others.
        start_s: Seconds until an endpoint has a worker; None while nobody knows.
    """

    def __init__(
        self,
        store: JobStore,
        clock: Clock,
        limits: LimitSettings,
        *,
        lives: Callable[[str], bool],
        start_s: Callable[[Endpoint], int | None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._limits = limits
        self._lives = lives
        self._start_s = start_s
        self._rooms: dict[str, _Room] = {}

    def room(self, endpoint: Endpoint, *, jobs: int, size: int) -> _Reservation:
        """Room for some jobs while they are put into the queue: `async with` it.

        Args:
            endpoint: Whose queue.
            jobs: How many.
            size: Bytes of their inputs together.

        Raises:
            QueueFullError: On entering: there is none; says which bound it was and when to try again.
        """
        return _Reservation(self, endpoint, jobs, size)

    async def reserve(self, endpoint: Endpoint, jobs: int, size: int) -> _Room:
        """Take room for `room`, which gives back what is no longer on its way."""
        room = self._room(endpoint.id)
        if not self._fits(room, jobs, size):
            async with room.asking:
                if not self._fits(room, jobs, size):
                    await self._ask(endpoint, room)
            if room.jobs < jobs or room.size < size:
                raise self._full(endpoint, room, jobs)
        room.jobs -= jobs
        room.size -= size
        room.pending_jobs += jobs
        room.pending_size += size
        return room

    def ended(self, endpoint_id: str) -> None:
        """A job that had run has ended: the queue moves."""
        second = self._clock.now_ms() // 1000
        ended = self._room(endpoint_id).ended
        if ended and ended[-1][0] == second:
            ended[-1] = (second, ended[-1][1] + 1)
        else:
            ended.append((second, 1))
            while ended[0][0] <= second - _DRAIN_MS // 1000:
                ended.popleft()

    def forget(self, endpoint_id: str) -> None:
        """Ask the store again next time: the queue was emptied."""
        room = self._rooms.get(endpoint_id)
        if room is not None:
            room.asked_ms = None

    def drop_endpoint(self, endpoint_id: str) -> None:
        """Forget a deleted endpoint."""
        self._rooms.pop(endpoint_id, None)

    def _room(self, endpoint_id: str) -> _Room:
        """What is known of an endpoint; of a deleted one it is not kept."""
        room = self._rooms.get(endpoint_id)
        if room is None:
            room = _Room()
            if self._lives(endpoint_id):
                self._rooms[endpoint_id] = room
        return room

    def _fits(self, room: _Room, jobs: int, size: int) -> bool:
        if room.asked_ms is None or room.jobs < jobs or room.size < size:
            return False
        return 0 <= self._clock.now_ms() - room.asked_ms < _TRUSTED_MS

    async def _ask(self, endpoint: Endpoint, room: _Room) -> None:
        asked_ms = self._clock.now_ms()
        demand = await self._store.demand(endpoint.id, overdue_before_ms=0)
        limits = self._limits
        bound = queue_bound(limits.queue_jobs, workers_max=endpoint.workers_max, profile=limits.profile)
        # What is on its way may or may not be counted already; a full queue may err on the safe side.
        room.jobs = bound - demand.queued - demand.queued_low - room.pending_jobs
        room.size = limits.queue_bytes - demand.queued_bytes - room.pending_size
        room.asked_ms = asked_ms

    def _full(self, endpoint: Endpoint, room: _Room, jobs: int) -> QueueFullError:
        limits = self._limits
        since = self._clock.now_ms() // 1000 - _DRAIN_MS // 1000
        ended = sum(count for second, count in room.ended if second > since)
        if room.jobs < jobs:
            bound = queue_bound(limits.queue_jobs, workers_max=endpoint.workers_max, profile=limits.profile)
            what, excess = f"{bound} jobs", jobs - room.jobs
        else:
            # How many jobs these bytes are is not known; at least one must leave.
            what, excess = f"{limits.queue_bytes} bytes of inputs", max(1, jobs)
        # A queue that does not move may wait for its first worker.
        start_s = None if ended else self._start_s(endpoint)
        return QueueFullError(
            f"rate limit exceeded: the queue of endpoint {endpoint.id} is full ({what})",
            retry_after_s=start_s or retry_after_full_s(excess, ended=ended, window_ms=_DRAIN_MS),
        )
