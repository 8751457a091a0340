"""The capacity of a worker: lowered to what its engine runs, raised again step by step, never swinging."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.engine_capacity import (
    CALM_MS,
    GAP_MS,
    UNKNOWN_MS,
    CapacityReason,
    CapacityState,
    EngineReading,
    decide_capacity,
)

NOW = 10_000_000


class Engine:
    """One engine's capacity, reading by reading, a second apart."""

    def __init__(self, configured=30):
        self.configured = configured
        self.state = CapacityState()
        self.now = NOW
        self.decision = None

    def says(self, running, waiting, *, cache=0.5, preemptions=0, occupied=None, times=1, after_ms=1000):
        reading = EngineReading(running=running, waiting=waiting, cache_use=cache, preemptions=preemptions)
        for _ in range(times):
            self._decide(reading, running + waiting if occupied is None else occupied, after_ms)
        return self.decision.capacity

    def is_silent(self, *, times=1, after_ms=1000):
        for _ in range(times):
            self._decide(None, 5, after_ms)
        return self.decision.capacity

    def _decide(self, reading, occupied, after_ms):
        self.now += after_ms
        self.decision = decide_capacity(
            self.state, reading, self.now, occupied=occupied, configured=self.configured
        )
        self.state = self.decision.state

    @property
    def reason(self):
        return self.decision.reason


def test_an_engine_without_strain_keeps_what_is_configured():
    engine = Engine()
    assert engine.says(30, 0, times=3) == 30
    assert (engine.decision.limit, engine.reason) == (None, CapacityReason.CONFIGURED)


def test_requests_that_wait_for_one_reading_change_nothing():
    """A prompt waits for the next step of the engine, and a burst for its prefill."""
    engine = Engine()
    assert engine.says(2, 20) == 30
    assert engine.says(22, 0) == 30
    assert engine.says(2, 20) == 30


def test_what_waits_for_longer_lowers_it_to_what_runs_and_one_to_follow():
    engine = Engine()
    assert engine.says(18, 12, times=2) == 18 + 2
    assert engine.reason is CapacityReason.WAITING
    # Those that wait in it already run down: not a reason to go lower.
    assert engine.says(18, 5, times=2) == 20
    assert engine.says(18, 2) == 20
    assert engine.reason is CapacityReason.SETTLED


def test_a_moment_in_which_next_to_nothing_runs_counts_for_little():
    """Seen with vLLM while it preempts: 12 running, then 1, half a second later 15."""
    engine = Engine()
    engine.says(15, 15, times=2)
    assert engine.says(12, 18) == 16
    assert engine.says(1, 29) == 13
    assert engine.says(15, 15, times=2) == 13


def test_it_falls_by_half_at_most_at_a_time_and_never_below_one():
    engine = Engine(configured=400)
    fallen = [engine.says(1, 399) for _ in range(12)]
    assert fallen[:4] == [400, 200, 100, 50]
    assert fallen[-1] == 2
    assert engine.says(0, 9, times=5) == 1


def test_requests_of_several_sequences_count_as_the_slots_that_they_take():
    """Four requests of eight sequences each, of which the engine runs sixteen."""
    engine = Engine(configured=4)
    assert engine.says(16, 16, occupied=4, times=2) == 3
    assert engine.says(16, 8, occupied=3, times=5) == 3


def test_a_full_cache_lets_no_more_in_before_anybody_waits():
    engine = Engine(configured=16)
    assert engine.says(9, 0, cache=0.97, times=2) == 9
    assert engine.reason is CapacityReason.CACHE_FULL
    assert engine.says(9, 0, cache=0.92, times=3) == 9
    assert engine.reason is CapacityReason.SETTLED
    assert engine.says(8, 0, cache=0.85) == 10


def test_one_slot_is_always_left():
    assert Engine(configured=2).says(0, 0, cache=1.0, times=5) == 1


def test_preemptions_are_strain_although_nobody_waits_any_more():
    engine = Engine()
    engine.says(20, 0, preemptions=3)
    engine.says(20, 0, preemptions=5)
    assert engine.says(20, 0, preemptions=9) == 22
    assert engine.reason is CapacityReason.WAITING
    assert engine.says(20, 0, preemptions=9) == 24


def test_a_counter_that_began_anew_is_no_preemption():
    engine = Engine()
    engine.says(20, 0, preemptions=50)
    assert engine.says(20, 0, preemptions=2, times=3) == 30


def test_it_is_raised_by_a_little_at_first_and_by_a_quarter_when_it_has_been_calm():
    engine = Engine(configured=100)
    engine.says(32, 30, times=2)
    engine.says(32, 30)
    assert engine.decision.capacity == 35
    assert [engine.says(30, 0) for _ in range(3)] == [38, 41, 44]
    assert engine.says(44, 1) == 44, "somebody waits: as much as it can do"
    assert [engine.says(30, 0) for _ in range(2)] == [47, 50]
    assert [engine.says(30, 0, after_ms=CALM_MS) for _ in range(4)] == [63, 79, 99, 100]
    assert engine.decision.limit is None


