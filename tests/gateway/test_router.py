"""The router in the slot table: policies, sick workers, and what is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from pilotlight.core.admission import AdmissionLimits
from pilotlight.core.outliers import FAILURES_MAX, PAUSE_MS, SAMPLES_MIN
from pilotlight.domain.endpoint import Endpoint, Revision, Routing
from pilotlight.domain.worker import Address, Registration
from pilotlight.gateway.router import FleetRouter
from pilotlight.gateway.slots import Ask, SlotTable, WorkerSlots

REGISTRATION = Registration(engine=Address(url="unix:/engine"))
ENDPOINT = Endpoint(id="e", name="e", revision=Revision(endpoint_id="e", version=1, model="m"))


class Place:
    """A slot table with a router, and a clock that stands still."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000
        self.endpoint = ENDPOINT
        self.suspended: list[tuple[str, float]] = []
        self.router = FleetRouter(
            clock=self,
            endpoint_of=lambda _: self.endpoint,
            draw=lambda: 0.5,
            on_suspend=lambda worker, seconds: self.suspended.append((worker, seconds)),
        )
        self.slots = SlotTable(self, AdmissionLimits(requests=9, bytes=99), router=self.router)

    def now_ms(self) -> int:
        return self.now_ns // 1_000_000

    def monotonic_ns(self) -> int:
        return self.now_ns

    def open(self, *workers: str, capacity: int = 20) -> None:
        for worker in workers:
            self.slots.open_worker("e", worker, capacity=capacity, registration=REGISTRATION)

    def take(self, ask: Ask | None = None) -> WorkerSlots | None:
        return self.slots.admit("e", ask or Ask(1))[1]

    def serve(self, ask: Ask | None = None, *, failed: bool = False, first_byte_ms: int | None = 20) -> str:
        """One request from its slot to its end; who served it."""
        ask = ask or Ask(1)
        slots = self.take(ask)
        assert slots is not None
        self.router.observed(slots.worker_id, failed=failed, first_byte_ms=first_byte_ms)
        self.slots.release_request(slots, ask)
        return slots.worker_id

    def break_down(self, worker: str) -> None:
        for _ in range(FAILURES_MAX):
            self.router.observed(worker, failed=True, first_byte_ms=None)


@pytest.fixture
def place() -> Place:
    return Place()


def prompt(*blocks: int) -> Callable[[], tuple[int, ...]]:
    return lambda: (0, *blocks)


async def test_load_decides_where_nothing_else_is_known(place):
    place.open("a", "b")
    assert [place.take().worker_id for _ in range(4)] == ["a", "b", "a", "b"]
    assert place.serve() == "a"


async def test_a_session_stays_with_its_worker(place):
    place.open("a", "b", "c")
    homes = {name: place.serve(Ask(1, session=name)) for name in "stuvwxyz"}
    assert set(homes.values()) == {"a", "b", "c"}
    busy = [place.take() for _ in range(3)]
    assert {name: place.serve(Ask(1, session=name)) for name in homes} == homes
    assert len(busy) == 3


async def test_a_prompt_goes_where_its_beginning_went(place):
    place.open("a", "b")
    place.endpoint = replace(ENDPOINT, workers_min=2)
    first, second = (Ask(1, prefix=prompt(number, number + 1)) for number in (10, 20))
    assert [place.serve(first), place.serve(second)] == ["a", "b"]
    assert [place.serve(ask) for ask in (second, first, second, second)] == ["b", "a", "b", "b"]
    longer = Ask(1, prefix=prompt(20, 21, 22))
    assert place.serve(longer) == "b"


async def test_idle_workers_above_the_minimum_stay_idle(place):
    place.open("a", "b")
    assert {place.serve(Ask(1, prefix=prompt(number))) for number in range(10, 20)} == {"a"}


async def test_what_a_full_worker_left_to_another_is_known_too(place):
    place.open("a", "b", capacity=1)
    ask = Ask(1, prefix=prompt(10))
    assert place.take().worker_id == "a"
    assert place.take(ask).worker_id == "b"
    for worker in "ab":
        place.slots.release_request(place.slots.worker(worker), ask)
    assert place.serve(ask) == "b"


@pytest.mark.parametrize(
    ("routing", "served"),
    [
        (Routing.AUTO, "session"),
        (Routing.SESSION, "session"),
        (Routing.PREFIX, "prefix"),
        (Routing.LEAST_LOADED, "load"),
    ],
)
async def test_the_endpoint_says_what_counts(place, routing, served):
    """A prompt that one worker knows, of a session that is at home with another, while a third is idle."""
    place.open("a", "b", "c")
    session = next(name for name in map(str, range(99)) if place.serve(Ask(1, session=name)) == "b")
    place.slots.take_of("e", "a", Ask(1))
    place.slots.take_of("e", "b", Ask(1))
    known = Ask(1, prefix=prompt(10, 11))
    knower = place.serve(known)
    assert knower == "c"
    place.slots.take_of("e", "c", Ask(1))
    place.slots.take_of("e", "c", Ask(1))
    place.endpoint = replace(ENDPOINT, routing=routing)
    picked = place.take(Ask(1, session=session, prefix=known.prefix)).worker_id
    assert picked == {"session": "b", "prefix": "c", "load": "a"}[served]


