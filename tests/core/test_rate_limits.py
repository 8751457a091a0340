"""The profile `runpod` and the bounds of queues (serverless-api.md §2.2, §2.14, §12 items 29, 30)."""

from __future__ import annotations

import pytest

from pilotlight.core.rate_limits import (
    RUNPOD_LIMITS,
    OperationGroup,
    RateDecision,
    RateLimit,
    RateReason,
    RateSnapshot,
    decide_rate,
    queue_bound,
    retry_after_full_s,
)

NOW = 1_000_000


def snapshot(*, counted=0, oldest_ms=None, under_way=0, running=0):
    return RateSnapshot(counted=counted, oldest_ms=oldest_ms, under_way=under_way, workers_running=running)


@pytest.mark.parametrize(
    ("group", "requests", "concurrent"),
    [
        ("run", 1000, 200), ("runsync", 2000, 400), ("status", 2000, 400), ("cancel", 100, 20),
        ("retry", 100, 20), ("purge-queue", 2, None), ("health", 2000, 400), ("requests", 10, 2),
        ("openai", 2000, 400), ("batch", 100, 20),
    ],
)  # fmt: skip
def test_table(group, requests, concurrent):
    """§2.2: requests in 10 s and at once."""
    limit = RUNPOD_LIMITS[OperationGroup(group)]
    assert (limit.requests, limit.concurrent) == (requests, concurrent)


def test_every_group_has_a_limit():
    assert set(RUNPOD_LIMITS) == set(OperationGroup)


def test_last_request_within_the_limit_is_admitted_and_the_next_is_not():
    """§2.14: 10-second window; §13 item 12."""
    limit = RateLimit(requests=3, concurrent=None)
    assert decide_rate(snapshot(counted=2, oldest_ms=NOW - 5000), NOW, limit).admitted
    refused = decide_rate(snapshot(counted=3, oldest_ms=NOW - 5500), NOW, limit)
    assert refused == RateDecision(reason=RateReason.TOO_MANY, limit=3, retry_after_s=5)


@pytest.mark.parametrize(("oldest_ms", "seconds"), [(NOW - 9999, 1), (NOW, 10), (NOW + 5000, 10), (None, 10)])
def test_retry_after_is_when_the_oldest_leaves_the_window(oldest_ms, seconds):
    limit = RateLimit(requests=0, concurrent=None)
    assert decide_rate(snapshot(oldest_ms=oldest_ms), NOW, limit).retry_after_s == seconds


def test_running_workers_raise_the_limit_but_never_lower_it():
    """§2.14: the larger of the base value and running workers times requests per worker."""
    limit = RUNPOD_LIMITS[OperationGroup.RUN]
    full = snapshot(counted=1000, oldest_ms=NOW, running=5)
    assert not decide_rate(full, NOW, limit).admitted
    more = snapshot(counted=1000, oldest_ms=NOW, running=6)
    assert decide_rate(more, NOW, limit).admitted
    assert decide_rate(snapshot(counted=1200, oldest_ms=NOW, running=6), NOW, limit).limit == 1200


def test_requests_at_once():
    """§2.2: the second number."""
    limit = RUNPOD_LIMITS[OperationGroup.CANCEL]
    refused = decide_rate(snapshot(under_way=20, running=100), NOW, limit)
    assert (refused.reason, refused.limit, refused.retry_after_s) == (RateReason.TOO_MANY_AT_ONCE, 20, 1)
    assert decide_rate(snapshot(under_way=19), NOW, limit).admitted


@pytest.mark.parametrize(
    ("jobs_max", "workers_max", "profile", "bound"),
    [
        (1_000_000, 3, "none", 1_000_000),
        (1_000_000, 3, "runpod", 1501),
        (1_000_000, 0, "runpod", 51),
        (1000, 3, "runpod", 1000),
    ],
)
def test_queue_bound(jobs_max, workers_max, profile, bound):
    """§12 item 30: 429 once the queue holds more than 50 jobs and more than 500 for each worker there may be."""
    assert queue_bound(jobs_max, workers_max=workers_max, profile=profile) == bound


@pytest.mark.parametrize(
    ("excess", "ended", "seconds"), [(1, 0, 5), (1, 10, 1), (100, 50, 20), (10_000, 1, 60)]
)
def test_retry_after_of_a_full_queue_comes_from_how_fast_it_moves(excess, ended, seconds):
    """Jobs that must leave, over jobs that ended in ten seconds; 5 s when nothing is known."""
    assert retry_after_full_s(excess, ended=ended, window_ms=10_000) == seconds
