"""The autoscaler with frozen workers: what it waits for and what not, and what it does when one does not come.

The fleet is on paper here, so that a thaw takes as long as a test wants it to.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pilotlight.core.admission import AdmissionLimits
from pilotlight.core.autoscaling import ScaleReason
from pilotlight.domain.endpoint import Endpoint, Revision, ScalerType
from pilotlight.domain.worker import Address, Registration, Stage, Worker, WorkerState
from pilotlight.gateway.slots import Ask, SlotTable
from pilotlight.loops.autoscaler import Autoscaler
from pilotlight.ports.fleet import Health
from pilotlight.stores.memory import MemoryStore

ASK = Ask(1)

REGISTRATION = Registration(engine=Address(url="unix:/engine"))


class HandClock:
    def __init__(self):
        self.now = 1_000_000

    def now_ms(self):
        return self.now

    def monotonic_ns(self):
        return self.now * 1_000_000


class PaperFleet:
    """Implements `ScalableFleet`: thaws, freezes and starts wait until the test answers them."""

    def __init__(self, clock, slots):
        self.clock = clock
        self.slots = slots
        self.live = {}
        self.log = []
        self.answers = {}
        self.called = asyncio.Condition()
        self.can_freeze = True
        self.start_stages = []
        self.well = Health()

    def add(self, worker_id, state, *, endpoint_id="e", devices=()):
        worker = Worker(
            id=worker_id, endpoint_id=endpoint_id, version=1, devices=devices, created_ms=self.clock.now
        )
        self.live[worker_id] = worker
        self.set(worker_id, state)

    def set(self, worker_id, state):
        self.live[worker_id] = replace(self.live[worker_id], state=state, state_ms=self.clock.now)
        if state is WorkerState.READY:
            endpoint_id = self.live[worker_id].endpoint_id
            self.slots.open_worker(endpoint_id, worker_id, capacity=2, registration=REGISTRATION)
        else:
            self.slots.close_worker(worker_id)

    def end(self, worker_id):
        self.slots.drop_worker(worker_id)
        del self.live[worker_id]

    async def until(self, *call):
        """Return while a call is under way."""
        async with asyncio.timeout(10), self.called:
            await self.called.wait_for(lambda: call in self.answers)

    async def answer(self, *call, outcome=True):
        """Answer a call that has been or will be made; returns when its caller has acted on that."""
        await self.until(*call)
        self.answers.pop(call).set_result(outcome)
        # The caller's turn is before ours.
        await asyncio.sleep(0)

    async def _ask(self, *call):
        future = asyncio.get_running_loop().create_future()
        self.answers[call] = future
        self.log.append(call)
        async with self.called:
            self.called.notify_all()
        outcome = await future
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def thaw(self, worker_id):
        thawed = await self._ask("thaw", worker_id)
        if thawed:
            self.set(worker_id, WorkerState.READY)
        return thawed

    async def freeze(self, worker_id, *, reason):
        self.slots.close_worker(worker_id)
        frozen = await self._ask("freeze", worker_id)
        if frozen:
            self.set(worker_id, WorkerState.FROZEN)
        else:
            self.slots.open_worker("e", worker_id, capacity=2, registration=REGISTRATION)
        return frozen

    async def start(self, endpoint):
        worker_id = await self._ask("start", endpoint.id)
        self.add(worker_id, WorkerState.STARTING, endpoint_id=endpoint.id)
        return self.live[worker_id]

    async def drain(self, worker_id, *, reason, grace_s=0):
        self.log.append(("drain", worker_id))
        self.set(worker_id, WorkerState.DRAINING)

    def freezable(self, worker_id):
        return self.can_freeze

    def stages(self, worker_id):
        return self.start_stages

    def worker(self, worker_id):
        return self.live.get(worker_id)

    def workers(self, endpoint_id=None):
        return [worker for worker in self.live.values() if endpoint_id in {None, worker.endpoint_id}]

    def capacity(self, worker_id):
        slots = self.slots.worker(worker_id)
        return slots.capacity if slots else 0

    def health(self, endpoint_id):
        return self.well


class World:
    def __init__(self):
        self.clock = HandClock()
        self.store = MemoryStore()
        self.slots = SlotTable(self.clock, AdmissionLimits(requests=100, bytes=1000))
        self.fleet = PaperFleet(self.clock, self.slots)
        self.endpoints = {}
        self.estimate_ms = None
        self.given_up = []
        self.autoscaler = Autoscaler(
            endpoint=self.endpoints.get,
            store=self.store,
            traffic=self.slots,
            fleet=self.fleet,
            clock=self.clock,
            on_give_up=lambda endpoint, retry_ms: self.given_up.append((endpoint.id, retry_ms)),
            estimate=lambda _: self.estimate_ms,
        )
        self.slots.on_demand = self.autoscaler.note_held
        self.deploy()

    def deploy(self, endpoint_id="e", **changes):
        revision = Revision(endpoint_id=endpoint_id, version=1, model="m")
        values = {"id": endpoint_id, "name": endpoint_id, "revision": revision, "concurrency": 2}
        self.endpoints[endpoint_id] = Endpoint(**(values | {"idle_timeout_ms": 5000} | changes))

    def request(self, endpoint_id="e"):
        return asyncio.create_task(self.slots.hold(endpoint_id, ASK, timeout_s=10))

    async def looked(self):
        """Return when no look is due or under way."""
        async with asyncio.timeout(10):
            while self.autoscaler._dirty or self.autoscaler._looking or self.autoscaler._resting:
                await asyncio.sleep(0.001)

    async def served(self, request):
        self.slots.release_request(await request, ASK)


@pytest.fixture
async def world():
    made = World()
    yield made
    await made.autoscaler.stop()


async def test_a_held_request_waits_neither_for_the_store_nor_for_the_look_at_another_endpoint(world):
    """1. The look at another endpoint hangs in a start, and the store does not answer. 2. A request finds only
    a frozen worker. 3. It is served all the same."""
    world.deploy("other", workers_min=1)
    world.fleet.add("cold", WorkerState.FROZEN)
    world.autoscaler.start()
    world.autoscaler.wake("other")
    await world.fleet.until("start", "other")
    world.store.demand = None
    request = world.request()
    await world.fleet.answer("thaw", "cold")
    await world.served(request)


async def test_a_slow_thaw_delays_nobody_and_is_not_asked_for_twice(world):
    world.deploy("other")
    world.deploy(scaler=ScalerType.REQUEST_COUNT, scaler_value=1)
    world.fleet.add("slow", WorkerState.FROZEN)
    world.fleet.add("quick", WorkerState.FROZEN, endpoint_id="other")
    world.autoscaler.start()
    requests = [world.request(), world.request(), world.request("other")]
    await world.fleet.until("thaw", "slow")
    # What is missing beyond that is started beside it.
    await world.fleet.answer("start", "e", outcome="new")
    await world.fleet.answer("thaw", "quick")
    await world.served(requests[2])
    decision = await world.autoscaler.look("e")
    assert (decision.thaw, decision.start) == ((), 0)
    await world.fleet.answer("thaw", "slow")
    for request in requests[:2]:
        await world.served(request)
    assert world.fleet.log.count(("thaw", "slow")) == 1


async def test_a_held_request_does_not_wait_for_a_start_while_a_worker_is_frozen(world):
    """After a burst, say: one was started for it, and before it was ready the other had been idle for long enough."""
    world.fleet.add("colder", WorkerState.FROZEN)
    world.clock.now += 1
    world.fleet.add("new", WorkerState.STARTING)
    world.fleet.add("cold", WorkerState.FROZEN)
    world.autoscaler.start()
    requests = [world.request(), world.request()]
    await world.fleet.until("thaw", "cold")
    await world.looked()
    await world.fleet.answer("thaw", "cold")
    for request in requests:
        await world.served(request)
    assert world.fleet.log == [("thaw", "cold")]


@pytest.mark.parametrize("outcome", [False, RuntimeError("no answer")])
async def test_a_thaw_that_fails_is_followed_by_the_next_rung(world, outcome):
    """At once, not when the queue delay is over. The worker is still seen frozen while it is being ended."""
    world.deploy(scaler_value=3600)
    world.fleet.add("dead", WorkerState.FROZEN)
    world.autoscaler.start()
    request = world.request()
    await world.fleet.until("thaw", "dead")
    await world.looked()
    await world.fleet.answer("thaw", "dead", outcome=outcome)
    await world.fleet.answer("start", "e", outcome="new")
    world.fleet.end("dead")
    world.fleet.set("new", WorkerState.READY)
    await world.served(request)
    assert world.fleet.log == [("thaw", "dead"), ("start", "e")]


async def test_an_id_that_is_used_again_is_no_longer_lost(world):
    world.fleet.add("w", WorkerState.FROZEN)
    world.autoscaler.start()
    request = world.request()
    await world.fleet.answer("thaw", "w", outcome=False)
    await world.fleet.until("start", "e")
    world.fleet.log.clear()
    world.clock.now += 1000
    world.fleet.set("w", WorkerState.FROZEN)
    await world.autoscaler.look("e")
    await world.fleet.answer("thaw", "w")
    await world.served(request)


async def test_an_idle_worker_is_frozen_beside_the_looks_and_a_request_meanwhile_thaws_it(world):
    world.fleet.add("w", WorkerState.READY)
    world.autoscaler.start()
    world.clock.now += 5000
    decision = await world.autoscaler.look("e")
    assert (decision.freeze, decision.reason) == (("w",), ScaleReason.IDLE_TIMEOUT)
    await world.fleet.until("freeze", "w")
    assert (await world.autoscaler.look("e")).freeze == ()
    request = world.request()
    await world.fleet.until("thaw", "w")
    await world.fleet.answer("freeze", "w")
    await world.fleet.answer("thaw", "w")
    await world.served(request)
    assert world.fleet.log == [("freeze", "w"), ("thaw", "w")]


async def test_a_worker_that_was_frozen_for_an_hour_has_its_whole_idle_timeout_again(world):
    """The request that it was thawed for has left meanwhile."""
    world.deploy(workers_min=1)
    world.fleet.add("w", WorkerState.READY)
    world.fleet.set("w", WorkerState.FROZEN)
    world.clock.now += 3_600_000
    await world.autoscaler.look("e")
    await world.fleet.answer("thaw", "w")
    world.deploy()
    decision = await world.autoscaler.look("e")
    assert (decision.freeze, decision.next_ms) == ((), world.clock.now + 5000)


async def test_a_worker_that_would_not_be_frozen_is_not_forgotten(world):
    """While it was seen as frozen, no look was due."""
    world.fleet.add("w", WorkerState.READY)
    world.clock.now += 5000
    world.autoscaler.start()
    world.autoscaler.wake("e")
    await world.fleet.until("freeze", "w")
    await world.looked()
    assert "e" not in world.autoscaler._timers
    await world.fleet.answer("freeze", "w", outcome=False)
    await world.looked()
    assert "e" in world.autoscaler._timers


async def test_a_worker_that_would_not_be_frozen_idles_anew_and_ends_then_unless_it_has_worked(world):
    world.fleet.add("w", WorkerState.READY)
    for worked in (True, False):
        world.clock.now += 5000
        await world.autoscaler.look("e")
        await world.fleet.answer("freeze", "w", outcome=False)
        world.clock.now += 4999
        decision = await world.autoscaler.look("e")
        assert (decision.freeze, decision.drain, decision.next_ms) == ((), (), world.clock.now + 1)
        if worked:
            await world.served(world.request())
    world.clock.now += 1
    decision = await world.autoscaler.look("e")
    assert (decision.freeze, decision.drain) == ((), ("w",))


@pytest.mark.parametrize(("changes", "can_freeze"), [({"flashboot": False}, True), ({}, False)])
async def test_what_cannot_be_frozen_ends(world, changes, can_freeze):
    world.deploy(**changes)
    world.fleet.can_freeze = can_freeze
    world.fleet.add("w", WorkerState.READY)
    world.clock.now += 5000
    assert (await world.autoscaler.look("e")).drain == ("w",)


async def test_a_frozen_worker_whose_gpu_another_endpoint_uses_is_left_alone(world):
    world.fleet.add("theirs", WorkerState.READY, endpoint_id="other", devices=(0,))
    world.fleet.add("w", WorkerState.FROZEN, devices=(0,))
    world.autoscaler.start()
    request = world.request()
    await world.fleet.answer("start", "e", outcome="new")
    world.fleet.set("new", WorkerState.READY)
    await world.served(request)
    assert ("thaw", "w") not in world.fleet.log


async def test_who_waits_for_starts_that_may_not_be_is_told_so_although_a_worker_is_frozen(world):
    """It cannot go on: its GPU is in use."""
    world.fleet.add("theirs", WorkerState.READY, endpoint_id="other", devices=(0,))
    world.fleet.add("w", WorkerState.FROZEN, devices=(0,))
    retry_ms = world.clock.now + 30_000
    world.fleet.well = Health(failures=3, retry_ms=retry_ms)
    request = world.request()
    await asyncio.sleep(0)
    await world.autoscaler.look("e")
    assert world.given_up == [("e", retry_ms)]
    world.given_up.clear()
    world.fleet.set("theirs", WorkerState.FROZEN)
    await world.autoscaler.look("e")
    assert world.given_up == []
    await world.fleet.answer("thaw", "w")
    await world.served(request)


async def test_a_start_that_takes_far_longer_than_others_gets_company(world):
    world.fleet.add("slow", WorkerState.STARTING)
    request = world.request()
    await asyncio.sleep(0)
    world.estimate_ms = 20_000
    world.clock.now += 59_999
    assert (await world.autoscaler.look("e")).start == 0
    world.clock.now += 1
    world.autoscaler.start()
    world.autoscaler.wake("e")
    await world.fleet.answer("start", "e", outcome="new")
    world.fleet.set("new", WorkerState.READY)
    await world.served(request)


async def test_the_time_for_a_model_does_not_make_a_start_late(world):
    """1. It is being fetched for ten minutes, which no estimate knows. 2. From then on it is like others."""
    begun = world.clock.now
    world.fleet.add("new", WorkerState.STARTING)
    world.fleet.live["new"] = replace(world.fleet.live["new"], stage=Stage.DOWNLOADING)
    world.fleet.start_stages = [("spawned", begun), ("downloading", begun)]
    world.estimate_ms = 20_000
    request = world.request()
    await asyncio.sleep(0)
    world.clock.now += 600_000
    assert (await world.autoscaler.look("e")).start == 0
    world.fleet.live["new"] = replace(world.fleet.live["new"], stage=Stage.IMPORTING)
    world.fleet.start_stages.append(("importing", world.clock.now))
    world.clock.now += 59_999
    assert (await world.autoscaler.look("e")).start == 0
    world.fleet.set("new", WorkerState.READY)
    await world.served(request)


async def test_what_had_not_begun_before_a_stop_is_not_believed_to_go_on(world):
    """The same autoscaler works on when the gateway leads again, and an id may be used again."""
    world.fleet.add("w", WorkerState.FROZEN)
    request = world.request()
    await asyncio.sleep(0)
    assert (await world.autoscaler.look("e")).thaw == ("w",)
    await world.autoscaler.stop()
    assert world.fleet.log == []
    assert world.autoscaler._moves.seen(world.fleet.worker("w"))[0] is WorkerState.FROZEN
    request.cancel()


async def test_a_stop_leaves_no_thaw_or_freeze_under_way(world):
    world.deploy("other")
    world.fleet.add("cold", WorkerState.FROZEN)
    world.fleet.add("idle", WorkerState.READY, endpoint_id="other")
    world.clock.now += 5000
    world.autoscaler.start()
    request = world.request()
    world.autoscaler.wake("other")
    await world.fleet.until("thaw", "cold")
    await world.fleet.until("freeze", "idle")
    calls = list(world.fleet.answers.values())
    await world.autoscaler.stop()
    assert all(call.cancelled() for call in calls)
    assert world.autoscaler._moves.seen(world.fleet.worker("cold"))[0] is WorkerState.FROZEN
    world.autoscaler.note_held("e")
    await asyncio.sleep(0)
    assert world.fleet.log.count(("thaw", "cold")) == 1
    request.cancel()
