"""How much one client may ask of one endpoint, and how long a queue may grow.

The limits of the profile `runpod` (serverless-api.md §2.2, §2.14) and the bounds that always hold, as pure
functions. `gateway.jobs.rates` counts requests and asks `decide_rate`; `gateway.jobs.bounds` counts jobs and
asks `queue_bound` and `retry_after_full_s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

WINDOW_MS = 10_000
"""Requests are counted over the last ten seconds (serverless-api.md §2.14)."""


class OperationGroup(StrEnum):
    """Operations that share one count; each of §2.2's rows, with rows 3 to 5 together."""

    RUN = "run"
    RUNSYNC = "runsync"
    READ = "status"
    CANCEL = "cancel"
    RETRY = "retry"
    PURGE = "purge-queue"
    HEALTH = "health"
    REQUESTS = "requests"
    OPENAI = "openai"
    BATCH = "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """The limit of one group, per API key and endpoint.

    Attributes:
        requests: Requests in ten seconds.
        concurrent: Requests under way at once; None for no limit.
        per_worker: What each running worker allows in ten seconds; counts where that is more.
    """

    requests: int
    concurrent: int | None
    per_worker: int = 0


RUNPOD_LIMITS: Mapping[OperationGroup, RateLimit] = MappingProxyType(
    {
        OperationGroup.RUN: RateLimit(requests=1000, concurrent=200, per_worker=200),
        OperationGroup.RUNSYNC: RateLimit(requests=2000, concurrent=400, per_worker=400),
        OperationGroup.READ: RateLimit(requests=2000, concurrent=400, per_worker=400),
        OperationGroup.CANCEL: RateLimit(requests=100, concurrent=20, per_worker=20),
        OperationGroup.RETRY: RateLimit(requests=100, concurrent=20, per_worker=20),
        OperationGroup.PURGE: RateLimit(requests=2, concurrent=None),
        OperationGroup.HEALTH: RateLimit(requests=2000, concurrent=400, per_worker=400),
        OperationGroup.REQUESTS: RateLimit(requests=10, concurrent=2),
        OperationGroup.OPENAI: RateLimit(requests=2000, concurrent=400, per_worker=400),
        OperationGroup.BATCH: RateLimit(requests=100, concurrent=20, per_worker=20),
    }
)
"""serverless-api.md §2.2; `per_worker` as in §2.14 and §12 item 29."""


class RateReason(StrEnum):
    """Why a request was admitted or refused."""

    WITHIN = "within"
    TOO_MANY = "too_many"
    TOO_MANY_AT_ONCE = "too_many_at_once"


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSnapshot:
    """What one key has asked of one endpoint in one group.

    Attributes:
        counted: Requests admitted in the last ten seconds.
        oldest_ms: When the first of them came; None with none.
        under_way: Requests that are being answered now.
        workers_running: Workers of the endpoint that are up.
    """

    counted: int
    oldest_ms: int | None
    under_way: int
    workers_running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RateDecision:
    """The decision; the last two are set when the request is refused."""

    reason: RateReason
    limit: int = 0
    retry_after_s: int = 0

    @property
    def admitted(self) -> bool:
        """Whether the request may be served."""
        return self.reason is RateReason.WITHIN


def decide_rate(snapshot: RateSnapshot, now_ms: int, limit: RateLimit) -> RateDecision:
    """Whether one more request is within the limit (serverless-api.md §2.14).

    Args:
        snapshot: The count at this moment, without the request.
        now_ms: The moment.
        limit: Of its group.
    """
    if limit.concurrent is not None and snapshot.under_way >= limit.concurrent:
        return RateDecision(reason=RateReason.TOO_MANY_AT_ONCE, limit=limit.concurrent, retry_after_s=1)
    allowed = max(limit.requests, snapshot.workers_running * limit.per_worker)
    if snapshot.counted < allowed:
        return RateDecision(reason=RateReason.WITHIN)
    oldest_ms = now_ms if snapshot.oldest_ms is None else snapshot.oldest_ms
    seconds = -(-(oldest_ms + WINDOW_MS - now_ms) // 1000)
    return RateDecision(
        reason=RateReason.TOO_MANY, limit=allowed, retry_after_s=max(1, min(seconds, WINDOW_MS // 1000))
    )


_QUEUE_FREE = 50
_QUEUE_PER_WORKER = 500


def queue_bound(jobs_max: int, *, workers_max: int, profile: str) -> int:
    """Jobs that an endpoint's queue may hold.

    With the profile `runpod` a submission is refused when the queue holds more than 50 jobs and more than
    500 for each worker there may be (serverless-api.md §2.14, §12 item 30): the one that makes it so is the
    last that is accepted.

    Args:
        jobs_max: The bound that always holds.
        workers_max: Of the endpoint.
        profile: `none` or `runpod`.
    """
    if profile != "runpod":
        return jobs_max
    return min(jobs_max, max(_QUEUE_FREE, workers_max * _QUEUE_PER_WORKER) + 1)


RETRY_AFTER_UNKNOWN_S = 5
"""Arbitrary: long enough not to hammer, short enough to notice a freed queue."""

_RETRY_AFTER_FULL_MAX_S = 60
"""A queue that moves this slowly may move faster once another worker is up."""


def retry_after_full_s(excess: int, *, ended: int, window_ms: int) -> int:
    """Seconds after which a full queue will probably have room.

    Args:
        excess: Jobs that must leave the queue first.
        ended: Jobs of the endpoint that ended in the window.
        window_ms: Its length.

    Returns:
        1 to 60; 5 when nothing ended, so that nothing is known.
    """
    if ended <= 0 or window_ms <= 0:
        return RETRY_AFTER_UNKNOWN_S
    seconds = -(-excess * window_ms // (ended * 1000))
    return max(1, min(seconds, _RETRY_AFTER_FULL_MAX_S))
