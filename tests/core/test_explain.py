"""The story of a job and why it waits."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from pilotlight.core.explain import (
    Moment,
    WaitReason,
    WaitSnapshot,
    WorkerSight,
    explain_wait,
    timeline,
)
from pilotlight.core.lifecycle import (
    Cancelled,
    Confirmed,
    ResultPosted,
    Retried,
    Taken,
    TtlReached,
    WorkerLost,
    apply,
)
from pilotlight.domain.job import Job, Lane
from pilotlight.domain.worker import WorkerState

NOW = 100_000


def new_job():
    return Job(
        id="a-u1", endpoint_id="e", created_ms=1000, queued_ms=1000, expires_ms=90_000,
        execution_timeout_ms=5000, retention_ms=1000,
    )  # fmt: skip


def after(job, *events):
    for event in events:
        job = apply(job, event).after
    return job


def told(job):
    return [(one.event.value, one.at_ms, one.attempt, one.worker_id, one.reason) for one in timeline(job)]


def test_new_job():
    assert told(new_job()) == [("queued", 1000, None, None, None)]


def test_job_that_ran():
    job = after(
        new_job(),
        Taken(worker_id="w1", now_ms=1100),
        Confirmed(worker_id="w1", now_ms=1200),
        ResultPosted(worker_id="w1", now_ms=1500, output=b"1"),
    )
    job = replace(job, first_output_ms=1300)
    assert told(job) == [
        ("queued", 1000, None, None, None),
        ("leased", 1100, 1, "w1", None),
        ("started", 1200, 1, "w1", None),
        ("first_output", 1300, 1, "w1", None),
        ("finished", 1500, 1, "w1", "COMPLETED"),
    ]


def test_lost_worker():
    """serverless-api.md §2.10: one re-dispatch, then FAILED with its story."""
    job = after(
        new_job(),
        Taken(worker_id="w1", now_ms=1100),
        WorkerLost(worker_id="w1", now_ms=1200, reason="exit status 1"),
        Taken(worker_id="w2", now_ms=1300),
        WorkerLost(worker_id="w2", now_ms=1400, reason="signal 9"),
    )
    assert told(job) == [
        ("queued", 1000, None, None, None),
        ("leased", 1100, 1, "w1", None),
        ("requeued", 1200, 1, "w1", "exit status 1"),
        ("leased", 1300, 2, "w2", None),
        ("finished", 1400, 2, "w2", "FAILED: job timed out after 1 retries"),
    ]


def test_retry_by_the_client():
    """serverless-api.md §2.15: the earlier end stays in the story."""
    job = after(
        new_job(),
        Taken(worker_id="w1", now_ms=1100),
        ResultPosted(worker_id="w1", now_ms=1200, error="boom"),
        Retried(now_ms=2000, expires_ms=90_000),
        Taken(worker_id="w1", now_ms=2100),
    )
    assert told(job) == [
        ("queued", 1000, None, None, None),
        ("leased", 1100, 1, "w1", None),
        ("finished", 1200, 1, "w1", "FAILED: boom"),
        ("requeued", 2000, None, None, "retried by the client"),
        ("leased", 2100, 2, "w1", None),
    ]


def test_jobs_that_ended_in_the_queue():
    cancelled = after(new_job(), Cancelled(now_ms=1500))
    assert told(cancelled)[1:] == [("finished", 1500, None, None, "CANCELLED")]
    expired = after(new_job(), TtlReached(now_ms=1500), Retried(now_ms=1600, expires_ms=90_000))
    assert [event for event, *_ in told(expired)] == ["queued", "finished", "requeued"]


def test_long_errors_are_cut():
    job = after(
        new_job(),
        Taken(worker_id="w1", now_ms=1100),
        ResultPosted(worker_id="w1", now_ms=1200, error="x" * 5000),
    )
    last = timeline(job)[-1]
    assert last.event is Moment.FINISHED
    assert len(last.reason) == 500


def sight(state=WorkerState.READY, *, worker="w1", stage="ready", since=NOW, occupied=0, free=1):
    return WorkerSight(id=worker, state=state, stage=stage, stage_ms=since, occupied=occupied, free=free)


def why(**changes):
    values = {"lane": Lane.NORMAL, "ahead": 0, "normal_ahead": 0, "workers_max": 3, "workers": ()}
    wait = explain_wait(WaitSnapshot(**{**values, **changes}), NOW)
    return wait.reason, wait.detail


STARTING = sight(WorkerState.STARTING, stage="loading_weights", since=NOW - 12_000, free=0)


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"workers_max": 0}, WaitReason.PAUSED, "the endpoint is paused: its workersMax is 0"),
        (
            {"retry_ms": NOW + 30_000, "failures": 3, "failure": "CUDA out of memory"},
            WaitReason.BACKING_OFF,
            "no worker could be started (3 failed starts in a row): CUDA out of memory; the next try is in 30 s",
        ),
        (
            {"retry_ms": NOW + 30_000, "failures": 1},
            WaitReason.BACKING_OFF,
            "no worker could be started (1 failed start in a row); the next try is in 30 s",
        ),
        (
            {"workers": (STARTING,), "retry_ms": NOW + 30_000},
            WaitReason.STARTING,
            "worker w1 is starting: at stage loading_weights for 12 s",
        ),
        (
            {"workers": (STARTING, STARTING)},
            WaitReason.STARTING,
            "worker w1 is starting: at stage loading_weights for 12 s, and 1 more",
        ),
        ({"throttled": "no GPU is free"}, WaitReason.NO_CAPACITY, "no room for a worker: no GPU is free"),
        (
            {"lane": Lane.LOW},
            WaitReason.LOW_PRIORITY,
            "no worker is up, and jobs of low priority start none",
        ),
        (
            {"workers": (sight(WorkerState.DRAINING),)},
            WaitReason.DRAINING,
            "1 worker finishing other work before the end",
        ),
        (
            {"workers": (sight(WorkerState.FROZEN),)},
            WaitReason.NO_WORKER,
            "no worker is up; one is about to be started",
        ),
        ({"retry_ms": NOW}, WaitReason.NO_WORKER, "no worker is up; one is about to be started"),
        (
            {"workers": (sight(),), "lane": Lane.LOW, "normal_ahead": 7, "ahead": 7},
            WaitReason.BEHIND_NORMAL,
            "it has low priority, and 7 jobs of normal priority must be served first",
        ),
        (
            {"workers": (sight(occupied=4, free=0), sight(occupied=4, free=0)), "ahead": 1},
            WaitReason.BUSY,
            "all 8 slots of 2 workers are in use, and 1 job must be served before it",
        ),
        (
            {"workers": (sight(occupied=4, free=0),)},
            WaitReason.BUSY,
            "all 4 slots of 1 worker are in use",
        ),
        ({"workers": (sight(occupied=1, free=0),)}, WaitReason.BUSY, "the only slot is in use"),
        ({"workers": (sight(),), "ahead": 2}, WaitReason.POSITION, "2 jobs must be served before it"),
        (
            {"workers": (sight(),)},
            WaitReason.NEXT,
            "it is next: a worker with a free slot takes it as soon as it asks for work",
        ),
        ({"workers": (sight(),), "workers_max": 0, "ahead": 1}, WaitReason.POSITION, None),
    ],
)
def test_why_a_job_waits(changes, reason, detail):
    found, text = why(**changes)
    assert found is reason
    assert detail is None or text == detail


def test_how_many_come_first_is_told_with_every_reason():
    snapshot = WaitSnapshot(lane=Lane.NORMAL, ahead=9, normal_ahead=0, workers_max=0, workers=())
    assert explain_wait(snapshot, NOW).ahead == 9
