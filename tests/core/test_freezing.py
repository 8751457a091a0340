"""Evictions: what is frozen is a cache, with budgets, an age, and no claim against workers that are needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.freezing import (
    LOOK_MS,
    EvictionReason,
    FreezeSettings,
    FrozenView,
    HostMemory,
    clear_gpus,
    decide_evictions,
    make_room,
)
from pilotlight.core.placement import Gpu, HostResources, Placed, Reservation, Resources, decide_placement

NOW = 10_000_000
GIB = 2**30


def settings(**changes):
    values = {
        "memory_bytes": 8 * GIB,
        "gpu_memory_bytes": 2 * GIB,
        "age_ms": 100_000,
        "pressure_percent": 10.0,
        "available_bytes_min": GIB,
    }
    return FreezeSettings(**(values | changes))


def view(name, *, for_ms=1000, memory=2.0, gpu=0.0, devices=()):
    return FrozenView(
        id=name,
        since_ms=NOW - for_ms,
        memory_bytes=int(memory * GIB),
        devices=devices,
        gpu_memory_bytes=int(gpu * GIB),
    )


def evicted(*views, available=16.0, pressure=None, **changes):
    host = HostMemory(total_bytes=16 * GIB, available_bytes=int(available * GIB), pressure_percent=pressure)
    decision = decide_evictions(views, host, NOW, settings(**changes))
    return [(each.id, each.reason) for each in decision.evict]


def test_nothing_frozen_needs_no_look():
    decision = decide_evictions((), HostMemory(total_bytes=1, available_bytes=0), NOW, settings())
    assert (decision.evict, decision.next_ms) == ((), None)


def test_least_recently_used_first_until_the_budget_is_kept():
    views = [view("c", for_ms=1), view("a", for_ms=3), view("b", for_ms=2)]
    assert evicted(*views, memory_bytes=6 * GIB) == []
    assert evicted(*views, memory_bytes=4 * GIB) == [("a", EvictionReason.BUDGET)]
    assert [name for name, _ in evicted(*views, memory_bytes=1)] == ["a", "b", "c"]


def test_nobody_ends_for_nothing():
    """The old one is small: without the big one the budget is kept, with it in place of that it is not."""
    assert evicted(view("old", for_ms=9, memory=1), view("big", memory=8)) == [("big", EvictionReason.BUDGET)]


def test_without_a_budget_it_is_half_of_the_host():
    views = [view("a", for_ms=2, memory=4), view("b", for_ms=1, memory=4.5)]
    assert evicted(*views, memory_bytes=None) == [("a", EvictionReason.BUDGET)]


def test_an_old_one_ends_exactly_at_its_age():
    assert evicted(view("a", for_ms=99_999)) == []
    assert evicted(view("a", for_ms=100_000)) == [("a", EvictionReason.AGE)]
    host = HostMemory(total_bytes=16 * GIB, available_bytes=16 * GIB)
    assert decide_evictions([view("a", for_ms=99_999)], host, NOW, settings()).next_ms == NOW + 1
    assert decide_evictions([view("a", for_ms=0)], host, NOW, settings()).next_ms == NOW + LOOK_MS


def test_every_gpu_has_its_budget():
    views = [
        view("both", for_ms=4, gpu=1.5, devices=(0, 1)),
        view("zero", for_ms=3, gpu=1, devices=(0,)),
        view("cpu", for_ms=2),
        view("two", for_ms=1, gpu=2, devices=(2,)),
    ]
    assert evicted(*views) == [("both", EvictionReason.GPU_BUDGET)]
    assert evicted(*views, gpu_memory_bytes=None) == []


def test_memory_that_others_need_is_given_back():
    views = [view("a", for_ms=2), view("b", for_ms=1)]
    assert evicted(*views, available=1) == []
    assert evicted(*views, available=0.5) == [("a", EvictionReason.AVAILABLE)]
    # What ends for its age gives its memory back as well.
    assert evicted(view("old", for_ms=200_000), view("b"), available=0.5) == [("old", EvictionReason.AGE)]
    assert len(evicted(*views, available=0, available_bytes_min=9 * GIB)) == 2


@pytest.mark.parametrize(("pressure", "ended"), [(None, 0), (9.99, 0), (10.0, 1), (80.0, 1)])
def test_pressure_ends_one_at_a_time(pressure, ended):
    assert len(evicted(view("a", for_ms=2), view("b", for_ms=1), pressure=pressure)) == ended
    already = evicted(view("old", for_ms=200_000), view("b"), pressure=80.0)
    assert already == [("old", EvictionReason.AGE)]


HOST = HostResources(memory_bytes_total=16 * GIB, memory_bytes_available=6 * GIB)


def test_room_is_made_with_the_least_recently_used():
    frozen = [view("new", for_ms=1), view("old", for_ms=9)]
    assert make_room(Resources(memory_bytes=6 * GIB), HOST, frozen, []) == ()
    assert make_room(Resources(memory_bytes=7 * GIB), HOST, frozen, []) == ("old",)
    assert make_room(Resources(memory_bytes=10 * GIB), HOST, frozen, []) == ("old", "new")
    assert make_room(Resources(memory_bytes=11 * GIB), HOST, frozen, []) is None


def test_room_is_made_among_promises_and_no_frozen_worker_ends_for_nothing():
    others = [Reservation(memory_bytes=10 * GIB)]
    frozen = [view("small", for_ms=9, memory=1), view("big", memory=4)]
    assert make_room(Resources(memory_bytes=2 * GIB), HOST, frozen, others, memory_reserve_bytes=0) == (
        "big",
    )


def test_gpus_of_frozen_workers_need_nobody_to_end():
    host = replace(HOST, gpus=(Gpu(index=0, name="H200", memory_bytes=141 * GIB),))
    need = Resources(gpu_count=1, memory_bytes=GIB)
    assert make_room(need, host, [view("a", devices=(0,))], []) == ()
    assert make_room(need, host, [view("a")], [Reservation(devices=(0,))]) is None


def test_gpus_are_cleared_of_what_an_engine_would_miss():
    """A twentieth may be left, on each of those that are given."""
    gpus = [Gpu(index=index, name="L4", memory_bytes=20 * GIB) for index in (0, 1)]
    old = view("old", for_ms=9, gpu=0.75, devices=(0,))
    new = view("new", for_ms=1, gpu=0.75, devices=(0, 1))
    assert clear_gpus((0,), gpus, [new, old]) == ("old",)
    assert clear_gpus((0, 1), gpus, [new, old]) == ("old",)
    assert clear_gpus((1,), gpus, [new, old]) == ()
    assert clear_gpus((0,), gpus, [new]) == ()
    assert clear_gpus((), gpus, [view("big", gpu=9, devices=(0,))]) == ()
    assert clear_gpus((0, 1), gpus, [old, view("big", gpu=9, devices=(0, 1))]) == ("big",)


sizes = st.integers(0, 6).map(lambda half_gib: half_gib * GIB // 2)


@st.composite
def frozen_views(draw):
    count = draw(st.integers(0, 6))
    return [
        FrozenView(
            id=f"w{number}",
            since_ms=NOW - draw(st.integers(0, 120_000)),
            memory_bytes=draw(sizes),
            devices=draw(st.sampled_from([(), (0,), (1,), (0, 1)])),
            gpu_memory_bytes=draw(sizes),
        )
        for number in range(count)
    ]


hosts = st.builds(
    HostMemory,
    total_bytes=sizes.map(lambda size: size * 4),
    available_bytes=sizes,
    pressure_percent=st.none() | st.floats(0, 100),
)
choices = st.builds(
    FreezeSettings,
    memory_bytes=st.none() | sizes,
    gpu_memory_bytes=st.none() | sizes,
    age_ms=st.integers(1, 120_000),
    pressure_percent=st.just(10.0),
    available_bytes_min=sizes,
)


@given(frozen_views(), hosts, choices)
def test_what_stays_keeps_every_bound(frozen, host, chosen):
    decision = decide_evictions(frozen, host, NOW, chosen)
    gone = {each.id for each in decision.evict}
    assert len(gone) == len(decision.evict)
    kept = [each for each in frozen if each.id not in gone]
    budget = host.total_bytes // 2 if chosen.memory_bytes is None else chosen.memory_bytes
    assert sum(each.memory_bytes for each in kept) <= budget
    assert all(NOW - each.since_ms < chosen.age_ms for each in kept)
    for device in (0, 1):
        held = sum(each.gpu_memory_bytes for each in kept if device in each.devices)
        assert chosen.gpu_memory_bytes is None or held <= chosen.gpu_memory_bytes
    freed = sum(each.memory_bytes for each in frozen if each.id in gone)
    enough = host.available_bytes + freed >= chosen.available_bytes_min
    assert enough or not any(each.memory_bytes for each in kept)
    assert (decision.next_ms is None) == (not kept)
    assert decision.next_ms is None or NOW < decision.next_ms <= NOW + LOOK_MS


@given(frozen_views(), st.integers(0, 20).map(lambda half_gib: half_gib * GIB // 2), st.randoms())
def test_a_budget_ends_as_few_as_it_takes_the_least_recently_used(frozen, budget, random):
    ample = HostMemory(total_bytes=99 * GIB, available_bytes=99 * GIB)
    chosen = settings(memory_bytes=budget, gpu_memory_bytes=None, age_ms=10**9)
    decision = decide_evictions(frozen, ample, NOW, chosen)
    gone = [each.id for each in decision.evict]
    held = sum(each.memory_bytes for each in frozen if each.id not in gone)
    by_id = {each.id: each for each in frozen}
    # Nobody ended could stay, nor could a more recent one have ended alone in place of the last of them.
    assert all(held + by_id[name].memory_bytes > budget for name in gone)
    ordered = sorted(frozen, key=lambda each: (each.since_ms, each.id))
    last = max((ordered.index(by_id[name]) for name in gone), default=-1)
    before = ordered[: max(0, last)]
    assert not gone or sum(each.memory_bytes for each in frozen if each not in before) > budget
    random.shuffle(frozen)
    assert decide_evictions(frozen, ample, NOW, chosen) == decision


@given(
    frozen_views(),
    st.builds(Resources, gpu_count=st.integers(0, 2), memory_bytes=sizes),
    st.lists(st.builds(Reservation, devices=st.sampled_from([(), (0,)]), memory_bytes=sizes), max_size=3),
    sizes,
)
def test_room_made_is_room_enough_and_not_more(frozen, need, others, available):
    host = HostResources(
        memory_bytes_total=12 * GIB,
        memory_bytes_available=available,
        gpus=tuple(Gpu(index=index, name="H200", memory_bytes=GIB) for index in (0, 1)),
    )

    def fits(ended):
        left = [each.reservation for each in frozen if each.id not in ended]
        given_back = sum(each.memory_bytes for each in frozen if each.id in ended)
        freed = replace(host, memory_bytes_available=available + given_back)
        return isinstance(decide_placement(need, freed, [*others, *left]), Placed)

    ended = make_room(need, host, frozen, others)
    if ended is None:
        assert not fits({each.id for each in frozen})
        return
    assert fits(ended)
    assert not any(fits([name for name in ended if name != spared]) for spared in ended)
