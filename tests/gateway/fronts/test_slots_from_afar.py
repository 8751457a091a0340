"""Fronts that get their slots from one owner: grants, refusals, limits, and everything that crosses on the way."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.core.deadlines import HoldBound
from pilotlight.domain.key import Priority
from pilotlight.domain.usage import Outcome
from pilotlight.gateway.data_path.desk import Use
from pilotlight.gateway.data_path.refusals import StartFailedError
from pilotlight.gateway.fronts.remote_desk import OwnerFailedError
from pilotlight.gateway.jobs.rates import RateTable
from pilotlight.gateway.slots import LeastShare

from .conftest import IdleFleet, Rig, Seeker, a_key, an_endpoint


async def test_a_slot_is_granted_used_and_given_back(rig):
    registration = rig.open_worker()
    front = await rig.front()
    wish = front.wish()
    slot = await front.slot(wish)
    assert (slot.worker_id, slot.registration, rig.in_flight()) == ("w", registration, 1)
    assert (front.known(), wish.taken) == ((1, 1), None)
    front.desk.give_back(wish, slot, Use(failed=True, first_byte_ms=3, service_ms=250.0, cost=7))
    front.desk.end(wish, None)
    await front.settle()
    assert (rig.in_flight(), front.known()) == (0, (0, 0))
    assert rig.observed == [("w", {"failed": True, "first_byte_ms": 3})]
    assert rig.desk.patience.expected_ms("ep", front.wish().ask) == 125


async def test_a_worker_that_comes_back_elsewhere_is_reached_there(rig):
    rig.open_worker()
    front = await rig.front()
    for url in ("unix:/second", "unix:/second", "unix:/third"):
        registration = rig.open_worker(url=url)
        wish = front.wish()
        slot = await front.slot(wish)
        assert slot.registration == registration
        front.finish(wish, slot)


async def test_what_is_known_of_workers_is_bounded(rig, monkeypatch):
    monkeypatch.setattr("pilotlight.gateway.fronts.owner_side._WORKERS_MAX", 2)
    front = await rig.front()
    for name in ("a", "b", "c", "a"):
        registration = rig.open_worker(name, url=f"unix:/{name}")
        wish = front.wish()
        slot = await front.slot(wish)
        assert (slot.worker_id, slot.registration) == (name, registration)
        front.finish(wish, slot)
        await front.settle()
        assert len(front.attached._reached) <= 2
        assert set(front.desk._workers) == set(front.attached._reached)
        rig.slots.drop_worker(name)


async def test_held_requests_of_all_fronts_are_served_in_fair_order(rig):
    for key in (a_key("high", priority=Priority.HIGH), a_key("low", priority=Priority.LOW)):
        await rig.store.add_key(key)
    await rig.directory.refresh()
    one, two = await rig.front(), await rig.front()
    order = []

    class Noting(Seeker):
        def __init__(self, front, wish):
            super().__init__()
            self.front, self.wish = front, wish

        def granted(self, slot):
            order.append(self.wish.key.id)
            self.front.finish(self.wish, slot, cost=self.wish.ask.cost)
            super().granted(slot)

    seekers = []
    for count, (front, key) in enumerate([(one, "low")] * 4 + [(two, "high")] * 4, 1):
        wish = front.wish(key=key, cost=4096)
        seeker = Noting(front, wish)
        front.desk.seek(wish, HoldBound(30.0, by_client=False), seeker)
        seekers.append(seeker)
        await rig.until_held(count)
    rig.open_worker()
    await asyncio.gather(*(seeker.told for seeker in seekers))
    assert order == ["low", "high", "high", "high", "high", "low", "low", "low"]


async def test_refusals_are_what_the_owner_says(rig):
    front = await rig.front()
    await rig.store.add_endpoint(an_endpoint("failing"))
    await rig.directory.refresh()
    rig.slots.fail_held("failing", Exception(), retry_ms=rig.clock.now_ms() + 60_000)
    wish = front.wish(endpoint="failing")
    error = await front.refusal(wish)
    with pytest.raises(Exception) as local:
        rig.desk.seek(wish, HoldBound(30.0, by_client=False), Seeker())
    for name in ("status", "type", "code", "outcome"):
        assert getattr(error, name) == getattr(local.value, name)
    assert (error.status, str(error)) == (503, str(local.value))
    [(name, seconds)] = error.headers
    assert name == b"retry-after"
    assert 58 <= int(seconds) <= 60
    front.desk.end(wish, None)
    await front.settle()
    assert len(front.attached._requests) == 0


async def test_held_requests_are_refused_when_their_endpoint_gives_up_or_their_time_is_over(rig):
    front = await rig.front()
    seeker = front.seek(front.wish())
    await rig.until_held(1)
    rig.slots.fail_held("ep", StartFailedError("no GPU", retry_after_s=7))
    await seeker.told
    error = seeker.error
    assert (error.status, str(error), error.code) == (503, "no GPU", "start_failed")
    assert (error.outcome, error.headers) == (Outcome.FAILED, [(b"retry-after", b"7")])
    error = await front.refusal(front.wish(), HoldBound(0.01, by_client=True))
    assert (error.status, error.code, error.outcome) == (504, "deadline_exceeded", Outcome.EXPIRED)
    assert await rig.held() == 0


async def test_what_is_gone_at_the_owner_is_refused_although_the_front_knows_it(rig):
    rig.open_worker()
    front = await rig.front()
    unknown = await front.refusal(front.wish(key="revoked"))
    assert (unknown.status, unknown.code) == (401, "invalid_api_key")
    assert unknown.headers == [(b"www-authenticate", b"Bearer")]
    deleted = front.wish(endpoint="deleted")
    assert (await front.refusal(deleted)).status == 404
    front.desk.end(deleted, 5)
    await front.settle()
    assert len(front.attached._requests) == 1


async def test_a_fault_of_the_owner_is_one_requests_and_no_more():
    class Broken(LeastShare):
        def pick(self, endpoint_id, candidates, ask):
            if ask.session == "broken":
                raise ZeroDivisionError
            return super().pick(endpoint_id, candidates, ask)

    rig = Rig(router=Broken())
    await rig.fill()
    rig.open_worker()
    front = await rig.front()
    broken, wish = front.wish(session="broken"), front.wish()
    assert isinstance(await front.refusal(broken), OwnerFailedError)
    front.desk.end(broken, None)
    front.finish(wish, await front.slot(wish))
    await front.settle()
    assert (len(front.attached._requests), rig.in_flight()) == (0, 0)
    await rig.close()


async def test_hashes_of_a_prompt_are_sent_where_a_choice_may_depend_on_them():
    seen = []

    class Looking(LeastShare):
        def pick(self, endpoint_id, candidates, ask):
            seen.append(None if ask.prefix is None else tuple(ask.prefix()))
            return super().pick(endpoint_id, candidates, ask)

    rig = Rig(router=Looking())
    await rig.fill()
    rig.open_worker(capacity=10)
    front = await rig.front()
    many, one = front.side.directory.endpoint("ep"), an_endpoint("ep", workers_max=1)
    asks = [(many, ""), (many, "session"), (one, "")]
    for endpoint, session in asks:
        wish = front.wish(session=session, prefix=lambda: [1, 2, 2**32 - 1])
        wish.endpoint = endpoint
        front.finish(wish, await front.slot(wish))
    assert seen == [(1, 2, 2**32 - 1), None, None]
    await rig.close()


# Limits.


async def test_the_limits_of_a_key_count_for_all_fronts_together(rig):
    await rig.store.add_key(a_key("tight", requests_per_minute=100, concurrent_max=2))
    await rig.directory.refresh()
    rig.open_worker(capacity=10)
    fronts = [await rig.front(), await rig.front()]
    wishes = [front.wish(key="tight") for front in fronts]
    slots = [await front.slot(wish) for front, wish in zip(fronts, wishes, strict=True)]
    assert dict(wishes[0].taken.headers)[b"x-ratelimit-remaining-requests"] == b"99"
    assert dict(wishes[1].taken.headers)[b"x-ratelimit-remaining-requests"] == b"98"
    third = fronts[0].wish(key="tight")
    error = await fronts[0].refusal(third)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert (b"retry-after", b"1") in error.headers
    assert b"x-ratelimit-limit-requests" in dict(error.headers)
    fronts[0].desk.end(third, None)
    fronts[1].finish(wishes[1], slots[1])
    await fronts[1].settle()
    await fronts[0].slot(fronts[0].wish(key="tight"))


async def test_what_a_request_has_cost_counts_for_its_key(rig):
    await rig.store.add_key(a_key("tokens", tokens_per_minute=1000))
    await rig.directory.refresh()
    rig.open_worker()
    front = await rig.front()
    wish = front.wish(key="tokens", tokens=100)
    slot = await front.slot(wish)
    front.finish(wish, slot, tokens=900)
    error = await front.refusal(front.wish(key="tokens", tokens=200))
    assert error.status == 429


async def test_headers_of_limits_are_there_while_a_request_waits(rig):
    await rig.store.add_key(a_key("tight", requests_per_minute=100))
    await rig.directory.refresh()
    front = await rig.front()
    wish, told = front.wish(key="tight"), asyncio.get_running_loop().create_future()
    front.seek(wish)
    front.desk.comment(wish.endpoint, 1500, lambda text: told.set_result((text, wish.taken)))
    text, taken = await told
    assert text == b": pilotlight starting stage=decision elapsed_s=1.5\n\n"
    assert (b"x-ratelimit-limit-requests", b"100") in taken.headers


async def test_the_rates_of_the_profile_count_for_all_fronts_until_requests_end(rig):
    rates = RateTable(rig.clock, IdleFleet())
    rig.own(rates=rates)
    rig.open_worker(capacity=10_000)
    front, other = await rig.front(), await rig.front()
    wishes, error = [], None
    while error is None:
        chosen = front if len(wishes) % 2 else other
        wishes.append((chosen, chosen.wish()))
        seeker = chosen.seek(wishes[-1][1])
        await seeker.told
        error = seeker.error
    assert (error.status, error.outcome) == (429, Outcome.REJECTED)
    assert "at once" in str(error) or "in 10 s" in str(error)
    assert sum(count.under_way for count in rates._counts.values()) == len(wishes) - 1
    for chosen, wish in wishes:
        chosen.desk.end(wish, None)
    for each in (front, other):
        await each.settle()
    assert sum(count.under_way for count in rates._counts.values()) == 0


# What crosses on the way.


async def test_who_cancels_waits_no_longer(rig):
    front = await rig.front()
    seeker = front.seek(wish := front.wish())
    await rig.until_held(1)
    seeker.ticket.cancel()
    seeker.ticket.cancel()
    front.desk.end(wish, None)
    await front.settle()
    assert (await rig.held(), len(front.attached._requests), seeker.told.done()) == (0, 0, False)


async def test_a_slot_that_was_granted_meanwhile_is_given_back_and_costs_nothing(rig):
    rig.open_worker()
    front = await rig.front()
    seeker = front.seek(wish := front.wish(cost=100))
    while not rig.in_flight():
        await asyncio.sleep(0)
    # Granted at the owner, and not told yet.
    assert not seeker.told.done()
    seeker.ticket.cancel()
    front.desk.end(wish, None)
    await front.settle()
    assert (rig.in_flight(), seeker.told.done(), len(front.attached._requests)) == (0, False, 0)
    # The charge was taken back as well: the account of its key is where it was.
    account = rig.slots._endpoints["ep"].queue._accounts["run"]
    assert (account.pending, account.cost) == (0, account.announced)


async def test_a_refusal_of_what_was_cancelled_is_passed_over(rig):
    front = await rig.front()
    seeker = front.seek(wish := front.wish())
    await rig.until_held(1)
    rig.slots.fail_held("ep", StartFailedError("no GPU", retry_after_s=7))
    seeker.ticket.cancel()
    await front.settle()
    assert not seeker.told.done()
    front.desk.end(wish, None)
    await front.settle()
    assert len(front.attached._requests) == 0


async def test_a_grant_of_the_seek_before_does_not_count_for_the_one_after(rig):
    rig.open_worker("a")
    rig.open_worker("b")
    front = await rig.front()
    wish = front.wish()
    first = front.seek(wish)
    while not rig.in_flight():
        await asyncio.sleep(0)
    first.ticket.cancel()
    wish.ask.tried = frozenset({"a"})
    slot = await front.slot(wish)
    assert (slot.worker_id, first.told.done(), rig.in_flight()) == ("b", False, 1)
    front.finish(wish, slot)
    await front.settle()
    assert rig.in_flight() == 0


async def test_another_slot_is_of_a_worker_that_was_not_tried_and_counts_as_the_same_request(rig):
    await rig.store.add_key(a_key("tight", requests_per_minute=100))
    await rig.directory.refresh()
    rig.open_worker("a")
    front = await rig.front()
    wish = front.wish(key="tight")
    slot = await front.slot(wish)
    taken = wish.taken
    front.desk.give_back(wish, slot, Use(failed=True, cost=0))
    front.desk.suspend("a", 30.0)
    wish.ask.tried = frozenset({"a"})
    seeker = front.seek(wish)
    await rig.until_held(1)
    assert rig.slots.worker("a").suspended
    assert await front.desk.lives(frozenset({"a"}))
    assert not await front.desk.lives(frozenset({"b"}))
    rig.open_worker("b")
    slot = await seeker.told
    assert (slot.worker_id, wish.taken) == ("b", taken)
    front.finish(wish, slot)
    await front.settle()
    assert (len(front.attached._requests), rig.key_limits._uses["tight"].under_way) == (0, 0)


async def test_a_request_may_end_before_its_slot_is_given_back(rig):
    rig.open_worker()
    front = await rig.front()
    wish = front.wish()
    slot = await front.slot(wish)
    front.desk.end(wish, None)
    front.desk.give_back(wish, slot, Use(failed=False, cost=0))
    await front.settle()
    assert (rig.in_flight(), len(front.attached._requests)) == (0, 0)


async def test_a_request_that_was_never_sought_for_may_end(rig):
    front = await rig.front()
    front.desk.end(front.wish(), 5)
    await front.settle()
    assert not front.attached.lost.is_set()


async def test_nothing_is_told_of_an_endpoint_that_is_gone(rig):
    front = await rig.front()
    told = []
    front.desk.comment(an_endpoint("deleted"), 0, told.append)
    await front.settle()
    assert (told, front.desk._comments) == ([], {})
