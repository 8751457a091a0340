"""decide_scale with FlashBoot: what is frozen instead of ended, and thawed instead of started."""

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
ALIVE = {WorkerState.STARTING, WorkerState.READY}


def settings(**changes):
    values = {
        "workers_min": 0,
        "workers_max": 3,
        "idle_timeout_ms": 60_000,
        "scaler": ScalerType.QUEUE_DELAY,
        "scaler_value": 4.0,
        "concurrency": 30,
        "flashboot": True,
    }
    return ScaleSettings(**(values | changes))


def worker(name, state, **changes):
    values = {"current": True, "occupied": 0, "capacity": 30, "idle_since_ms": None, "since_ms": NOW - 1000}
    return WorkerView(id=name, state=state, **(values | changes))


def frozen(name, *, for_ms=1000, **changes):
    return worker(name, WorkerState.FROZEN, since_ms=NOW - for_ms, **changes)


def idle(name, *, for_ms=60_000, freezable=True, **changes):
    return worker(name, WorkerState.READY, idle_since_ms=NOW - for_ms, freezable=freezable, **changes)


def starting(name, *, for_ms, **changes):
    return worker(name, WorkerState.STARTING, since_ms=NOW - for_ms, **changes)


def decide(*workers, rules=None, **snapshot):
    if snapshot.get("waiting"):
        snapshot = {"oldest_ms": NOW} | snapshot
    return decide_scale(ScaleSnapshot(workers=workers, **snapshot), NOW, rules or settings())


def test_an_idle_worker_is_frozen_where_it_can_be_and_ended_where_not():
    both = decide(idle("a"), idle("b", freezable=False))
    assert (both.freeze, both.drain, both.reason) == (("a",), ("b",), ScaleReason.IDLE_TIMEOUT)
    off = decide(idle("a"), rules=settings(flashboot=False))
    assert (off.freeze, off.drain) == ((), ("a",))


def test_what_is_too_many_is_ended_not_frozen():
    decision = decide(idle("a"), idle("b"), rules=settings(workers_max=1))
    assert (decision.freeze, decision.drain, decision.reason) == ((), ("b",), ScaleReason.ABOVE_MAXIMUM)


def test_the_first_request_thaws_and_starts_nothing():
    decision = decide(frozen("a"), waiting=1)
    assert (decision.thaw, decision.start, decision.reason) == (("a",), 0, ScaleReason.FIRST_REQUEST)


def test_the_most_recently_frozen_is_thawed_first_and_what_is_missing_then_is_started():
    rules = settings(scaler=ScalerType.REQUEST_COUNT, scaler_value=1)
    workers = (frozen("old", for_ms=9000), frozen("new", for_ms=1000))
    assert decide(*workers, waiting=1, rules=rules).thaw == ("new",)
    decision = decide(*workers, waiting=3, rules=rules)
    assert (decision.thaw, decision.start) == (("new", "old"), 1)


def test_the_minimum_is_thawed_too():
    decision = decide(frozen("a"), rules=settings(workers_min=2))
    assert (decision.thaw, decision.start, decision.reason) == (("a",), 1, ScaleReason.BELOW_MINIMUM)


def test_a_back_off_holds_up_starts_but_no_thaw():
    rules = settings(scaler=ScalerType.REQUEST_COUNT, scaler_value=1)
    decision = decide(frozen("a"), waiting=2, retry_ms=NOW + 1000, rules=rules)
    assert (decision.thaw, decision.start, decision.reason) == (("a",), 0, ScaleReason.REQUEST_COUNT)
    none = decide(frozen("old", current=False), waiting=2, retry_ms=NOW + 1000, rules=rules)
    assert (none.thaw, none.start, none.reason) == ((), 0, ScaleReason.BACKING_OFF)


def test_who_waits_for_a_start_is_served_by_a_thaw():
    """A start takes seconds. One that is being thawed takes none, and one that is ready is only busy."""
    decision = decide(starting("new", for_ms=100), frozen("a"), waiting=1)
    assert (decision.thaw, decision.start, decision.reason) == (("a",), 0, ScaleReason.FIRST_REQUEST)
    assert decision.desired == 2
    for other in (starting("b", for_ms=1, waking=True), idle("b", for_ms=0)):
        assert decide(starting("new", for_ms=100), other, frozen("a"), waiting=1).thaw == ()
    assert decide(starting("new", for_ms=100), frozen("a")).thaw == ()
    taken = decide(starting("new", for_ms=100), frozen("a", devices=(0,)), waiting=1, devices_in_use={0})
    assert (taken.thaw, taken.start) == ((), 0)
    assert taken.desired == 1


def test_low_priority_jobs_thaw_nothing():
    """serverless-api.md §2.3: `policy.lowPriority` never triggers scale-up."""
    assert decide(frozen("a"), waiting_low=3) == decide(frozen("a"))


def test_a_frozen_worker_is_no_capacity_and_asks_for_no_look():
    decision = decide(frozen("a"))
    assert (decision.thaw, decision.drain, decision.desired, decision.next_ms) == ((), (), 0, None)