async def test_the_prompt_is_not_looked_at_for_one_worker(place):
    place.open("a")

    def never() -> tuple[int, ...]:
        raise AssertionError("there is nothing to choose")

    assert place.serve(Ask(1, prefix=never)) == "a"


async def test_an_endpoint_that_is_gone_is_served_to_its_end(place):
    place.open("a", "b")
    place.endpoint = None
    assert place.serve(Ask(1, prefix=prompt(10))) == "a"


async def test_a_worker_that_fails_is_suspended_and_let_back_by_one_request(place):
    place.open("a", "b")
    place.serve()
    place.break_down("a")
    assert place.suspended == [("a", PAUSE_MS / 1000)]
    assert {place.take().worker_id for _ in range(3)} == {"b"}
    place.now_ns += PAUSE_MS * 1_000_000
    trial = place.take()
    assert trial.worker_id == "a"
    assert {place.take().worker_id for _ in range(3)} == {"b"}
    place.router.observed("a", failed=False, first_byte_ms=20)
    place.slots.release_request(trial, Ask(1))
    assert {place.take().worker_id for _ in range(3)} == {"a"}


async def test_who_waits_for_a_worker_on_probation_gets_it_when_it_is_well(place):
    """1. The other worker is full, and one request tries the sick one. 2. Another waits, although slots are
    free. 3. The first ends well: the second is served."""
    place.open("a", capacity=4)
    place.open("b", capacity=1)
    place.serve()
    place.break_down("a")
    assert place.take().worker_id == "b"
    place.now_ns += PAUSE_MS * 1_000_000
    trial, granted = place.take(), []
    assert trial.worker_id == "a"
    assert place.take() is None
    place.slots.wait("e", Ask(1), granted.append, pytest.fail)
    assert granted == []
    place.router.observed("a", failed=False, first_byte_ms=20)
    place.slots.release_request(trial, Ask(1))
    assert [slots.worker_id for slots in granted] == ["a"]


async def test_the_only_worker_is_never_suspended(place):
    place.open("a")
    place.serve()
    place.break_down("a")
    place.open("b")
    place.serve()
    place.break_down("a")
    place.slots.close_worker("b")
    assert place.take().worker_id == "a", "b takes nothing any more, so a is the only one again"


async def test_a_slow_worker_is_suspended_unless_it_is_busier(place):
    place.open("a", "b")
    place.serve()
    for _ in range(SAMPLES_MIN):
        for worker in "ab":
            place.router.observed(worker, failed=False, first_byte_ms=50)
    busy = [place.slots.take_of("e", "a", Ask(1)) for _ in range(2)]
    for _ in range(SAMPLES_MIN):
        place.router.observed("a", failed=False, first_byte_ms=60_000)
    assert place.suspended == []
    for slots in busy:
        place.slots.release_request(slots, Ask(1))
    place.router.observed("a", failed=False, first_byte_ms=60_000)
    assert [worker for worker, _ in place.suspended] == ["a"]


async def test_nothing_is_kept_of_workers_that_ended(place):
    place.open("a", "b")
    place.serve(Ask(1, prefix=prompt(10)))
    place.break_down("a")
    for worker in "ab":
        place.slots.drop_worker(worker)
    place.router.observed("a", failed=True, first_byte_ms=None)
    assert (place.router._fleets, place.router._endpoints) == ({}, {})


async def test_who_waits_beside_a_long_trial_is_served_when_another_request_may_follow(place, monkeypatch):
    """Nothing ends meanwhile: the router itself has to say that a worker may be picked again."""
    monkeypatch.setattr("pilotlight.core.outliers.PROBE_MS", 1)
    place.router.on_ready = place.slots.serve_held
    place.open("a", capacity=4)
    place.open("b", capacity=1)
    place.serve()
    place.break_down("a")
    assert place.take().worker_id == "b"
    place.now_ns += PAUSE_MS * 1_000_000
    assert place.take().worker_id == "a"
    assert place.take() is None
    granted = asyncio.get_running_loop().create_future()
    place.slots.wait("e", Ask(1), granted.set_result, pytest.fail)
    place.now_ns += 1_000_000
    async with asyncio.timeout(20):
        assert (await granted).worker_id == "a"


async def test_a_suspended_worker_is_back_at_once_when_those_that_did_better_have_gone(place):
    place.router.on_suspend = place.slots.suspend_worker
    place.router.on_resume = place.slots.resume_worker
    place.open("a", capacity=4)
    place.open("b", capacity=1)
    place.serve()
    place.break_down("a")
    assert place.take().worker_id == "b"
    granted = []
    place.slots.wait("e", Ask(1), granted.append, pytest.fail)
    assert granted == []
    place.slots.drop_worker("b")
    assert [slots.worker_id for slots in granted] == ["a"]
    place.open("b", "c")
    assert {place.take().worker_id for _ in range(4)} >= {"b", "c"}
    assert place.router._fleets["e"].doubted == 0
