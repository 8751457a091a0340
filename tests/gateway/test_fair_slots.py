"""Slots in fair order, by callbacks: who is served next, by which worker, and what stays true whatever happens."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.admission import AdmissionLimits, AdmissionReason, Verdict
from pilotlight.domain.worker import Address, Registration
from pilotlight.gateway.slots import Ask, DisplacedError, SlotTable, WorkerGoneError, WorkerSlots

REGISTRATION = Registration(engine=Address(url="unix:/engine"))


class StillClock:
    def now_ms(self) -> int:
        return 1000

    def monotonic_ns(self) -> int:
        return 1_000_000_000


def table(**options):
    return SlotTable(StillClock(), AdmissionLimits(requests=10_000, bytes=10**9), **options)


def opened(slots, worker_id="w", capacity=1):
    slots.open_worker("e", worker_id, capacity=capacity, registration=REGISTRATION)


class Requests:
    """Requests that wait, and what became of them."""

    def __init__(self, slots) -> None:
        self.slots = slots
        self.served: list[tuple[str, str]] = []
        self.failed: list[tuple[str, str]] = []
        self.under_way: dict[str, tuple[object, Ask]] = {}

    def wait(self, name, *, worker_id=None, **ask):
        request = Ask(1, **{"key_id": name, **ask})

        def granted(slots):
            self.served.append((name, slots.worker_id))
            self.under_way[name] = (slots, request)

        return self.slots.wait(
            "e", request, granted, lambda error: self.failed.append((name, str(error))), worker_id=worker_id
        )

    def end(self, name):
        slots, request = self.under_way.pop(name)
        self.slots.release_request(slots, request)

    def names(self):
        return [name for name, _ in self.served]


async def test_a_slot_that_is_free_is_handed_over_after_the_wait_has_begun():
    slots = table()
    opened(slots)
    requests = Requests(slots)
    waiting = requests.wait("a")
    assert (requests.served, slots.worker("w").occupied) == ([], 1)
    await asyncio.sleep(0)
    assert requests.served == [("a", "w")]
    waiting.cancel()
    assert slots.worker("w").occupied == 1
    requests.end("a")
    given_up = requests.wait("b")
    for _ in range(2):
        given_up.cancel()
    await asyncio.sleep(0)
    assert (requests.names(), slots.worker("w").occupied) == (["a"], 0)


async def test_who_leaves_the_queue_is_served_no_more():
    slots = table()
    requests = Requests(slots)
    first, _ = requests.wait("a"), requests.wait("b")
    for _ in range(2):
        first.cancel()
    opened(slots)
    assert requests.served == [("b", "w")]
    assert slots._endpoints["e"].held_bytes == 0


async def test_keys_take_turns_and_a_key_says_which_of_its_requests_is_next():
    slots = table()
    requests = Requests(slots)
    for name, priority in (("a1", 0), ("a2", 0), ("a3", -1), ("b1", 0)):
        requests.wait(name, key_id=name[0], priority=priority, cost=2000)
    opened(slots)
    for _ in range(3):
        requests.end(requests.names()[-1])
    assert requests.names() == ["a3", "b1", "a1", "a2"]


async def test_a_key_with_a_larger_share_is_served_more():
    slots = table()
    requests = Requests(slots)
    for number in range(60):
        requests.wait(f"low{number}", key_id="low", share=1, cost=2000)
        requests.wait(f"high{number}", key_id="high", share=4, cost=2000)
    opened(slots)
    for _ in range(49):
        requests.end(requests.names()[-1])
    assert 38 <= sum(name.startswith("high") for name in requests.names()) <= 41


async def test_tokens_that_were_served_count_and_not_those_announced():
    slots = table()
    opened(slots)
    for key, tokens in (("a", 9000), ("b", 3000)):
        for _ in range(2):
            ask = Ask(1, key_id=key, cost=5000)
            taken = slots.take_of("e", "w", ask)
            slots.release_request(taken, ask, tokens=tokens)
    requests = Requests(slots)
    blocker = Ask(1, key_id="c")
    taken = slots.take_of("e", "w", blocker)
    requests.wait("a")
    requests.wait("b")
    slots.release_request(taken, blocker)
    assert requests.names() == ["b"]


async def test_a_request_is_not_given_to_a_worker_that_it_has_tried_nor_does_it_keep_others_from_it():
    slots = table()
    opened(slots, "bad")
    admission, taken = slots.admit("e", Ask(1, tried=frozenset({"bad"})))
    assert (admission.reason, taken) == (AdmissionReason.ALL_SLOTS_BUSY, None)
    requests = Requests(slots)
    requests.wait("again", tried=frozenset({"bad"}))
    ask = Ask(1)
    admission, taken = slots.admit("e", ask)
    assert (admission.verdict, taken.worker_id) == (Verdict.ADMIT, "bad")
    requests.wait("other")
    slots.release_request(taken, ask)
    opened(slots, "good")
    assert requests.served == [("other", "bad"), ("again", "good")]


async def test_a_request_for_one_worker_waits_for_it_and_keeps_nobody_else_from_the_others():
    slots = table()
    opened(slots, "w1")
    opened(slots, "w2")
    busy = Ask(1)
    taken = slots.take_of("e", "w1", busy)
    requests = Requests(slots)
    requests.wait("pinned", worker_id="w1")
    requests.wait("free")
    await asyncio.sleep(0)
    assert requests.served == [("free", "w2")]
    requests.wait("next")
    slots.release_request(taken, busy)
    assert requests.served[1:] == [("pinned", "w1")]
    requests.wait("late", worker_id="w1")
    slots.close_worker("w1")
    assert requests.failed == [("late", "worker w1 is gone")]
    assert not slots._pinned


async def test_failing_all_who_wait_lets_each_do_something_about_it():
    slots = table()
    failed = []
    second = slots.wait("e", Ask(1), print, failed.append)

    def first_failed(error):
        failed.append(error)
        second.cancel()
        slots.wait("e", Ask(1), print, failed.append)

    slots.wait("e", Ask(1, priority=-1), print, first_failed)
    error = WorkerGoneError("no")
    slots.fail_held("e", error)
    assert failed == [error]
    assert (await slots.traffic("e", overdue_before_ms=2000)).held == 1


async def test_a_greedy_key_cannot_fill_the_hold_for_others():
    slots = SlotTable(StillClock(), AdmissionLimits(requests=4, bytes=100))
    requests = Requests(slots)
    for number in range(4):
        requests.wait(f"greedy{number}", key_id="greedy")
    assert slots.admit("e", Ask(1, key_id="greedy"))[0].reason is AdmissionReason.HOLD_FULL
    assert requests.failed == []
    assert slots.admit("e", Ask(1, key_id="light"))[0].verdict is Verdict.QUEUE
    assert requests.failed == [("greedy3", "requests of other keys need the place")]
    requests.wait("light1", key_id="light")
    assert slots.admit("e", Ask(98, key_id="light"))[0].verdict is Verdict.SHED
    assert slots.admit("e", Ask(97, key_id="light"))[0].verdict is Verdict.QUEUE
    assert [name for name, _ in requests.failed] == ["greedy3", "greedy2"]


async def test_who_is_displaced_learns_it_as_if_it_came_now():
    slots = SlotTable(StillClock(), AdmissionLimits(requests=9, bytes=20))
    holds = [asyncio.create_task(slots.hold("e", Ask(10, key_id="a"), timeout_s=60)) for _ in range(2)]
    await asyncio.sleep(0)
    assert slots.admit("e", Ask(10, key_id="b"), take=False)[0].verdict is Verdict.QUEUE
    with pytest.raises(DisplacedError) as displaced:
        await holds[1]
    assert displaced.value.admission.reason is AdmissionReason.HOLD_BYTES_FULL
    opened(slots)
    assert (await holds[0]).worker_id == "w"


async def test_a_worker_gives_fewer_slots_for_a_while():
    freed = []
    slots = table(on_free=freed.append)
    opened(slots, capacity=4)
    requests = Requests(slots)
    slots.limit_worker("w", 2)
    for name in "abc":
        requests.wait(name)
    await asyncio.sleep(0)
    assert requests.names() == ["a", "b"]
    assert slots.reserve_jobs("w", 1) == 0
    slots.limit_worker("w", 1)
    requests.end("a")
    assert requests.names() == ["a", "b"]
    slots.limit_worker("w", 2)
    assert requests.names() == ["a", "b", "c"]
    assert (await slots.traffic("e", overdue_before_ms=0)).capacity == {"w": 2}
    opened(slots, capacity=3)
    slots.limit_worker("w", 9)
    assert (slots.worker("w").capacity, slots.worker("w").free) == (3, 1)
    slots.limit_worker("w", None)
    slots.limit_worker("w", None)
    slots.limit_worker("nobody", 1)
    assert slots.worker("w").capacity == 3
    assert freed == ["e", "e"]


async def test_the_longest_suspension_counts():
    slots = table()
    opened(slots)
    for seconds in (0.0, 60.0, 0.0):
        slots.suspend_worker("w", seconds)
    requests = Requests(slots)
    requests.wait("a")
    await asyncio.sleep(0.001)
    assert slots.worker("w").suspended
    opened(slots, "w2")
    slots.drop_worker("w")
    assert requests.served == [("a", "w2")]


async def test_a_suspended_worker_has_no_slots_for_the_autoscaler_to_count_on():
    slots = table()
    opened(slots, capacity=3)
    slots.suspend_worker("w", 60)
    assert (await slots.traffic("e", overdue_before_ms=0)).capacity == {"w": 0}
    slots.resume_worker("w")
    slots.resume_worker("nobody")
    assert (await slots.traffic("e", overdue_before_ms=0)).capacity == {"w": 3}


async def test_a_worker_that_comes_back_is_suspended_no_more():
    slots = table()
    opened(slots)
    slots.suspend_worker("w", 60)
    opened(slots)
    assert slots.worker("w").suspended, "it was never away"
    slots.close_worker("w", for_good=False)
    requests = Requests(slots)
    requests.wait("a")
    opened(slots)
    assert requests.served == [("a", "w")]


async def test_a_full_worker_is_ready_again_after_its_suspension():
    slots = table()
    opened(slots)
    assert slots.admit("e", Ask(1))[1] is not None
    slots.suspend_worker("w", 60)
    assert slots.admit("e", Ask(1))[0].reason is AdmissionReason.NO_READY_WORKER
    slots.resume_worker("w")
    assert slots.admit("e", Ask(1))[0].reason is AdmissionReason.ALL_SLOTS_BUSY


async def test_nothing_is_kept_of_an_endpoint_whose_requests_have_failed():
    slots = table()
    requests = Requests(slots)
    requests.wait("a")
    slots.fail_held("e", RuntimeError("deleted"))
    assert requests.failed == [("a", "deleted")]
    assert slots._endpoints == {}


async def test_a_router_decides_and_may_want_none_of_them():
    class Fussy:
        def __init__(self) -> None:
            self.wanted: str | None = None
            self.forgotten: list[str] = []

        def pick(self, _endpoint_id, candidates, _ask):
            return next((slots for slots in candidates if slots.worker_id == self.wanted), None)

        def forget(self, worker_id):
            self.forgotten.append(worker_id)

    router = Fussy()
    slots = table(router=router)
    opened(slots, "w1")
    opened(slots, "w2")
    admission, taken = slots.admit("e", Ask(1))
    assert (admission.reason, taken) == (AdmissionReason.ALL_SLOTS_BUSY, None)
    requests = Requests(slots)
    requests.wait("a")
    router.wanted = "w2"
    slots.serve_held("e")
    slots.serve_held("nobody")
    assert requests.served == [("a", "w2")]
    slots.close_worker("w2")
    slots.drop_worker("w2")
    assert set(router.forgotten) == {"w2"}


async def test_thousands_who_leave_as_soon_as_they_are_served():
    """They are served one after the other and not one within the other, and then others hear of the slot."""
    freed, idle, ended = [], [], []
    slots = table(on_free=freed.append, on_idle=idle.append)

    def wait(number):
        ask = Ask(1, key_id=f"k{number % 7}")

        def granted(taken):
            ended.append(number)
            slots.release_request(taken, ask)

        slots.wait("e", ask, granted, print)

    for number in range(5000):
        wait(number)
    opened(slots)
    assert sorted(ended) == list(range(5000))
    assert (freed, idle) == (["e"], ["e"])


async def test_a_release_after_the_endpoint_is_gone_leaves_nothing_behind():
    slots = table()
    opened(slots)
    ask = Ask(1, key_id="a")
    _, taken = slots.admit("e", ask)
    slots.drop_worker("w")
    assert "e" in slots._endpoints
    slots.release_request(taken, ask, tokens=5)
    assert not slots._endpoints


async def test_one_who_waits_again_because_all_were_failed_is_not_forgotten():
    slots = table()
    requests = Requests(slots)
    slots.wait("e", Ask(1), print, lambda _: requests.wait("a"))
    slots.fail_held("e", RuntimeError("the lead is lost"))
    opened(slots)
    assert requests.served == [("a", "w")]


async def test_a_busy_table_does_not_look_at_all_workers_for_each_request(monkeypatch):
    """Every release is a slot for one who waits, and both used to be a reason to go through all workers."""
    slots = table()
    for number in range(64):
        opened(slots, f"w{number}")
    requests = Requests(slots)
    for number in range(200):
        requests.wait(f"r{number}")
    await asyncio.sleep(0)
    looks = []
    monkeypatch.setattr(
        WorkerSlots, "takes_requests", property(lambda worker: looks.append(worker) or worker.open)
    )
    for number in range(100):
        requests.end(f"r{number}")
    assert len(requests.served) == 164
    assert len(looks) < 64 * 10


VERBS = (
    "admit", "wait", "retry", "pin", "cancel", "end", "open", "close", "drop", "limit", "jobs", "done",
    "suspend", "resume", "fail",
)  # fmt: skip


@given(script=st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, 3), st.integers(0, 50)), max_size=60))
def test_whatever_happens_slots_are_counted_once_and_nobody_waits_beside_a_free_one(script):
    asyncio.run(_live(script))


async def _live(script):
    slots, waiting, under_way, jobs = table(), [], [], dict.fromkeys(("w0", "w1", "w2", "w3"), 0)
    for verb, which, number in script:
        worker_id, ask = f"w{which}", Ask(1, key_id=f"k{number % 3}", cost=number, priority=number % 2)
        if verb == "admit":
            _, taken = slots.admit("e", ask)
            if taken is not None:
                under_way.append((taken, ask))
        elif verb in {"wait", "retry", "pin"}:
            ask.tried = frozenset({worker_id}) if verb == "retry" else frozenset()
            only = worker_id if verb == "pin" else None
            waiting.append(
                slots.wait(
                    "e", ask, lambda taken, ask=ask: under_way.append((taken, ask)), str, worker_id=only
                )
            )
            await asyncio.sleep(0)
        elif verb == "cancel" and waiting:
            waiting.pop(number % len(waiting)).cancel()
        elif verb == "end" and under_way:
            taken, ask = under_way.pop(number % len(under_way))
            slots.release_request(taken, ask, tokens=number)
        elif verb == "open":
            opened(slots, worker_id, number % 4)
        elif verb == "close":
            slots.close_worker(worker_id)
        elif verb == "drop":
            slots.drop_worker(worker_id)
            jobs[worker_id] = 0
        elif verb == "suspend":
            slots.suspend_worker(worker_id, 60)
        elif verb == "resume":
            slots.resume_worker(worker_id)
        elif verb == "fail":
            slots.fail_held("e", RuntimeError("failed"))
        elif verb == "limit":
            slots.limit_worker(worker_id, number % 5 or None)
        elif verb == "jobs":
            jobs[worker_id] += slots.reserve_jobs(worker_id, number % 3)
        elif verb == "done" and jobs[worker_id]:
            slots.release_jobs(worker_id)
            jobs[worker_id] -= 1
        _check(slots, under_way, jobs)


def _check(slots, under_way, jobs):
    for worker in slots.workers():
        assert worker.requests == sum(taken is worker for taken, _ in under_way)
        assert worker.jobs == jobs[worker.worker_id]
    for endpoint in slots._endpoints.values():
        assert not endpoint.unused
        free = [worker for worker in endpoint.workers.values() if worker.takes_requests and worker.free]
        assert endpoint.look() == free
        queued = list(endpoint.queue)
        assert endpoint.constrained == sum(one.constrained for one in queued)
        assert endpoint.held_bytes == len(queued)
        for one in queued:
            names = {worker.worker_id for worker in free} - one.ask.tried
            assert not names & ({one.worker_id} if one.worker_id else names)
        assert endpoint.queue.under_way == len(under_way)
