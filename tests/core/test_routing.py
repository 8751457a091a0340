"""Which worker serves a request: by load, by session, by what it knows of the prompt."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.prefix_index import BOUNDARIES, Look, PrefixIndex
from pilotlight.core.routing import (
    SAMPLE_FROM,
    SESSION_FACTOR,
    SLACK,
    pick_by_prefix,
    pick_by_session,
    pick_least_loaded,
)


@dataclass
class Worker:
    """A candidate."""

    worker_id: str
    occupied: int = 0
    capacity: int = 30


def fleet(*occupied: int, capacity: int = 30) -> list[Worker]:
    return [Worker(f"w{number}", count, capacity) for number, count in enumerate(occupied)]


@st.composite
def fleets(draw: st.DrawFn) -> list[Worker]:
    capacities = draw(st.lists(st.integers(1, 40), min_size=1, max_size=24))
    return [
        Worker(f"w{number}", draw(st.integers(0, capacity - 1)), capacity)
        for number, capacity in enumerate(capacities)
    ]


EMPTY = Look(known=0, turn=0, fresh=0, empty=True)
OTHER = Look(known=1, turn=3, fresh=100, empty=False)
"""A worker that knows other prompts for the model."""
HALF = Look(known=9, turn=5, fresh=100, empty=False)
"""Half of a prompt of 4096 bytes."""
BLOCKS = BOUNDARIES.index(4096) + 1


class TestLeastLoaded:
    def test_the_smallest_share_wins_and_of_equals_the_oldest(self) -> None:
        workers = [Worker("old", 2, 4), Worker("large", 4, 10), Worker("young", 4, 10)]
        assert pick_least_loaded(workers, 0.5).worker_id == "large"
        assert pick_least_loaded(fleet(0, 0, 0)).worker_id == "w0"

    @given(fleets(), st.floats(0, 1, exclude_max=True))
    def test_never_busier_than_what_it_was_compared_with(self, workers: list[Worker], draw: float) -> None:
        picked = pick_least_loaded(workers, draw)
        busier = [
            worker
            for worker in workers
            if worker.occupied / worker.capacity >= picked.occupied / picked.capacity
        ]
        assert len(busier) >= (2 if len(workers) >= SAMPLE_FROM else len(workers))

    def test_draws_reach_every_pair_of_many_workers(self) -> None:
        """Two different ones, never one with itself: the busiest is picked by no draw."""
        count = SAMPLE_FROM
        pairs = count * (count - 1)
        workers = fleet(*range(count))
        picked = Counter(
            pick_least_loaded(workers, (number + 0.5) / pairs).worker_id for number in range(pairs)
        )
        assert picked == {f"w{number}": 2 * (count - 1 - number) for number in range(count - 1)}

    def test_without_a_draw_all_are_compared(self) -> None:
        assert pick_least_loaded(fleet(*[3] * SAMPLE_FROM, 1)).worker_id == f"w{SAMPLE_FROM}"


class TestSession:
    def test_a_session_stays_whatever_others_do(self) -> None:
        homes = {
            session: pick_by_session(fleet(0, 0, 0), session).worker_id for session in map(str, range(60))
        }
        assert min(Counter(homes.values()).values()) > 10
        for session, home in homes.items():
            assert (
                pick_by_session(fleet(*Random(session).choices(range(SLACK), k=3)), session).worker_id == home
            )

    def test_only_the_sessions_of_a_worker_that_goes_move(self) -> None:
        workers = fleet(0, 0, 0, 0)
        for session in map(str, range(60)):
            home = pick_by_session(workers, session).worker_id
            left = [worker for worker in workers if worker.worker_id != "w2"]
            assert home == "w2" or pick_by_session(left, session).worker_id == home

    def test_a_home_that_has_far_more_to_do_than_others_passes_it_on(self) -> None:
        home = int(pick_by_session(fleet(0, 0, 0), "s").worker_id[1])
        loads = [0, 0, 0]
        loads[home] = SLACK
        moved = pick_by_session(fleet(*loads), "s").worker_id
        assert moved != f"w{home}"
        assert pick_by_session(fleet(*loads), "s").worker_id == moved, "its second choice is always the same"

    @given(fleets(), st.text(max_size=9))
    def test_the_load_stays_bounded(self, workers: list[Worker], session: str) -> None:
        picked = pick_by_session(workers, session)
        total = sum(worker.occupied for worker in workers) + 1
        bound = SESSION_FACTOR * total * picked.capacity / sum(worker.capacity for worker in workers)
        assert picked.occupied < max(bound, min(worker.occupied for worker in workers) + SLACK)


class TestPrefix:
    def test_whoever_knows_most_gets_it(self) -> None:
        assert pick_by_prefix(fleet(3, 0), [HALF, OTHER], BLOCKS, gather=True).worker_id == "w0"
        whole = HALF._replace(known=BLOCKS)
        assert pick_by_prefix(fleet(0, 3), [HALF, whole], BLOCKS, gather=True).worker_id == "w1"

    def test_not_when_it_is_far_busier(self) -> None:
        assert pick_by_prefix(fleet(28, 2), [HALF, OTHER], BLOCKS, gather=True).worker_id == "w1"

    def test_of_two_that_know_it_the_last_one_goes_on_until_the_other_is_far_less_busy(self) -> None:
        last = HALF._replace(turn=6)
        assert pick_by_prefix(fleet(2, 1), [last, HALF], BLOCKS, gather=False).worker_id == "w0"
        assert pick_by_prefix(fleet(9, 1), [last, HALF], BLOCKS, gather=False).worker_id == "w1"

    def test_what_is_new_goes_where_there_is_room(self) -> None:
        seen = [OTHER._replace(fresh=900), OTHER._replace(fresh=300)]
        assert pick_by_prefix(fleet(1, 1), seen, BLOCKS, gather=True).worker_id == "w1"

    def test_idle_workers_stay_idle_where_they_may_end(self) -> None:
        seen = [OTHER._replace(fresh=900), OTHER._replace(fresh=300)]
        assert pick_by_prefix(fleet(0, 0), seen, BLOCKS, gather=True).worker_id == "w0"
        assert pick_by_prefix(fleet(0, 0), seen, BLOCKS, gather=False).worker_id == "w1"

    def test_a_worker_that_has_the_adapter_comes_before_one_that_has_not(self) -> None:
        seen = [OTHER._replace(known=0), OTHER]
        assert pick_by_prefix(fleet(1, 2), seen, BLOCKS, gather=False).worker_id == "w1"
        assert pick_by_prefix(fleet(1, 9), seen, BLOCKS, gather=False).worker_id == "w0"

    def test_a_new_worker_gets_work_although_it_has_no_adapter_yet(self) -> None:
        assert pick_by_prefix(fleet(1, 1), [OTHER, EMPTY], BLOCKS, gather=False).worker_id == "w1"

    @given(fleets(), st.data())
    def test_nobody_gets_it_whom_a_less_busy_one_beats(
        self, workers: list[Worker], data: st.DataObject
    ) -> None:
        looks = [
            Look(data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9)), fresh=10, empty=False)
            for _ in workers
        ]
        picked = pick_by_prefix(workers, looks, 9, gather=data.draw(st.booleans()))
        mine = looks[workers.index(picked)]
        for worker, theirs in zip(workers, looks, strict=True):
            freer = worker.occupied * picked.capacity < picked.occupied * worker.capacity
            assert not (freer and theirs.known > mine.known)


class Engine:
    """The prefix cache of a worker: whole blocks of a prompt, the least recently used evicted first."""

    def __init__(self, worker: Worker, size: int) -> None:
        self.worker = worker
        self._size = size
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def read(self, blocks: Sequence[int]) -> int:
        """How many blocks of a prompt were there; all of them are afterwards."""
        hits = next((number for number, block in enumerate(blocks) if block not in self._blocks), len(blocks))
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._size:
            self._blocks.popitem(last=False)
        return hits


Pick = Callable[[list[Worker], Sequence[int]], Worker]


def round_robin() -> Pick:
    turns = iter(range(1_000_000))
    return lambda workers, _: workers[next(turns) % len(workers)]


def by_prefix() -> Pick:
    index = PrefixIndex()

    def pick(workers: list[Worker], blocks: Sequence[int]) -> Worker:
        looks = [index.look(worker.worker_id, blocks) for worker in workers]
        picked = pick_by_prefix(workers, looks, len(blocks), gather=True)
        index.note(picked.worker_id, blocks)
        return picked

    return pick


def simulate(
    pick: Pick, prompts: Sequence[Sequence[int]], *, engines: int, cache: int, at_once: int, common: int
) -> tuple[float, int]:
    """The share of blocks that were cached, and by how many requests the workers differed at most.

    Blocks that all prompts have in common do not count. As many requests as `at_once` are under way; which of them ends next is drawn.
    """
    random = Random(7)
    workers = fleet(*[0] * engines)
    caches = {worker.worker_id: Engine(worker, cache) for worker in workers}
    running: list[Worker] = []
    hits = blocks = uneven = 0
    for prompt in prompts:
        if len(running) == at_once:
            running.pop(random.randrange(at_once)).occupied -= 1
        worker = pick([one for one in workers if one.occupied < one.capacity], prompt)
        worker.occupied += 1
        running.append(worker)
        hits += max(0, caches[worker.worker_id].read(prompt) - common - 1)
        blocks += len(prompt) - common - 1
        loads = [one.occupied for one in workers]
        uneven = max(uneven, max(loads) - min(loads))
    return hits / blocks, uneven


def grouped(groups: int, *, common: int = 0) -> list[list[int]]:
    """Prompts of a model's block, some that all have in common, nine of their group and two of their own."""
    random = Random(3)
    return [
        [0, *range(1, common + 1), *(1000 * group + n for n in range(9)), -2 * number, -2 * number - 1]
        for number in range(1, 801)
        for group in [random.randint(1, groups)]
    ]


