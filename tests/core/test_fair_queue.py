"""Fair sharing between keys: the bounds that its module promises, and what they mean for light keys."""

from __future__ import annotations

import heapq
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.fair_queue import FairQueue, cost_of, expected_tokens

SHARES = {"a": 1, "b": 4, "c": 16, "d": 4}
COST_MAX = 40


class Engine:
    """Some slots, a queue, and what every key was served; what is announced and what it costs may differ."""

    def __init__(self, slots: int, credit: int = 0) -> None:
        self.queue: FairQueue[tuple[str, int]] = FairQueue(credit)
        self.credit = credit
        self.slots = slots
        self.running: list[tuple[str, int, int]] = []
        self.served = dict.fromkeys(SHARES, 0)
        self.granted: list[tuple[str, int]] = []

    def ask(self, key: str, number: int = 0) -> None:
        self.queue.join(key, SHARES[key], (key, number))

    def grant(self, announced: int) -> str | None:
        place = self.queue.first()
        if place is None or len(self.running) == self.slots:
            return None
        self.running.append((place.item[0], self.queue.take(place, announced), announced))
        self.granted.append(place.item)
        return place.item[0]

    def end(self, which: int, cost: int) -> None:
        key, charged, announced = self.running.pop(which % len(self.running))
        self.queue.settle(key, charged, announced, cost)
        self.served[key] += cost

    def bound(self, one: str, other: str) -> Fraction:
        cost = 2 * (self.slots + 1) * COST_MAX + self.credit
        return cost * (Fraction(1, SHARES[one]) + Fraction(1, SHARES[other]))


costs = st.integers(1, COST_MAX)
allowances = st.sampled_from([0, COST_MAX, 10 * COST_MAX])
steps = st.lists(st.tuples(st.sampled_from(sorted(SHARES)), costs, st.integers(0, 9), costs), max_size=60)


def live(engine: Engine, script, *, backlogged: tuple[str, ...] = ()):
    """Ask, grant and end as the script says, the backlogged keys asking again whenever they are granted."""
    for key, announced, which, cost in script:
        if key not in backlogged:
            engine.ask(key)
        while (granted := engine.grant(announced)) is not None:
            if granted in backlogged:
                engine.ask(granted)
        yield
        if engine.running:
            engine.end(which, cost)


@given(st.integers(1, 5), allowances, steps, steps)
def test_keys_that_both_wait_are_served_by_their_shares(slots, credit, before, script):
    engine = Engine(slots, credit)
    for _ in live(engine, before):
        pass
    for key in ("a", "b"):
        engine.ask(key)
    start = dict(engine.served)
    for _ in live(engine, script * 3, backlogged=("a", "b")):
        one, other = (Fraction(engine.served[key] - start[key], SHARES[key]) for key in ("a", "b"))
        assert abs(one - other) <= engine.bound("a", "b")


@given(st.integers(1, 5), allowances, steps, steps)
def test_no_key_is_passed_over_for_more_than_the_bound(slots, credit, before, script):
    engine = Engine(slots, credit)
    engine.ask("c")
    for _ in live(engine, before, backlogged=("c",)):
        pass
    engine.ask("a", number=-1)
    start = dict(engine.served)
    for _ in live(engine, script * 3, backlogged=("b", "c", "d")):
        if ("a", -1) in engine.granted:
            return
        for key in ("b", "c", "d"):
            passed = Fraction(engine.served[key] - start[key], SHARES[key])
            assert passed <= engine.bound("a", key)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("join"), st.sampled_from(sorted(SHARES)), st.integers(-2, 2)),
            st.tuples(st.sampled_from(["take", "leave", "serve", "settle"]), st.integers(0, 99), costs),
        ),
        max_size=80,
    )
)
def test_every_request_is_taken_or_leaves_once_and_first_of_its_key_come_first(script):
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    waiting, under_way, number = {}, [], 0
    for verb, what, extra in script:
        if verb == "join":
            number += 1
            item = (what, extra, number)
            waiting[item] = queue.join(what, SHARES[what], item, priority=extra)
        elif verb == "serve":
            key = sorted(SHARES)[what % 4]
            under_way.append((key, queue.serve(key, SHARES[key], extra), extra))
        elif verb == "settle":
            if under_way:
                key, charged, announced = under_way.pop(what % len(under_way))
                queue.settle(key, charged, announced, None if what % 3 == 0 else what)
        elif waiting:
            place = queue.first() if verb == "take" else waiting[sorted(waiting)[what % len(waiting)]]
            assert place is not None
            if verb == "take":
                key, priority, came = place.item
                rivals = [other for other in waiting if other[0] == key]
                assert min((one[1], one[2]) for one in rivals) == (priority, came)
                under_way.append((key, queue.take(place, extra), extra))
            else:
                queue.leave(place)
            del waiting[place.item]
        assert sorted(queue) == sorted(waiting)
        assert [place.item for place in queue.in_order()] == list(queue)
        assert (len(queue), queue.under_way) == (len(waiting), len(under_way))