def test_an_engine_that_is_empty_has_everything_back_for_the_next_burst():
    """Seen with vLLM: 64 long answers fill its cache, end together, and the next 64 had to wait for slots."""
    engine = Engine(configured=64)
    engine.says(63, 1, cache=0.99, preemptions=0)
    assert engine.says(30, 20, cache=0.99, preemptions=20, times=2, occupied=64) < 64
    assert engine.says(0, 0, cache=0.0, preemptions=25) == 64
    assert (engine.decision.limit, engine.reason) == (None, CapacityReason.CONFIGURED)
    assert engine.says(64, 0, cache=0.3, preemptions=25, times=2) == 64, "preemptions that are over"


def test_a_change_is_given_time_to_show():
    engine = Engine()
    engine.says(10, 20, times=2)
    assert engine.says(10, 0, after_ms=100) == 15
    assert engine.says(10, 0, after_ms=900) == 16


def test_a_silent_engine_keeps_its_limit_for_a_while():
    engine = Engine()
    assert engine.is_silent() == 30
    assert engine.reason is CapacityReason.UNKNOWN
    engine.says(10, 20, times=2)
    assert engine.decision.capacity == 15
    assert engine.is_silent(times=UNKNOWN_MS // 1000 - 1) == 15
    assert engine.is_silent(times=2) == 30
    assert engine.state == CapacityState()


@pytest.mark.parametrize("between", [lambda engine: engine.is_silent(), lambda engine: None])
def test_strain_does_not_last_through_what_nobody_saw(between):
    engine = Engine()
    engine.says(10, 20)
    between(engine)
    assert engine.says(10, 20, after_ms=GAP_MS + 1) == 30
    assert engine.says(10, 20) < 30


def test_a_smaller_configured_concurrency_holds_at_once():
    engine = Engine()
    engine.says(18, 12, times=2)
    engine.configured = 12
    assert engine.says(18, 0) == 12
    assert engine.decision.limit is None


readings = st.one_of(
    st.none(),
    st.builds(
        EngineReading,
        running=st.integers(0, 300),
        waiting=st.integers(0, 300),
        cache_use=st.floats(0, 1),
        preemptions=st.integers(0, 50),
    ),
)


@given(
    steps=st.lists(st.tuples(readings, st.integers(0, 300), st.integers(1, 40_000)), max_size=40),
    configured=st.integers(1, 300),
)
def test_whatever_is_said_it_stays_between_one_and_the_configured_and_falls_only_for_a_reason(
    steps, configured
):
    state, now, before = CapacityState(), NOW, configured
    for reading, occupied, after_ms in steps:
        now += after_ms
        decision = decide_capacity(state, reading, now, occupied=occupied, configured=configured)
        assert 1 <= decision.capacity <= configured
        assert decision.limit == (None if decision.capacity == configured else decision.capacity)
        if decision.capacity < before:
            assert decision.reason in {CapacityReason.WAITING, CapacityReason.CACHE_FULL}
            assert decision.capacity >= before // 2
        state, before = decision.state, decision.capacity


@given(
    steps=st.lists(st.tuples(readings, st.integers(0, 300), st.integers(1, 40_000)), max_size=40),
    configured=st.integers(1, 300),
)
def test_after_whatever_was_said_an_engine_at_ease_has_everything_back_in_time(steps, configured):
    state, now = CapacityState(), NOW
    for reading, occupied, after_ms in steps:
        now += after_ms
        state = decide_capacity(state, reading, now, occupied=occupied, configured=configured).state
    calm = EngineReading(running=1, waiting=0, preemptions=50)
    capacities = []
    # A minute: 10 s in which what came before is remembered, then by a quarter a second.
    for _ in range(60):
        now += 1000
        decision = decide_capacity(state, calm, now, occupied=1, configured=configured)
        state = decision.state
        capacities.append(decision.capacity)
    assert capacities[-1] == configured
    assert capacities[1:] == sorted(capacities[1:])


@given(
    room=st.integers(1, 64),
    configured=st.integers(1, 128),
    service_s=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_under_lasting_load_it_settles_where_the_engine_is_full_and_few_wait_in_it(
    room, configured, service_s, seed
):
    """An engine that runs `room` requests at a time, and a queue at the gateway that never ends.

    Each second some requests end, and the gateway fills the slots up again; the rest wait in the engine.
    """
    draw = random.Random(seed)
    state, now, capacity = CapacityState(), NOW, configured
    in_engine, capacities, starved = 0, [], 0
    for second in range(240):
        now += 1000
        in_engine = max(in_engine, capacity)
        running = min(in_engine, room)
        reading = EngineReading(running=running, waiting=in_engine - running, cache_use=0.5)
        decision = decide_capacity(state, reading, now, occupied=in_engine, configured=configured)
        state, capacity = decision.state, decision.capacity
        if second >= 60:
            capacities.append(capacity)
            starved += running < min(room, configured)
        in_engine -= sum(draw.random() < 1 / service_s for _ in range(running))
    assert starved == 0
    assert max(capacities) - min(capacities) <= 1 + room // 16
    assert max(capacities) <= min(configured, room + 2 + room // 16)