@pytest.mark.parametrize("at_once", [4, 16])
@pytest.mark.parametrize("engines", [2, 4])
@pytest.mark.parametrize("common", [0, 8])
def test_prompts_that_begin_alike_meet_again(common: int, engines: int, at_once: int) -> None:
    """Sixteen groups of prompts, of which one engine can keep half: clearly more hits than by turns, and no
    engine left alone with the work."""
    prompts = grouped(16, common=common)
    cache = 90 + common
    by_turns, _ = simulate(
        round_robin(), prompts, engines=engines, cache=cache, at_once=at_once, common=common
    )
    hits, uneven = simulate(
        by_prefix(), prompts, engines=engines, cache=cache, at_once=at_once, common=common
    )
    assert hits >= 1.3 * by_turns
    assert uneven <= (2 * at_once) / engines + SLACK


@given(st.integers(1, 30), st.integers(2, 6), st.integers(1, 40), st.integers(0, 9))
def test_work_is_spread_whatever_the_prompts(groups: int, engines: int, at_once: int, common: int) -> None:
    prompts = grouped(groups, common=common)[:150]
    _, uneven = simulate(by_prefix(), prompts, engines=engines, cache=100, at_once=at_once, common=common)
    assert uneven <= 2 * at_once / engines + SLACK
