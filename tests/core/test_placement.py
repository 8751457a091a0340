"""Placement: GPUs by count, memory by promises and by present use."""

from __future__ import annotations

import pytest

from pilotlight.core.placement import (
    Gpu,
    HostResources,
    NotPlaced,
    Placed,
    PlacementReason,
    Reservation,
    Resources,
    decide_placement,
)

GIB = 2**30


def host(total=16, available=16, gpus=0):
    return HostResources(
        memory_bytes_total=total * GIB,
        memory_bytes_available=available * GIB,
        gpus=tuple(Gpu(index=index, name="H200", memory_bytes=141 * GIB) for index in range(gpus)),
    )


def need(memory=4, gpus=0):
    return Resources(gpu_count=gpus, memory_bytes=memory * GIB)


def held(memory=4, devices=(), starting=False, frozen=False):
    return Reservation(devices=tuple(devices), memory_bytes=memory * GIB, starting=starting, frozen=frozen)


def decide(need, host, *taken, reserve=1):
    return decide_placement(need, host, taken, memory_reserve_bytes=reserve * GIB)


def reason(decision):
    assert isinstance(decision, NotPlaced)
    return decision.reason


def test_the_lowest_free_gpus_are_given():
    assert decide(need(1, gpus=2), host(gpus=4), held(1, [0]), held(1, [2])) == Placed(devices=(1, 3))


def test_a_worker_without_gpus_is_a_cpu_worker_also_beside_gpus():
    assert decide(need(), host(gpus=2)) == Placed(devices=())
    assert decide(need(1), host(gpus=1), held(1, [0])) == Placed(devices=())


def test_gpus_in_use_are_told_from_gpus_that_do_not_exist():
    busy = decide(need(1, gpus=2), host(gpus=2), held(1, [1]))
    assert reason(busy) is PlacementReason.GPUS_TAKEN
    assert not busy.reason.permanent
    assert "1 of 2 are free" in busy.message
    never = decide(need(1, gpus=3), host(gpus=2))
    assert reason(never) is PlacementReason.HOST_HAS_FEWER_GPUS
    assert never.reason.permanent
    assert never.message == "the worker needs 3 GPUs, this host has 2"


def test_gpus_that_are_held_but_gone_from_the_host_do_not_matter():
    assert decide(need(1, gpus=1), host(gpus=1), held(1, [7])) == Placed(devices=(0,))


def test_gpus_of_frozen_workers_are_given_when_no_others_are_left():
    frozen = held(1, [0], frozen=True)
    assert decide(need(1, gpus=1), host(gpus=2), frozen) == Placed(devices=(1,))
    assert decide(need(1, gpus=2), host(gpus=2), frozen) == Placed(devices=(0, 1))
    assert decide(need(1, gpus=1), host(gpus=2), frozen, held(1, [1])) == Placed(devices=(0,))
    again = decide(need(1, gpus=1), host(gpus=2), frozen, held(1, [1]), held(1, [0]))
    assert reason(again) is PlacementReason.GPUS_TAKEN


def test_a_frozen_worker_counts_with_what_it_holds():
    assert decide(need(6), host(available=10), held(6), held(3, frozen=True)) == Placed()
    refused = decide(need(7), host(available=10), held(6), held(3, frozen=True))
    assert reason(refused) is PlacementReason.MEMORY_PROMISED


def test_the_reserve_is_never_given():
    assert decide(need(15), host()) == Placed()
    never = decide(need(16), host())
    assert reason(never) is PlacementReason.HOST_HAS_LESS_MEMORY
    assert "needs 16.0 GiB" in never.message
    assert "1.0 GiB kept in reserve" in never.message


def test_promises_count_even_where_they_are_not_used_yet():
    """Two idle workers have touched little of their 6 GiB each; a third must not be given what is theirs."""
    refused = decide(need(4), host(available=14), held(6), held(6))
    assert reason(refused) is PlacementReason.MEMORY_PROMISED
    assert not refused.reason.permanent


def test_the_use_of_running_workers_is_not_counted_twice():
    """16 GiB, two ready workers that use 3 of 4 each, 2 used by others: 8 available, and 4 of them fit."""
    assert decide(need(4), host(available=8), held(4), held(4)) == Placed()


def test_starting_workers_have_yet_to_take_their_memory():
    """Two starts in a row: the first has taken nothing so far, so what is available is promised to it."""
    assert decide(need(4), host(available=7)) == Placed()
    refused = decide(need(4), host(available=7), held(4, starting=True))
    assert reason(refused) is PlacementReason.MEMORY_IN_USE
    assert decide(need(4), host(available=7), held(4, starting=False)) == Placed()


def test_other_programs_on_the_host_are_seen():
    refused = decide(need(4), host(available=3))
    assert reason(refused) is PlacementReason.MEMORY_IN_USE
    assert "3.0 GiB are available now" in refused.message


def test_memory_that_exactly_fits_is_enough():
    assert decide(need(4), host(total=9, available=4), held(4)) == Placed()


def test_a_lasting_obstacle_is_named_before_a_passing_one():
    assert (
        reason(decide(need(64, gpus=1), host(gpus=1), held(1, [0]))) is PlacementReason.HOST_HAS_LESS_MEMORY
    )


@pytest.mark.parametrize("wrong", [{"gpu_count": -1}, {"memory_bytes": -1}])
def test_negative_needs_are_a_programmers_error(wrong):
    with pytest.raises(AssertionError):
        decide_placement(Resources(**wrong), host(), [])