@pytest.mark.parametrize(
    ("changes", "view", "reason"),
    [
        ({"workers_max": 0}, frozen("a"), ScaleReason.ABOVE_MAXIMUM),
        ({"flashboot": False}, frozen("a"), ScaleReason.FLASHBOOT_OFF),
        ({}, frozen("a", current=False), ScaleReason.NEW_REVISION),
    ],
)
def test_what_can_not_be_thawed_any_more_ends(changes, view, reason):
    decision = decide(view, rules=settings(**changes))
    assert (decision.drain, decision.reason) == (("a",), reason)


def test_beyond_the_maximum_the_oldest_frozen_ones_end():
    workers = [frozen("old", for_ms=9000), frozen("new", for_ms=1000), idle("idle", for_ms=0)]
    decision = decide(*workers, rules=settings(workers_max=2))
    assert (decision.drain, decision.reason) == (("old",), ScaleReason.ABOVE_MAXIMUM)
    assert decide(*workers, rules=settings(workers_max=3)).drain == ()


def test_a_worker_whose_gpu_has_been_given_away_is_not_thawed_and_makes_room_for_another():
    """Two on one GPU would both fail for want of memory."""
    rules = settings(workers_max=1)
    decision = decide(frozen("a", devices=(0,)), waiting=1, devices_in_use=frozenset({0}), rules=rules)
    assert (decision.thaw, decision.start, decision.drain) == ((), 1, ("a",))
    pair = (frozen("old", for_ms=9000, devices=(0, 1)), frozen("new", devices=(1,)))
    decision = decide(*pair, waiting=9, rules=settings(scaler=ScalerType.REQUEST_COUNT, scaler_value=1))
    assert (decision.thaw, decision.start) == (("new",), 2)


@pytest.mark.parametrize(
    ("estimate_ms", "for_ms", "fetching", "start"),
    [
        (None, 600_000, False, 0),
        (20_000, 59_999, False, 0),
        (20_000, 60_000, False, 1),
        (40, 9_999, False, 0),
        (40, 10_000, False, 1),
        (40, 600_000, True, 0),
    ],
)
def test_a_start_that_takes_far_too_long_is_not_waited_for(estimate_ms, for_ms, fetching, start):
    decision = decide(
        starting("slow", for_ms=for_ms, fetching=fetching),
        waiting=3,
        overdue=3,
        oldest_ms=NOW - 5000,
        start_estimate_ms=estimate_ms,
    )
    assert decision.start == start


@st.composite
def views(draw, name):
    state = draw(st.sampled_from([*ALIVE, WorkerState.DRAINING, WorkerState.FROZEN, WorkerState.FROZEN]))
    ready = state is WorkerState.READY
    occupied = draw(st.integers(0, 3)) if ready else 0
    return WorkerView(
        id=name,
        state=state,
        current=draw(st.sampled_from([True, True, True, False])),
        occupied=occupied,
        capacity=3,
        idle_since_ms=NOW - draw(st.integers(0, 100_000)) if ready and not occupied else None,
        healthy=not ready or draw(st.booleans()),
        since_ms=NOW - draw(st.integers(0, 100_000)),
        waking=state is WorkerState.STARTING and draw(st.booleans()),
        fetching=draw(st.booleans()),
        freezable=ready and draw(st.booleans()),
        devices=draw(st.sampled_from([(), (), (0,), (1,), (0, 1)])),
    )


@st.composite
def snapshots(draw):
    workers = tuple(draw(views(f"w{number}")) for number in range(draw(st.integers(0, 7))))
    waiting = draw(st.integers(0, 20))
    return ScaleSnapshot(
        workers=workers,
        waiting=waiting,
        waiting_low=draw(st.integers(0, 1)),
        oldest_ms=NOW - draw(st.integers(0, 20_000)) if waiting else None,
        overdue=draw(st.integers(0, waiting)),
        in_progress=sum(each.occupied for each in workers),
        retry_ms=draw(st.none() | st.integers(NOW - 5, NOW + 5)),
        start_estimate_ms=draw(st.none() | st.integers(0, 30_000)),
        devices_in_use=frozenset(draw(st.sets(st.integers(0, 1)))),
    )


@st.composite
def rules(draw):
    high = draw(st.integers(0, 5))
    return settings(
        workers_min=draw(st.integers(0, high)),
        workers_max=high,
        scaler=draw(st.sampled_from(list(ScalerType))),
        scaler_value=draw(st.sampled_from([1, 4])),
        concurrency=3,
        flashboot=draw(st.sampled_from([True, True, False])),
    )


def ids(snapshot, *states, current=True):
    return {each.id for each in snapshot.workers if each.state in states and each.current is current}


