"""A front or the owner goes in the middle of anything: nothing stays taken, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
import socket

import pytest

from pilotlight.gateway.data_path.desk import Use
from pilotlight.gateway.fronts import messages
from pilotlight.gateway.fronts.front_side import FrontSide
from pilotlight.gateway.fronts.link import LinkError, encoder
from pilotlight.gateway.jobs.rates import RateTable

from .conftest import LONG, IdleFleet, Rig, a_key

TIGHT = {"concurrent_max": 2, "requests_per_minute": 100_000}


@pytest.fixture
async def limited():
    made = Rig()
    made.rates = RateTable(made.clock, IdleFleet())
    made.own(rates=made.rates)
    await made.fill(a_key("tight", **TIGHT))
    yield made
    await made.close()


async def waiting(rig, front):
    front.seek(front.wish(key="tight"))
    await rig.until_held(1)


async def granted_and_not_told(rig, front):
    rig.open_worker()
    front.seek(front.wish(key="tight"))
    while not rig.in_flight():
        await asyncio.sleep(0)


async def in_use(rig, front):
    rig.open_worker()
    await front.slot(front.wish(key="tight"))


async def in_use_while_another_waits(rig, front):
    await in_use(rig, front)
    await waiting(rig, front)


async def in_use_and_ended(rig, front):
    rig.open_worker()
    wish = front.wish(key="tight")
    await front.slot(wish)
    front.desk.end(wish, None)
    await front.settle()


async def between_two_slots(rig, front):
    rig.open_worker()
    wish = front.wish(key="tight")
    front.desk.give_back(wish, await front.slot(wish), Use(failed=True, cost=0))
    await front.settle()


async def again_waiting(rig, front):
    await between_two_slots(rig, front)
    [(_, wish)] = front.desk._requests.values()
    wish.ask.tried = frozenset({"w"})
    front.seek(wish)
    await rig.until_held(1)


async def refused_and_not_ended(rig, front):
    for _ in range(2):
        front.seek(front.wish(key="tight"))
    await rig.until_held(2)
    await front.refusal(front.wish(key="tight"))


STATES = [
    waiting, granted_and_not_told, in_use, in_use_while_another_waits, in_use_and_ended, between_two_slots,
    again_waiting, refused_and_not_ended,
]  # fmt: skip


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("who", ["front", "owner"])
async def test_all_that_a_front_had_is_given_back(limited, state, who):
    front, other = await limited.front(), await limited.front()
    await state(limited, front)
    next_one = other.seek(other.wish())
    await other.settle()
    if who == "front":
        front.side._link.abort()
    else:
        front.attached.close()
    await front.attached.lost.wait()
    limited.open_worker()
    slot = await next_one.told
    assert slot.worker_id == "w"
    assert (await limited.held(), limited.in_flight(), len(front.attached._requests)) == (0, 1, 0)
    assert limited.key_limits._uses["tight"].under_way == 0
    assert sum(count.under_way for count in limited.rates._counts.values()) == 1


async def test_who_waits_for_the_owner_is_told_when_it_is_gone(rig):
    front = await rig.front()
    seekers = [front.seek(front.wish()) for _ in range(2)]
    lives = asyncio.create_task(front.desk.lives(frozenset({"w"})))
    await rig.until_held(2)
    front.attached.close()
    await front.side.lost.wait()
    for seeker in seekers:
        await seeker.told
        assert (seeker.error.status, seeker.error.headers) == (503, [(b"retry-after", b"1")])
        seeker.ticket.cancel()
    with pytest.raises(Exception, match="stopping"):
        front.seek(front.wish())
    assert (await lives, await front.desk.lives(frozenset({"w"}))) == (False, False)


async def test_a_front_that_went_says_in_the_end_what_it_had_to_say(rig):
    rig.open_worker()
    front = await rig.front()
    wish = front.wish()
    front.desk.give_back(wish, await front.slot(wish), Use(failed=True, first_byte_ms=1, cost=3))
    front.desk.end(wish, None)
    await front.side.close()
    await front.attached.lost.wait()
    assert rig.observed == [("w", {"failed": True, "first_byte_ms": 1})]


def frame(*sent):
    payload = encoder.encode(list(sent))
    return len(payload).to_bytes(4, "big") + payload


def a_seek(number, **fields):
    values = {
        "endpoint_id": "ep", "key_id": "run", "body_bytes": 1, "priority": 0, "cost": 1, "session": "",
        "prefix": None, "tokens": 1, "bound_s": 30.0, "by_client": False,
    }  # fmt: skip
    return messages.Seek(number, **(values | fields))


@pytest.mark.parametrize(
    "nonsense",
    [
        a_seek(1),
        messages.Again(1, 1, frozenset(), 1.0, False),
        messages.Again(9, 8, frozenset(), 1.0, False),
        messages.Again(9, 2, frozenset(), 1.0, False),
        messages.GiveBack(7, False, None, None, None),
        messages.GiveBack(3, False, None, None, None),
        messages.End(7, None),
        messages.Stop(),
    ],
    ids=repr,
)
async def test_a_front_that_says_what_makes_no_sense_is_lost_with_all_it_had(rig, nonsense):
    rig.open_worker()
    front, its = await rig.raw_front()
    # One has a slot, one was refused, one waits.
    its.send(frame(a_seek(1), a_seek(2, key_id="nobody"), a_seek(3)))
    await rig.until_held(1)
    its.send(frame(nonsense, messages.Ready()))
    await front.lost.wait()
    assert (rig.in_flight(), await rig.held(), front.ready.is_set()) == (0, 0, False)
    its.close()


async def test_an_owner_that_goes_before_it_said_anything_is_an_error(rig):
    ours, its = socket.socketpair()
    connecting = asyncio.create_task(FrontSide.connect(its))
    await asyncio.sleep(0)
    ours.close()
    with pytest.raises(LinkError, match="gone"):
        await connecting


# Everything at once.


class Client:
    """Does what an exchange may do, at random."""

    def __init__(self, front, world, dice):
        self.front, self.world, self.dice = front, world, dice

    async def run(self):
        for _ in range(self.dice.randint(1, 12)):
            wish = self.front.wish(
                key=self.dice.choice(["run", "tight"]), cost=self.dice.randint(1, 500),
                body_bytes=self.dice.randint(1, 50),
            )  # fmt: skip
            try:
                for _ in range(self.dice.randint(1, 3)):
                    if not await self.one_slot(wish):
                        break
            finally:
                self.front.desk.end(wish, self.dice.choice([None, 10]))

    async def one_slot(self, wish):
        """Whether the request may seek another one."""
        seeker = self.front.seek(wish, LONG)
        if self.dice.random() < 0.3:
            for _ in range(self.dice.randint(0, 4)):
                await asyncio.sleep(0)
            seeker.ticket.cancel()
            if not seeker.told.done():
                return True
        slot = await seeker.told
        if slot is None:
            return False
        self.world.take(slot)
        try:
            for _ in range(self.dice.randint(0, 5)):
                await asyncio.sleep(0)
            if self.dice.random() < 0.1:
                wish.ask.tried = frozenset({slot.worker_id})
        finally:
            self.world.leave(slot)
            self.front.desk.give_back(
                wish, slot, Use(self.dice.random() < 0.2, cost=self.dice.randint(0, 99))
            )
        return True


class World:
    """Counts what engines really get."""

    def __init__(self, rig):
        self.rig = rig
        self.counts: dict[str, int] = {}
        self.taken = 0

    def take(self, slot):
        self.taken += 1
        self.counts[slot.worker_id] = self.counts.get(slot.worker_id, 0) + 1
        assert self.counts[slot.worker_id] <= self.rig.slots.worker(slot.worker_id).capacity

    def leave(self, slot):
        self.counts[slot.worker_id] -= 1


@pytest.mark.parametrize("seed", range(12))
async def test_never_more_than_there_are_slots_and_all_come_back(limited, seed):
    dice = random.Random(seed)
    for name, capacity in (("a", 1), ("b", 2), ("c", 3)):
        limited.open_worker(name, capacity)
    world = World(limited)
    fronts = [await limited.front() for _ in range(3)]

    async def life(front):
        clients = [
            asyncio.create_task(Client(front, world, random.Random(dice.random())).run()) for _ in range(8)
        ]
        if dice.random() < 0.5:
            # It dies in the middle of it, and so do its connections to engines.
            for _ in range(dice.randint(1, 60)):
                await asyncio.sleep(0)
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            front.side._link.abort()
            await front.attached.lost.wait()
            return
        await asyncio.gather(*clients)
        await front.settle()
        assert (front.known(), front.desk._seeks) == ((0, 0), {})

    await asyncio.gather(*(life(front) for front in fronts))
    assert world.taken
    assert (limited.in_flight(), await limited.held()) == (0, 0)
    assert limited.key_limits._uses["tight"].under_way == 0
    assert sum(count.under_way for count in limited.rates._counts.values()) == 0
    assert limited.slots._endpoints["ep"].queue.under_way == 0
