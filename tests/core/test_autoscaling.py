"""decide_scale: RunPod's two rules, the idle timeout, revisions and back-off (serverless-api.md §5.2, §5.5)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.autoscaling import (
    ScaleReason,
    ScaleSettings,
    ScaleSnapshot,
    WorkerView,
    decide_scale,
)
from pilotlight.domain.endpoint import ScalerType
from pilotlight.domain.worker import WorkerState

NOW = 1_000_000


def settings(**changes):
    values = {
        "workers_min": 0,
        "workers_max": 3,
        "idle_timeout_ms": 60_000,
        "scaler": ScalerType.QUEUE_DELAY,
        "scaler_value": 4.0,
        "concurrency": 30,
        "flashboot": False,
    }
    return ScaleSettings(**(values | changes))


def worker(name="w", state=WorkerState.READY, *, occupied=0, capacity=30, idle_for_ms=0, current=True):
    idle = NOW - idle_for_ms if state is WorkerState.READY and not occupied else None
    return WorkerView(
        id=name, state=state, current=current, occupied=occupied, capacity=capacity, idle_since_ms=idle
    )


def test_nothing_to_do_asks_for_no_further_look():
    decision = decide_scale(ScaleSnapshot(), NOW, settings())
    assert (decision.start, decision.drain, decision.next_ms) == (0, (), None)


def test_the_first_request_starts_one_worker_at_once():
    """serverless-api.md §5.2, §12 item 32: waiting for nothing only adds latency."""
    decision = decide_scale(ScaleSnapshot(waiting=500, oldest_ms=NOW), NOW, settings())
    assert (decision.start, decision.reason) == (1, ScaleReason.FIRST_REQUEST)


def test_low_priority_jobs_start_nothing():
    """serverless-api.md §2.3: `policy.lowPriority` never triggers scale-up."""
    assert decide_scale(ScaleSnapshot(waiting_low=5), NOW, settings()).start == 0


def test_a_starting_worker_counts_so_that_a_burst_does_not_over_provision():
    snapshot = ScaleSnapshot(
        workers=(worker(state=WorkerState.STARTING),), waiting=30, overdue=30, oldest_ms=NOW - 5000
    )
    assert decide_scale(snapshot, NOW, settings()).start == 0


@pytest.mark.parametrize(("overdue", "start"), [(30, 0), (31, 1), (60, 1), (61, 2), (1000, 2)])
def test_queue_delay_adds_one_worker_per_concurrency_overdue(overdue, start):
    """W = 1 starting with 30 slots; max 3 bounds the rest."""
    snapshot = ScaleSnapshot(
        workers=(worker(state=WorkerState.STARTING),), waiting=overdue, overdue=overdue, oldest_ms=NOW - 4001
    )
    decision = decide_scale(snapshot, NOW, settings())
    assert decision.start == start


def test_queue_delay_waits_until_the_delay_has_passed():
    snapshot = ScaleSnapshot(workers=(worker(occupied=30),), waiting=9, overdue=0, oldest_ms=NOW - 4000)
    decision = decide_scale(snapshot, NOW, settings())
    assert decision.start == 0
    assert decision.next_ms == NOW + 1000


def test_a_worker_with_more_in_hand_than_it_is_to_have_only_has_no_slot_free():
    """Its engine shows strain, which has lowered its capacity from 30; one that starts takes all who wait."""
    strained, starting = worker(occupied=20, capacity=12), worker(state=WorkerState.STARTING)
    alone = ScaleSnapshot(workers=(strained,), waiting=9, overdue=1, oldest_ms=NOW - 4001)
    assert decide_scale(alone, NOW, settings()).start == 1
    both = ScaleSnapshot(workers=(strained, starting), waiting=30, overdue=30, oldest_ms=NOW - 4001)
    assert decide_scale(both, NOW, settings()).start == 0


def test_queue_delay_from_a_full_worker():
    snapshot = ScaleSnapshot(workers=(worker(occupied=30),), waiting=9, overdue=1, oldest_ms=NOW - 4001)
    decision = decide_scale(snapshot, NOW, settings())
    assert (decision.start, decision.reason) == (1, ScaleReason.QUEUE_DELAY)


@pytest.mark.parametrize(
    ("waiting", "running", "start"), [(0, 0, 0), (1, 0, 1), (4, 0, 1), (4, 1, 2), (99, 9, 3)]
)
def test_request_count(waiting, running, start):
    chosen = settings(scaler=ScalerType.REQUEST_COUNT, scaler_value=4)
    snapshot = ScaleSnapshot(waiting=waiting, in_progress=running, oldest_ms=NOW)
    assert decide_scale(snapshot, NOW, chosen).start == start


def test_an_idle_worker_ends_exactly_at_the_idle_timeout():
    early = decide_scale(ScaleSnapshot(workers=(worker(idle_for_ms=59_999),)), NOW, settings())
    assert (early.drain, early.next_ms) == ((), NOW + 1)
    late = decide_scale(ScaleSnapshot(workers=(worker(idle_for_ms=60_000),)), NOW, settings())
    assert (late.drain, late.reason) == (("w",), ScaleReason.IDLE_TIMEOUT)


def test_a_low_priority_job_keeps_a_worker_from_idling_out():
    snapshot = ScaleSnapshot(workers=(worker(idle_for_ms=90_000),), waiting_low=1)
    assert decide_scale(snapshot, NOW, settings()).drain == ()


def test_the_minimum_is_started_and_kept():
    chosen = settings(workers_min=2)
    decision = decide_scale(ScaleSnapshot(), NOW, chosen)
    assert (decision.start, decision.reason) == (2, ScaleReason.BELOW_MINIMUM)
    kept = ScaleSnapshot(workers=tuple(worker(name, idle_for_ms=90_000) for name in "abc"))
    assert decide_scale(kept, NOW, chosen).drain == ("c",)


def test_max_zero_pauses_and_drains():
    decision = decide_scale(
        ScaleSnapshot(workers=(worker(),), waiting=3, oldest_ms=NOW), NOW, settings(workers_max=0)
    )
    assert (decision.start, decision.drain) == (0, ("w",))


def test_a_lowered_maximum_ends_starting_and_idle_workers_before_busy_ones():
    workers = (worker("busy", occupied=3), worker("idle"), worker("new", WorkerState.STARTING))
    decision = decide_scale(ScaleSnapshot(workers=workers), NOW, settings(workers_max=1))
    assert set(decision.drain) == {"idle", "new"}


def test_workers_of_an_older_revision_are_drained_and_do_not_count():
    workers = (worker("old", occupied=2, current=False),)
    decision = decide_scale(ScaleSnapshot(workers=workers, waiting=1, oldest_ms=NOW), NOW, settings())
    assert (decision.drain, decision.start) == (("old",), 1)


def test_a_worker_out_of_rotation_is_replaced_when_somebody_waits_and_there_is_room():
    """serverless-api.md §3: an unhealthy worker is removed from rotation, and may stay so for 8 minutes."""
    sick = replace(worker("sick"), healthy=False)
    rules = settings(scaler=ScalerType.REQUEST_COUNT, scaler_value=4, workers_max=2)
    waiting = ScaleSnapshot(workers=(sick,), waiting=1, oldest_ms=NOW)
    assert decide_scale(waiting, NOW, rules).start == 1
    assert decide_scale(waiting, NOW, replace(rules, workers_max=1)).start == 0
    assert decide_scale(waiting, NOW, replace(rules, workers_max=1)).drain == ()
    both = ScaleSnapshot(workers=(sick, worker("well")), waiting=1, oldest_ms=NOW)
    assert (decide_scale(both, NOW, rules).start, decide_scale(both, NOW, rules).drain) == (0, ())
    assert decide_scale(ScaleSnapshot(workers=(sick,)), NOW, rules).start == 0


def test_back_off_starts_nothing_and_names_the_moment_to_look_again():
    snapshot = ScaleSnapshot(waiting=1, oldest_ms=NOW, retry_ms=NOW + 30_000)
    decision = decide_scale(snapshot, NOW, settings())
    assert (decision.start, decision.reason, decision.next_ms) == (0, ScaleReason.BACKING_OFF, NOW + 30_000)
    over = decide_scale(ScaleSnapshot(waiting=1, oldest_ms=NOW, retry_ms=NOW), NOW, settings())
    assert over.start == 1


states = st.sampled_from([WorkerState.STARTING, WorkerState.READY, WorkerState.DRAINING, WorkerState.FROZEN])


@st.composite
def snapshots(draw):
    count = draw(st.integers(0, 6))
    workers = tuple(
        worker(
            f"w{number}",
            draw(states),
            occupied=draw(st.integers(0, 3)),
            capacity=3,
            idle_for_ms=draw(st.integers(0, 100_000)),
            current=draw(st.booleans()),
        )
        for number in range(count)
    )
    waiting = draw(st.integers(0, 50))
    return ScaleSnapshot(
        workers=workers,
        waiting=waiting,
        waiting_low=draw(st.integers(0, 3)),
        oldest_ms=NOW - draw(st.integers(0, 20_000)) if waiting else None,
        overdue=draw(st.integers(0, waiting)),
        in_progress=sum(each.occupied for each in workers),
        retry_ms=draw(st.none() | st.integers(NOW - 5, NOW + 5)),
    )


@given(
    snapshots(),
    st.integers(0, 3),
    st.integers(0, 5),
    st.sampled_from(list(ScalerType)),
)
def test_never_exceeds_the_maximum_never_drains_a_busy_current_worker_within_it(snapshot, low, high, scaler):
    chosen = settings(workers_min=min(low, high), workers_max=high, scaler=scaler, concurrency=3)
    decision = decide_scale(snapshot, NOW, chosen)
    alive = {
        each.id: each for each in snapshot.workers if each.current and each.state in {"starting", "ready"}
    }
    assert decision.start >= 0
    assert decision.start == 0 or len(alive) + decision.start <= high
    known = {each.id for each in snapshot.workers}
    assert set(decision.drain) <= known
    assert len(set(decision.drain)) == len(decision.drain)
    if len(alive) <= high:
        assert not any(alive[name].occupied for name in decision.drain if name in alive)
        assert len(alive) - len([name for name in decision.drain if name in alive]) >= min(
            len(alive), chosen.workers_min
        )
    if snapshot.waiting and not alive and high and (snapshot.retry_ms is None or snapshot.retry_ms <= NOW):
        assert decision.start >= 1
    assert decision.next_ms is None or decision.next_ms > NOW
