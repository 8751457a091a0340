"""Asking engines for their load, with small servers that stand in for vLLM's, and a real table of slots."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from pilotlight.core.admission import AdmissionLimits
from pilotlight.core.engine_capacity import CapacityReason, EngineReading
from pilotlight.domain.endpoint import Endpoint, EndpointKind, Revision
from pilotlight.domain.worker import Address, Registration
from pilotlight.gateway import engine_metrics
from pilotlight.gateway.engine_metrics import engine_load
from pilotlight.gateway.slots import Ask, SlotTable
from pilotlight.loops.engine_load import ALL, FEW, parse_reading

from .conftest import HandClock

TIMEOUT_S = engine_metrics._TIMEOUT_S

# As vLLM 0.32 has it, of forty requests in a cache of 63 blocks.
PAGE = b"""\
# HELP vllm:num_preemptions_total Cumulative number of preemption from the engine.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 45.0
# HELP vllm:num_requests_waiting_by_reason Number of waiting requests by reason.
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 16.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="deferred"} 3.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 19.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 21.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.9523809523809523
"""


def page(running, waiting):
    return f"vllm:num_requests_running {running}\nvllm:num_requests_waiting {waiting}\n".encode()


def test_what_vllm_says_of_itself():
    """Those that wait for an adapter and the like do not count."""
    assert parse_reading(PAGE) == EngineReading(
        running=21, waiting=16, cache_use=0.9523809523809523, preemptions=45
    )


def test_several_engines_behind_one_server_add_up():
    second = PAGE.replace(b'engine="0"', b'engine="1"').replace(b"0.9523809523809523", b"0.0")
    assert parse_reading(PAGE + second) == EngineReading(
        running=42, waiting=32, cache_use=0.9523809523809523 / 2, preemptions=90
    )


def test_an_engine_that_does_not_tell_reasons_apart():
    assert parse_reading(page("2.0", "1.0")) == EngineReading(running=2, waiting=1)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>not found</html>",
        b"\xff\xfe\x00",
        b"vllm:num_requests_running 1\n",
        page("NaN", "1"),
        page("1", "many"),
        page("1", "-1"),
        page("1", "+Inf"),
        b"# " + page("1", "1").replace(b"\n", b"\n# "),
        page("1", "1").replace(b"requests", b"answers"),
    ],
)
def test_what_says_nothing_of_an_engines_load_is_no_reading(text):
    assert parse_reading(text) is None


class StandIn:
    """An engine's server: `pages` by path and query, what was asked, and whether it answers at all."""

    def __init__(self):
        self.pages = {}
        self.asked = []
        self.keys = set()
        self.silent = False
        self.seen = asyncio.Event()

    async def answer(self, request):
        self.asked.append(request.raw_path)
        self.keys.add(request.headers.get("authorization"))
        self.seen.set()
        if self.silent:
            await asyncio.Event().wait()
        if request.raw_path not in self.pages:
            raise web.HTTPNotFound
        return web.Response(body=self.pages[request.raw_path], content_type="text/plain")


