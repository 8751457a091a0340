"""What `gateway.slots` counts, who asks it for a slot, and who chooses the worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pilotlight.alarms import Alarm, alarm_at
from pilotlight.core.routing import pick_least_loaded
from pilotlight.domain.key import NORMAL_SHARE
from pilotlight.domain.worker import Registration

SUSPENSION_S = 1.0
"""How long a worker is passed over that could not be reached or broke off. By then its end is known, or it
can be reached again."""


@dataclass(slots=True)
class WorkerSlots:
    """The slots of one worker. `registration` is None for a worker that only takes jobs.

    Attributes:
        worker_id: Whose.
        endpoint_id: Whose it is.
        configured: Slots that it was opened with.
        capacity: Slots that it has now: fewer while `SlotTable.limit_worker` says so.
        registration: How it is reached.
        number: Its place among the workers of its endpoint, which are ordered by when they were opened first.
        limit: What `limit_worker` said last.
        open: Whether it takes anything.
        resumption: Ends its suspension, if it is passed over for a moment.
        requests: Slots in use by requests.
        jobs: Slots in use by jobs.
        idle_since_ms: Since when none was in use, if none is.
    """

    worker_id: str
    endpoint_id: str
    configured: int
    capacity: int
    registration: Registration | None
    number: int = 0
    limit: int | None = None
    open: bool = True
    resumption: Alarm | None = None
    requests: int = 0
    jobs: int = 0
    idle_since_ms: int = 0

    @property
    def occupied(self) -> int:
        """Slots in use on both roads."""
        return self.requests + self.jobs

    @property
    def suspended(self) -> bool:
        """Whether it is passed over for a moment."""
        return self.resumption is not None

    @property
    def free(self) -> int:
        """Slots that may be taken."""
        return max(0, self.capacity - self.occupied) if self.open and not self.suspended else 0

    def resize(self, configured: int, limit: int | None) -> None:
        """Give it as many slots as it is opened with, or as many as it is held to if that is fewer."""
        self.configured, self.limit = configured, limit
        self.capacity = configured if limit is None else min(configured, limit)

    def suspend(self, seconds: float, resume: Callable[[WorkerSlots], None]) -> None:
        """Pass it over for a while, unless it is passed over for longer already; then call `resume`."""
        until_s = asyncio.get_running_loop().time() + seconds
        if self.resumption is None or self.resumption.moment_s < until_s:
            self.resume()
            self.resumption = alarm_at(until_s, resume, self)

    def resume(self) -> None:
        """Pass it over no longer; harmless if it is not."""
        if self.resumption is not None:
            self.resumption.cancel()
            self.resumption = None

    @property
    def takes_requests(self) -> bool:
        """Whether requests may be sent to it."""
        return self.open and not self.suspended and self.registration is not None


@dataclass(slots=True)
class Ask:
    """A request that asks for a slot. Its maker changes nothing while it waits or is served.

    Attributes:
        body_bytes: Size of its body, which is held while it waits.
        key_id: Whose it is; keys share an endpoint fairly.
        share: Of the key (`ApiKey.share`): one with twice the share is served twice as much.
        priority: Among the requests of its key; smaller comes first.
        cost: What it is expected to cost (`core.fair_queue`).
        session: Requests of one session should meet the same worker; empty for none.
        prefix: Makes the hashes of the blocks of its prompt, if a router wants them.
        tried: Ids of workers that must not get it: they had it already.
        charged: The table's own note of what the account of the key was charged.
    """

    body_bytes: int
    key_id: str = ""
    share: int = NORMAL_SHARE
    priority: int = 0
    cost: int = 1
    session: str = ""
    prefix: Callable[[], Sequence[int]] | None = None
    tried: frozenset[str] = frozenset()
    charged: int = 0


class Router(Protocol):
    """Decides which worker gets a request."""

    def pick(self, endpoint_id: str, candidates: Sequence[WorkerSlots], ask: Ask) -> WorkerSlots | None:
        """One of the candidates, each of which has a free slot and takes requests; None if none will do now.

        Args:
            endpoint_id: Whom the request calls.
            candidates: At least one, the oldest worker first. Not to be changed or kept.
            ask: The request.
        """

    def forget(self, worker_id: str) -> None:
        """A worker takes no more requests: what is known of it counts no longer. May be said twice."""


class LeastShare:
    """The router of a table that is given none: the smallest share of slots in use."""

    def pick(
        self,
        endpoint_id: str,  # noqa: ARG002 - the protocol's
        candidates: Sequence[WorkerSlots],
        ask: Ask,  # noqa: ARG002 - the protocol's
    ) -> WorkerSlots | None:
        """The candidate with the smallest share of its slots in use."""
        return pick_least_loaded(candidates)

    def forget(self, worker_id: str) -> None:
        """Nothing is remembered."""
