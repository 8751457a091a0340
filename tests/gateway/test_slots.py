"""The slot table: one count for both roads, the hold, and what happens at its bounds."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.core.admission import AdmissionLimits, AdmissionReason, Verdict
from pilotlight.domain.worker import Address, Registration
from pilotlight.gateway.slots import Ask, HoldExpiredError, SlotTable, WorkerGoneError

REGISTRATION = Registration(engine=Address(url="unix:/engine"))
ASK = Ask(1)


class StillClock:
    def __init__(self) -> None:
        self.now = 1000

    def now_ms(self) -> int:
        return self.now

    def monotonic_ns(self) -> int:
        return self.now * 1_000_000


@pytest.fixture
def events():
    return []


@pytest.fixture
def clock():
    return StillClock()


@pytest.fixture
def slots(clock, events):
    return SlotTable(
        clock,
        AdmissionLimits(requests=2, bytes=100),
        on_demand=lambda name: events.append(("demand", name)),
        on_idle=lambda name: events.append(("idle", name)),
        on_free=lambda name: events.append(("free", name)),
    )


async def held(slots, count):
    """Tasks that wait, once all of them do."""
    tasks = [asyncio.create_task(slots.hold("e", Ask(10), timeout_s=30)) for _ in range(count)]
    while (await slots.traffic("e", overdue_before_ms=0)).held < count:
        await asyncio.sleep(0)
    return tasks


async def test_requests_and_jobs_share_one_count(slots):
    slots.open_worker("e", "w", capacity=3, registration=REGISTRATION)
    assert slots.reserve_jobs("w", 2) == 2
    admission, taken = slots.admit("e", ASK)
    assert admission.verdict is Verdict.ADMIT
    assert slots.reserve_jobs("w", 5) == 0
    assert slots.admit("e", ASK)[0].reason is AdmissionReason.ALL_SLOTS_BUSY
    traffic = await slots.traffic("e", overdue_before_ms=0)
    assert (traffic.occupied, traffic.requests_in_flight, dict(traffic.idle_since_ms)) == ({"w": 3}, 1, {})
    slots.release_request(taken, ASK)
    slots.release_jobs("w", 2)
    assert (await slots.traffic("e", overdue_before_ms=0)).occupied == {"w": 0}


async def test_held_requests_are_served_first_come_first_served_when_a_worker_opens(slots, events):
    first, second = await held(slots, 2)
    assert events == [("demand", "e"), ("demand", "e")]
    slots.open_worker("e", "w", capacity=1, registration=REGISTRATION)
    taken = await first
    assert not second.done()
    slots.release_request(taken, ASK)
    slots.release_request(await second, ASK)
    assert events[-2:] == [("free", "e"), ("idle", "e")]


async def test_nobody_overtakes_a_held_request(slots):
    (waiting,) = await held(slots, 1)
    slots._endpoints["e"].workers.clear()
    admission, _ = slots.admit("e", ASK)
    assert admission.verdict is Verdict.QUEUE
    waiting.cancel()


@pytest.mark.parametrize(
    ("body", "reason"), [(1, AdmissionReason.HOLD_FULL), (200, AdmissionReason.HOLD_BYTES_FULL)]
)
async def test_a_full_hold_sheds(slots, body, reason):
    tasks = await held(slots, 2 if reason is AdmissionReason.HOLD_FULL else 1)
    admission, taken = slots.admit("e", Ask(body))
    assert (admission.verdict, admission.reason, taken) == (Verdict.SHED, reason, None)
    assert admission.retry_after_s
    for task in tasks:
        task.cancel()


async def test_a_wait_that_ends_leaves_nothing_behind(slots):
    with pytest.raises(HoldExpiredError):
        await slots.hold("e", Ask(10), timeout_s=0)
    (task,) = await held(slots, 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not slots._endpoints


async def test_a_slot_handed_to_a_client_that_left_goes_back(slots):
    (task,) = await held(slots, 1)
    slots.open_worker("e", "w", capacity=1, registration=REGISTRATION)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert slots.worker("w").occupied == 0


async def test_held_requests_get_the_reason_of_a_failed_start_and_new_ones_are_shed(slots, clock):
    (task,) = await held(slots, 1)
    slots.fail_held("e", RuntimeError("no such model"), retry_ms=clock.now + 4500)
    with pytest.raises(RuntimeError, match="no such model"):
        await task
    admission, _ = slots.admit("e", ASK)
    assert (admission.reason, admission.retry_after_s) == (AdmissionReason.UNHEALTHY, 5)
    clock.now += 4500
    assert slots.admit("e", ASK)[0].verdict is Verdict.QUEUE


async def test_slots_of_jobs_that_are_about_to_end(slots):
    """They may be taken again at once, unless a request is held, which comes first."""
    slots.open_worker("e", "w", capacity=2, registration=REGISTRATION)
    assert slots.reserve_jobs("w", 2) == 2
    assert slots.reserve_jobs("w", 2, leaving=1) == 1
    slots.release_jobs("w")
    assert (slots.worker("w").jobs, slots.worker("w").free) == (2, 0)
    (task,) = await held(slots, 1)
    assert slots.reserve_jobs("w", 2, leaving=1) == 0
    slots.release_jobs("w")
    slots.release_request(await task, ASK)


async def test_a_closed_worker_gives_nothing_and_an_ended_one_is_forgotten(slots):
    slots.open_worker("e", "w", capacity=2, registration=REGISTRATION)
    taken = slots.admit("e", ASK)[1]
    slots.close_worker("w")
    assert slots.admit("e", ASK)[0].verdict is Verdict.QUEUE
    assert slots.reserve_jobs("w", 1) == 0
    slots.drop_worker("w")
    slots.release_request(taken, ASK)
    assert (await slots.traffic("e", overdue_before_ms=0)).occupied == {}


async def test_a_worker_that_only_takes_jobs_gets_no_requests(slots):
    slots.open_worker("e", "w", capacity=2, registration=None)
    assert slots.admit("e", ASK)[0].reason is AdmissionReason.NO_READY_WORKER
    assert slots.reserve_jobs("w", 1) == 1


async def test_a_request_that_comes_with_the_worker_does_not_wait_behind_one_that_is_served(slots):
    """29 slots were free and the second request waited until the first, a long stream, had ended."""
    (first,) = await held(slots, 1)
    slots.open_worker("e", "w", capacity=30, registration=REGISTRATION)
    admission, taken = slots.admit("e", ASK)
    assert admission.verdict is Verdict.ADMIT
    slots.release_request(taken, ASK)
    slots.release_request(await first, ASK)


async def test_a_slot_that_became_free_before_the_wait_began_is_taken(slots):
    slots.open_worker("e", "w", capacity=1, registration=REGISTRATION)
    taken = slots.admit("e", ASK)[1]
    assert slots.admit("e", ASK)[0].verdict is Verdict.QUEUE
    slots.release_request(taken, ASK)
    slots.release_request(await slots.hold("e", ASK, timeout_s=0), ASK)


async def test_a_request_for_one_worker_is_told_when_that_ends_before_it_was_ready(slots):
    """Such a worker has no slots yet."""
    asking = asyncio.create_task(slots.hold("e", ASK, timeout_s=30, worker_id="starting"))
    others = asyncio.create_task(slots.hold("e", ASK, timeout_s=30, worker_id="other"))
    await asyncio.sleep(0)
    slots.close_worker("starting")
    slots.drop_worker("starting")
    with pytest.raises(WorkerGoneError):
        await asking
    assert not others.done()
    others.cancel()
    await asyncio.gather(others, return_exceptions=True)
    assert not slots._pinned


async def test_who_waits_for_the_end_of_a_worker_takes_a_place_and_is_no_demand(slots, events):
    waiting = [asyncio.create_task(slots.wait_end("e", "w")) for _ in range(2)]
    while slots.admit("e", ASK)[0].verdict is not Verdict.SHED:
        await asyncio.sleep(0)
    assert (await slots.traffic("e", overdue_before_ms=0)).held == 0
    assert events == []
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    assert slots.admit("e", ASK)[0].verdict is Verdict.QUEUE
    slots.drop_worker("another")
    slots.close_worker("w")
    assert not waiting[1].done()
    slots.drop_worker("w")
    await waiting[1]
    last = asyncio.create_task(slots.wait_end("e", "w"))
    await asyncio.sleep(0)
    last.cancel()
    await asyncio.wait([last])
    assert not slots._ends._waiters
    assert not slots._endpoints


async def test_nothing_is_kept_of_an_endpoint_that_is_only_asked_about(slots):
    """It may have been deleted a moment ago, and nobody would ever forget it then."""
    assert slots.admit("e", ASK)[0].verdict is Verdict.QUEUE
    assert slots.take_of("e", "w", ASK) is None
    assert slots.ahead("e", ASK) == (0, 0)
    with slots.aside("e"):
        pass
    assert not slots._endpoints


async def test_nothing_is_kept_of_an_endpoint_whose_last_worker_had_jobs_as_well_as_requests(slots):
    slots.open_worker("e", "w", capacity=3, registration=REGISTRATION)
    taken = slots.admit("e", ASK)[1]
    assert slots.reserve_jobs("w", 1) == 1
    slots.drop_worker("w")
    slots.release_request(taken, ASK)
    assert not slots._endpoints