class World:
    """A table of slots with one worker per engine, and the loop between them."""

    def __init__(self, folder):
        self.folder = folder
        self.clock = HandClock()
        self.slots = SlotTable(self.clock, AdmissionLimits(requests=100, bytes=100_000))
        self.kinds = {}
        self.load = engine_load(self.slots, self.endpoint, self.clock)
        self.ask = Ask(1)
        self.held = []
        self.runners = []

    def endpoint(self, endpoint_id):
        kind = self.kinds.get(endpoint_id, EndpointKind.VLLM)
        revision = Revision(endpoint_id=endpoint_id, version=1, model="m")
        return Endpoint(id=endpoint_id, name=endpoint_id, kind=kind, revision=revision)

    async def serve(self, worker_id, *, capacity=8):
        engine = StandIn()
        app = web.Application()
        app.router.add_get("/{path:.*}", engine.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self.runners.append(runner)
        await runner.setup()
        path = self.folder / f"{worker_id}.sock"
        await web.UnixSite(runner, str(path)).start()
        address = Address(url=f"unix:{path}", key="engine-key")
        self.slots.open_worker("e", worker_id, capacity=capacity, registration=Registration(engine=address))
        return engine

    def take(self, worker_id, count=1):
        for _ in range(count):
            slots = self.slots.take_of("e", worker_id, self.ask)
            assert slots is not None
            self.held.append(slots)

    def give_back(self):
        while self.held:
            self.slots.release_request(self.held.pop(), self.ask)

    async def look(self, times=1):
        for _ in range(times):
            self.clock.now += 1000
            await self.load.look()

    def capacity(self, worker_id):
        return self.slots.worker(worker_id).capacity


@pytest.fixture
async def world(tmp_path, monkeypatch):
    """Patient with engines that answer."""
    monkeypatch.setattr(engine_metrics, "_TIMEOUT_S", 30.0)
    world = World(tmp_path)
    yield world
    await world.load.stop()
    for runner in world.runners:
        await runner.cleanup()


@pytest.fixture
def impatient(world, monkeypatch):
    """As short of patience as usual."""
    monkeypatch.setattr(engine_metrics, "_TIMEOUT_S", TIMEOUT_S)


async def test_an_engine_that_has_requests_waiting_gets_fewer_and_later_more(world):
    engine = await world.serve("w")
    engine.pages[FEW] = page(4, 4)
    world.take("w", 8)
    await world.look()
    assert world.capacity("w") == 8
    await world.look()
    assert world.capacity("w") == 5
    view = world.load.views()["w"]
    assert (view.capacity, view.reason) == (5, CapacityReason.WAITING)
    assert view.reading == EngineReading(running=4, waiting=4)
    assert engine.keys == {"Bearer engine-key"}
    # Its requests end, and nobody has to ask for it any more than until it has everything back.
    world.give_back()
    engine.pages[FEW] = page(0, 0)
    await world.look(times=5)
    assert world.capacity("w") == 8
    assert world.slots.worker("w").limit is None
    asked = len(engine.asked)
    await world.look(times=3)
    assert len(engine.asked) == asked


async def test_a_request_waits_at_the_gateway_and_is_let_in_when_the_engine_has_room(world):
    engine = await world.serve("w", capacity=3)
    engine.pages[FEW] = page(1, 2)
    world.take("w", 3)
    await world.look(times=2)
    assert world.capacity("w") == 2
    world.give_back()
    world.take("w", 2)
    waiting = asyncio.create_task(world.slots.hold("e", Ask(1), timeout_s=10))
    await asyncio.sleep(0)
    engine.pages[FEW] = page(2, 0)
    await world.look()
    world.held.append(await waiting)
    assert world.slots.worker("w").occupied == 3


async def test_nobody_is_asked_who_has_nothing_to_do_or_takes_nothing_or_is_no_engine(world):
    engines = {name: await world.serve(name) for name in ("idle", "closed", "sick", "busy")}
    for engine in engines.values():
        engine.pages[FEW] = page(1, 0)
    for name in ("closed", "sick", "busy"):
        world.take(name)
    world.slots.close_worker("closed")
    world.slots.suspend_worker("sick", 60)
    await world.look()
    assert [name for name, engine in engines.items() if engine.asked] == ["busy"]
    world.kinds["e"] = EndpointKind.LOAD_BALANCER
    await world.look()
    assert engines["busy"].asked == [FEW]


async def test_an_engine_that_stands_still_is_told_of_no_longer(world):
    engine = await world.serve("w")
    engine.pages[FEW] = page(3, 0)
    slots = world.slots.take_of("e", "w", world.ask)
    await world.look()
    assert world.load.views()["w"].reading.running == 3
    world.slots.release_request(slots, world.ask)
    await world.look()
    assert world.load.views() == {}


async def test_a_clock_that_is_set_back_keeps_no_limit(world):
    engine = await world.serve("w")
    engine.pages[FEW] = page(4, 4)
    world.take("w", 8)
    await world.look(times=2)
    assert world.capacity("w") < 8
    world.clock.now_ms = lambda: 0
    engine.pages[FEW] = page(4, 0)
    await world.look(times=30)
    assert world.capacity("w") == 8


async def test_an_engine_with_several_servers_is_asked_for_its_whole_page(world):
    engine = await world.serve("w")
    engine.pages = {FEW: b"", ALL: PAGE}
    world.take("w")
    await world.look(times=3)
    assert engine.asked == [FEW, ALL, ALL, ALL]
    assert world.load.views()["w"].reading.running == 21


async def test_an_engine_without_figures_is_left_alone_for_a_minute(world):
    engine = await world.serve("w")
    world.take("w")
    await world.look(times=30)
    assert engine.asked == [FEW, ALL]
    assert world.load.views()["w"].reason is CapacityReason.UNKNOWN
    engine.pages[FEW] = page(1, 0)
    await world.look(times=31)
    assert engine.asked == [FEW, ALL, FEW]
    assert world.capacity("w") == 8


@pytest.mark.usefixtures("impatient")
async def test_a_silent_engine_holds_up_nobody_and_keeps_its_limit(world):
    silent, other = await world.serve("silent"), await world.serve("other")
    for name, engine in (("silent", silent), ("other", other)):
        engine.pages[FEW] = page(4, 4)
        world.take(name, 8)
    await world.look(times=2)
    silent.silent = True
    async with asyncio.timeout(5):
        await world.look()
    assert world.load.views()["silent"].reason is CapacityReason.UNKNOWN
    assert [world.capacity(name) for name in ("silent", "other")] == [5, 5]
    assert len(other.asked) == 3


async def test_a_page_without_an_end_is_no_reading(world):
    engine = await world.serve("w")
    engine.pages = {FEW: PAGE + b"#" * 1_048_576, ALL: PAGE + b"#" * 1_048_576}
    world.take("w")
    await world.look()
    assert world.load.views()["w"].reading is None


@pytest.mark.usefixtures("impatient")
async def test_a_worker_that_ends_while_it_is_asked_is_forgotten(world):
    engine = await world.serve("w")
    engine.silent = True
    world.take("w")
    looking = asyncio.create_task(world.load.look())
    await engine.seen.wait()
    world.slots.drop_worker("w")
    await looking
    await world.look()
    assert world.load.views() == {}


@pytest.mark.usefixtures("impatient")
async def test_an_engine_that_never_answered_is_asked_seldom(world):
    engine = await world.serve("w")
    engine.silent = True
    world.take("w")
    await world.look(times=10)
    assert engine.asked == [FEW]
    await world.runners[0].cleanup()
    await world.look(times=2)
    view = world.load.views()["w"]
    assert (view.reading, view.reason) == (None, CapacityReason.UNKNOWN)


async def test_the_loop_goes_on_after_a_failure_and_ends_when_told(world, monkeypatch):
    engine = await world.serve("w")
    engine.pages[FEW] = page(1, 0)
    world.take("w")
    monkeypatch.setattr("pilotlight.loops.engine_load._PERIOD_S", 0.001)
    failures = [RuntimeError("once"), None]
    original = world.slots.workers

    def workers():
        failure = failures.pop() if failures else None
        if failure is not None:
            raise failure
        return original()

    monkeypatch.setattr(world.slots, "workers", workers)
    world.load.start()
    world.load.start()
    async with asyncio.timeout(5):
        await engine.seen.wait()
        engine.seen.clear()
        await engine.seen.wait()
    await world.load.stop()
    await world.load.stop()