@pytest.mark.parametrize(("credit", "first"), [(0, 0), (30, 3)])
def test_rest_gives_no_credit_but_what_is_allowed(credit, first):
    """1. `d` is served once and rests while `b` is served a lot. 2. Then both wait, and take turns."""
    engine = Engine(1, credit)
    for key, count in (("d", 1), ("b", 50)):
        for _ in range(count):
            engine.ask(key)
            engine.grant(10)
            engine.end(0, 10)
    engine.granted.clear()
    for key in ("b", "d"):
        for _ in range(6):
            engine.ask(key)
    for _ in range(12):
        engine.grant(10)
        engine.end(0, 10)
    turns = "".join(key for key, _ in engine.granted)
    assert turns.lstrip("d").startswith("bdb")
    assert turns.index("b") in {first, first + 1}


def test_what_was_used_while_nobody_else_asked_is_no_debt():
    """1. Both ask once. 2. `b` has the engine for itself. 3. When `d` comes back they take turns."""
    engine = Engine(1)
    for key in ("d", *["b"] * 50):
        engine.queue.settle(key, engine.queue.serve(key, SHARES[key], 10), 10, 10)
    for key in ("d", "b"):
        for _ in range(8):
            engine.ask(key)
    for _ in range(8):
        engine.grant(10)
        engine.end(0, 10)
    assert "".join(key for key, _ in engine.granted) == "ddbdbdbd"


def test_who_has_more_than_its_part_of_a_full_queue():
    queue: FairQueue[str] = FairQueue()
    assert queue.surplus("b", 4) == []
    for number in range(6):
        queue.join("a", 1, f"a{number}")
    for number in range(8):
        queue.join("c", 16, f"c{number}")
    assert [place.item for place in queue.surplus("b", 4)] == ["a5", "a4", "a3", "a2", "a1"]
    assert queue.surplus("a", 1) == []
    queue.join("b", 1, "b0")
    assert [place.item for place in queue.surplus("b", 1)] == ["a5", "a4", "a3", "a2"]


def test_requests_under_way_count_before_they_have_cost_anything():
    engine = Engine(4)
    for key in ("b", "d"):
        for _ in range(4):
            engine.ask(key)
    assert [engine.grant(10) for _ in range(4)] == ["b", "d", "b", "d"]


@pytest.mark.parametrize(("announced", "cost"), [(4000, 20), (20, 20)])
def test_what_a_key_announces_too_much_it_is_not_charged_for_long(announced, cost):
    """Who leaves `max_tokens` at its default is served as much as who says what it needs."""
    engine = Engine(8)
    for key in ("b", "d"):
        for _ in range(8):
            engine.ask(key)
    for _ in range(400):
        while len(engine.running) < engine.slots:
            head = engine.queue.first().item[0]
            engine.ask(head)
            engine.grant(announced if head == "b" else 20)
        engine.end(0, cost)
    assert 0.8 < engine.served["b"] / engine.served["d"] < 1.25


def test_requests_that_did_nothing_teach_nothing():
    """Else a key could be charged next to nothing for requests under way, by having many refused before."""
    queue: FairQueue[str] = FairQueue()
    fresh = queue.serve("b", 4, 4000)
    for _ in range(100):
        queue.settle("a", queue.serve("a", 4, 4000), 4000, 0)
    assert queue.serve("a", 4, 4000) == fresh


def test_accounts_that_say_nothing_are_forgotten():
    queue: FairQueue[str] = FairQueue()
    for number in range(5000):
        queue.settle(f"k{number}", queue.serve(f"k{number}", 4, 10), 10, 10)
    assert len(queue._accounts) <= 512


def waits(arrivals: list[tuple[float, str, int]], slots: int) -> list[float]:
    """How long the light keys wait at an engine of a fixed token rate, one token a millisecond and slot."""
    queue: FairQueue[tuple[float, str, int]] = FairQueue()
    ends: list[tuple[float, int, str, int, int]] = []
    waited, number = [], 0
    events = [(at, 1, index) for index, (at, _, _) in enumerate(arrivals)]
    heapq.heapify(events)
    free = slots
    while events or ends:
        if ends and (not events or ends[0][0] <= events[0][0]):
            now, _, key, charged, tokens = heapq.heappop(ends)
            queue.settle(key, charged, tokens, tokens)
            free += 1
        else:
            now, _, index = heapq.heappop(events)
            queue.join(arrivals[index][1], 4, arrivals[index])
        while free and (place := queue.first()) is not None:
            came, key, tokens = place.item
            number += 1
            heapq.heappush(ends, (now + tokens, number, key, queue.take(place, tokens), tokens))
            free -= 1
            if key != "greedy":
                waited.append(now - came)
    return sorted(waited)


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("tokens", [50, 400])
def test_one_greedy_key_against_nine_light_ones(slots, tokens):
    """The light ones wait no longer than alone and for one slot: p95, a third of the engine's rate asked for."""
    draw = random.Random(7)
    light, now = [], 0.0
    for _ in range(600):
        now += draw.expovariate(slots / 300)
        light.append((now, f"light{draw.randrange(9)}", 100))
    greedy = [(0.0, "greedy", tokens)] * int(now * slots / tokens)
    alone, crowded = waits(light, slots), waits(greedy + light, slots)
    p95 = int(len(light) * 0.95)
    assert crowded[p95] <= alone[p95] + max(tokens, 100)


def test_what_requests_cost_and_are_expected_to():
    assert cost_of(10, 7) == 24
    assert expected_tokens(400, 50) == (101, 50)
    assert expected_tokens(0, None) == (1, 256)
    assert expected_tokens(0, 10**6) == (1, 4096)
    assert expected_tokens(0, -(10**6)) == (1, 0), "nobody is given tokens for asking for fewer than none"