@given(snapshots(), rules())
def test_nobody_is_told_two_things_and_everybody_can_do_what_he_is_told(snapshot, chosen):
    decision = decide_scale(snapshot, NOW, chosen)
    told = [*decision.thaw, *decision.freeze, *decision.drain]
    assert len(told) == len(set(told))
    by_id = {each.id: each for each in snapshot.workers}
    assert set(decision.thaw) <= ids(snapshot, WorkerState.FROZEN)
    assert set(decision.freeze) <= ids(snapshot, WorkerState.READY)
    assert all(by_id[name].freezable and not by_id[name].occupied for name in decision.freeze)
    assert all(by_id[name].state is not WorkerState.DRAINING for name in decision.drain)
    assert chosen.flashboot or not (decision.thaw or decision.freeze)
    assert decision.next_ms is None or decision.next_ms > NOW


@given(snapshots(), rules())
def test_never_more_than_the_maximum_frozen_ones_included(snapshot, chosen):
    decision = decide_scale(snapshot, NOW, chosen)
    left = ids(snapshot, *ALIVE, WorkerState.FROZEN) - set(decision.drain)
    assert len(left) + decision.start <= chosen.workers_max
    assert chosen.flashboot or not left & ids(snapshot, WorkerState.FROZEN)
    gone = ids(snapshot, *ALIVE, WorkerState.FROZEN, current=False)
    assert gone <= set(decision.drain)
    assert not gone & set(decision.thaw)


@given(snapshots(), rules())
def test_what_is_missing_is_thawed_first_and_started_then(snapshot, chosen):
    """Frozen workers are no part of W: without them as many would be started as are thawed and started."""
    snapshot = replace(snapshot, retry_ms=None)
    decision = decide_scale(snapshot, NOW, chosen)
    others = tuple(each for each in snapshot.workers if each.state is not WorkerState.FROZEN)
    without = decide_scale(replace(snapshot, workers=others), NOW, chosen)
    # Where all others are still starting, one more than those is thawed.
    beside = len(decision.thaw) if not without.start else 0
    assert beside <= 1
    assert len(decision.thaw) + decision.start == without.start + beside
    assert decision.desired == without.desired + beside
    assert decision.freeze == without.freeze
    by_id = {each.id: each for each in snapshot.workers}
    if decision.start and chosen.flashboot:
        used = snapshot.devices_in_use.union(*(by_id[name].devices for name in decision.thaw))
        left = ids(snapshot, WorkerState.FROZEN) - set(decision.thaw)
        assert all(used & set(by_id[name].devices) for name in left)
    thawed_ms = [by_id[name].since_ms for name in decision.thaw]
    assert thawed_ms == sorted(thawed_ms, reverse=True)


@given(snapshots(), rules())
def test_thawed_workers_have_their_gpus_to_themselves(snapshot, chosen):
    decision = decide_scale(snapshot, NOW, chosen)
    devices = [device for each in snapshot.workers if each.id in decision.thaw for device in each.devices]
    assert len(devices) == len(set(devices))
    assert snapshot.devices_in_use.isdisjoint(devices)


@given(snapshots(), rules())
def test_a_back_off_changes_starts_and_nothing_else(snapshot, chosen):
    free = decide_scale(replace(snapshot, retry_ms=None), NOW, chosen)
    held_up = decide_scale(replace(snapshot, retry_ms=NOW + 1), NOW, chosen)
    assert held_up.start == 0
    assert (held_up.thaw, held_up.freeze) == (free.thaw, free.freeze)
    assert set(held_up.drain) <= set(free.drain)


@given(snapshots(), rules(), st.integers(0, 20), st.integers(0, 5), st.integers(0, 20_000))
def test_more_demand_never_thaws_less(snapshot, chosen, queued, running, since_ms):
    """What the data path alone asks for can be thawed before anybody has looked into the queue."""
    oldest_ms = min(snapshot.oldest_ms or NOW, NOW - since_ms) if queued else snapshot.oldest_ms
    more = replace(
        snapshot,
        waiting=snapshot.waiting + queued,
        overdue=snapshot.overdue + queued,
        oldest_ms=oldest_ms,
        in_progress=snapshot.in_progress + running,
    )
    few = decide_scale(snapshot, NOW, chosen).thaw
    assert decide_scale(more, NOW, chosen).thaw[: len(few)] == few


@given(snapshots(), rules(), st.randoms())
def test_the_order_of_reading_changes_nothing_for_frozen_workers(snapshot, chosen, random):
    apart = {each.id: replace(each, since_ms=number) for number, each in enumerate(snapshot.workers)}
    snapshot = replace(snapshot, workers=tuple(apart.values()))
    cold = [each for each in snapshot.workers if each.state is WorkerState.FROZEN]
    others = [each for each in snapshot.workers if each.state is not WorkerState.FROZEN]
    random.shuffle(cold)
    decision = decide_scale(snapshot, NOW, chosen)
    shuffled = decide_scale(replace(snapshot, workers=(*others, *cold)), NOW, chosen)
    assert (decision.thaw, decision.freeze) == (shuffled.thaw, shuffled.freeze)
    assert set(decision.drain) == set(shuffled.drain)
