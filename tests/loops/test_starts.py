"""Starts are recorded stage by stage, from what gateway and worker saw, and the next one is estimated."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pilotlight.domain.endpoint import Endpoint, EndpointKind, Revision
from pilotlight.domain.usage import START_STAGES, StartRecord
from pilotlight.domain.worker import Address, Failure, Registration, Rung, Stage, Worker, WorkerState
from pilotlight.errors import ClusterError
from pilotlight.loops.estimates import Estimates, start_took_ms
from pilotlight.loops.living import Living, merge_timeline
from pilotlight.ports.fleet import StageReport
from pilotlight.stores.memory import MemoryStore

READY = Registration(engine=Address(url="unix:/x"), max_concurrency=2)


async def recorded(world):
    await world.settle()
    return list(await world.store.starts())


async def spawned(world):
    """A worker of the endpoint `e`, 100 ms after the decision to start it."""
    world.deploy()
    worker = await world.fleet.start(world.endpoints["e"])
    world.clock.now += 100
    return worker.id


async def report(world, worker_id, stage, **detail):
    registration = READY if stage is Stage.READY else None
    await world.fleet.reported(worker_id, StageReport(stage=stage, detail=detail, registration=registration))


async def test_what_the_worker_wrote_down_is_in_the_record(world):
    """Its moments count, not those at which reports of it arrived; up to the first token of the first answer."""
    worker_id = await spawned(world)
    await report(world, worker_id, Stage.IMPORTING)
    world.clock.now += 900
    begun = world.clock.now - 1_000
    steps = [["launched", begun + 5], ["loading_weights", begun + 400], ["warming_up", begun + 700]]
    await report(
        world, worker_id, Stage.READY, rung="launchable", timeline=steps, memory_bytes=123, note="by itself"
    )
    world.fleet.answered(worker_id, begun, world.clock.now + 30)
    (start,) = await recorded(world)
    assert (start.rung, start.outcome, start.memory_bytes) == ("launchable", "ready", 123)
    assert start.note == "by itself"
    assert [(stage, at_ms - begun) for stage, at_ms in start.stages] == [
        ("decision", 0),
        ("placement", 0),
        ("spawned", 0),
        ("launched", 5),
        ("loading_weights", 400),
        ("warming_up", 700),
        ("ready", 1_000),
        ("first_token", 1_030),
    ]


async def test_the_first_token_is_that_of_the_earliest_answer_to_those_who_waited(world):
    """Requests are told of when they end: 1. of before the start, 2. short, 3. long but answered sooner."""
    worker_id = await spawned(world)
    held_ms = world.clock.now - 100
    await report(world, worker_id, Stage.READY)
    ready_ms = world.clock.now
    for arrival_ms, at_ms in ((held_ms, held_ms - 5_000), (held_ms, ready_ms + 40), (held_ms, ready_ms + 20)):
        world.fleet.answered(worker_id, arrival_ms, at_ms)
    for later_ms in (60, 70):
        world.fleet.answered(worker_id, ready_ms + 50, ready_ms + later_ms)
    world.fleet.answered("unknown", held_ms, ready_ms)
    await report(world, worker_id, Stage.UNHEALTHY)
    (start,) = await recorded(world)
    assert start.after_ms("first_token") == start.after_ms("ready") + 20
    assert [stage for stage, _ in start.stages[-2:]] == ["ready", "first_token"]


async def test_a_start_that_nobody_waited_for_ends_when_the_worker_is_ready(world):
    """`min` workers may be ready for hours before anybody comes."""
    worker_id = await spawned(world)
    await report(world, worker_id, Stage.READY)
    world.fleet.answered(worker_id, world.clock.now + 9_000_000, world.clock.now + 9_000_050)
    (start,) = await recorded(world)
    assert start.stages[-1][0] == "ready"


async def test_a_program_that_tells_nothing_of_its_start_prepared_nothing(world):
    worker_id = await spawned(world)
    await world.fleet.took(worker_id, slots=1)
    (start,) = await recorded(world)
    assert (start.rung, start.memory_bytes, start.note) == ("plain", None, "")


async def test_a_start_that_failed_keeps_what_is_known_of_it(world):
    """vllm-worker.md §7: the reason is the worker's, and stays when the worker's own record is gone."""
    worker_id = await spawned(world)
    failure = Failure(kind="out_of_memory", cause="no room")
    detail = {"rung": "cold", "note": "no launcher", "timeline": [["importing", world.clock.now]]}
    await world.fleet.reported(worker_id, StageReport(stage=Stage.FAILED, detail=detail, failure=failure))
    world.clock.now += 50
    world.cluster.end(worker_id, 1)
    (start,) = await recorded(world)
    assert (start.rung, start.note, start.outcome, start.failure) == (
        "cold",
        "no launcher",
        "failed",
        failure,
    )
    assert [stage for stage, _ in start.stages] == ["decision", "placement", "spawned", "importing", "failed"]


async def test_a_process_that_cannot_be_spawned_is_a_start_too(world):
    world.deploy()
    world.cluster.refuse = "no such program"
    with pytest.raises(ClusterError):
        await world.fleet.start(world.endpoints["e"])
    (start,) = await recorded(world)
    assert [stage for stage, _ in start.stages] == ["decision", "placement", "failed"]
    assert start.failure.kind == "spawn_failed"


async def test_a_start_that_was_given_up_is_no_failure(world):
    worker_id = await spawned(world)
    await world.fleet.kill(worker_id, reason="not wanted")
    (start,) = await recorded(world)
    assert (start.outcome, start.rung, start.failure) == ("stopped", "", None)


async def test_whoever_estimates_hears_of_starts_that_succeeded(world):
    heard = []
    world.fleet.on_start = heard.append
    worker_id = await spawned(world)
    await report(world, worker_id, Stage.READY, rung="cold")
    world.fleet.answered(worker_id, 0, world.clock.now + 1)
    assert [(start.outcome, start.rung, start.after_ms("ready")) for start in heard] == [
        ("ready", "cold", 100)
    ]


def living(*stages):
    revision = Revision(endpoint_id="e", version=1, model="m")
    return Living(
        worker=Worker(id="w", endpoint_id="e", version=1),
        endpoint=Endpoint(id="e", name="e", revision=revision),
        stages=list(stages),
    )


def test_one_more_start_of_a_living_worker_is_a_record_of_its_own():
    """Thawed: what was told of the start before does not count, nor answers from before it."""
    live = living(("decision", 0))
    detail = {"rung": "launchable", "memory_bytes": 9, "note": "x"}
    live.take(StageReport(stage=Stage.IMPORTING, detail=detail), 5)
    first = live.finish_start("ready", 10)
    live.begin_start(1_000, Rung.FROZEN)
    assert live.first_token(0, 20) is None
    second = live.finish_start("ready", 1_040)
    assert (first.rung, first.memory_bytes, first.decided_ms) == ("launchable", 9, 0)
    assert second.stages == (("decision", 1_000), ("ready", 1_040))
    assert (second.rung, second.memory_bytes, second.note) == ("frozen", None, "")
    assert live.first_token(0, 20) is None
    assert live.first_token(990, 1_050).after_ms("first_token") == 50


def test_moments_of_a_worker_lie_between_spawn_and_now_and_never_go_back():
    seen = [("decision", 100), ("placement", 110), ("spawned", 120), ("starting", 130), ("ready", 200)]
    told = [("importing", 90), ("config", 160), ("loading_weights", 150), ("warming_up", 900), ("ready", 170)]
    assert merge_timeline(seen, told, 200) == [
        ("decision", 100),
        ("placement", 110),
        ("spawned", 120),
        ("importing", 120),
        ("config", 160),
        ("loading_weights", 160),
        ("warming_up", 200),
        ("ready", 200),
    ]


def test_steps_before_the_worker_program_spoke_are_the_gateways():
    """The image was fetched; what the gateway heard of while the worker wrote itself is that once more."""
    seen = [("decision", 0), ("spawned", 1), ("downloading", 2), ("importing", 55), ("ready", 90)]
    assert merge_timeline(seen, [("launched", 50), ("registering", 90)], 90) == [
        ("decision", 0),
        ("spawned", 1),
        ("downloading", 2),
        ("launched", 50),
        ("registering", 90),
        ("ready", 90),
    ]
    assert merge_timeline(seen, [], 90) == seen


def test_a_clock_that_differs_from_ours_is_no_matter():
    """The gateway's runs on when somebody sets the wall clock; a worker reads it as it is."""
    live = living(("decision", 1_000), ("spawned", 1_010))
    detail = {"timeline": [["importing", 9_000_100], ["config", 9_000_400.6]], "now_ms": 9_000_500}
    live.take(StageReport(stage=Stage.WARMING_UP, detail=detail), 1_600)
    assert live.stages[2:] == [("importing", 1_200), ("config", 1_500)]


@pytest.mark.parametrize(
    "detail",
    [
        {"rung": "hot", "memory_bytes": -1, "note": 7, "timeline": "importing"},
        {
            "rung": ["cold"],
            "memory_bytes": True,
            "note": "",
            "timeline": [["importing"], ["x", "y"], 3, None],
        },
        {
            "memory_bytes": math.inf,
            "timeline": [["Importing", 5], ["", 5], ["x" * 33, 5], ["importing", math.nan]],
        },
        {"memory_bytes": 2**63, "timeline": [["importing", -1], ["importing", 2**63], [5, 5], ["a", None]]},
    ],
)
def test_nonsense_in_a_report_is_left_out(detail):
    live = living(("decision", 0))
    live.take(StageReport(stage=Stage.STARTING, detail=detail), 10)
    record = live.finish_start("ready", 20)
    assert (record.rung, record.memory_bytes, record.note) == ("plain", None, "")
    assert record.stages == (("decision", 0), ("starting", 10), ("ready", 20))


def test_every_stage_of_our_programs_has_its_place():
    of_reports = {str(stage) for stage in Stage} - {"unhealthy", "draining", "failed"}
    assert of_reports <= set(START_STAGES)


class Known:
    """Endpoints, their workers and starts, and the estimates made of them."""

    def __init__(self):
        self.endpoints, self.workers, self.launchable = {}, {}, set()
        self.store = MemoryStore()
        self.estimates = Estimates(
            endpoint=self.endpoints.get,
            store=self.store,
            workers=lambda endpoint_id: self.workers.get(endpoint_id, []),
            launchable=self.launchable.__contains__,
        )

    def deploy(self, id, version=1, **changes):
        of_revision = {name: changes.pop(name) for name in ("model", "engine_url") if name in changes}
        revision = Revision(**{"endpoint_id": id, "version": version, "model": "m", **of_revision})
        self.endpoints[id] = Endpoint(id=id, name=id, revision=revision, **changes)

    def start(self, endpoint_id, number, took_ms, rung="cold", version=1, outcome="ready"):
        return StartRecord(
            worker_id=f"w{number}", endpoint_id=endpoint_id, version=version, rung=rung, outcome=outcome,
            stages=(("decision", number), ("ready", number + took_ms)),
        )  # fmt: skip


@pytest.fixture
def known():
    return Known()


async def test_estimates_are_learned_from_the_store_and_from_what_happens(known):
    known.deploy("e")
    for number, took_ms in enumerate((5_000, 9_000, 6_000)):
        await known.store.put_start(known.start("e", number, took_ms))
    await known.store.put_start(known.start("e", 3, 1, outcome="failed"))
    assert known.estimates.next_ms("e") is None
    await known.estimates.load()
    assert known.estimates.next_ms("e") == 6_000
    again = known.start("e", 2, 6_000)
    known.estimates.note(replace(again, stages=(*again.stages, ("first_token", 9_999))))
    for number in range(10, 40):
        known.estimates.note(known.start("e", number, 7_000))
    assert known.estimates.next_ms("e") == 7_000
    assert known.estimates.all_ms("e") == {"frozen": None, "launchable": None, "cold": 7_000, "plain": None}
    known.estimates.forget("e")
    assert known.estimates.next_ms("e") is None
    assert known.estimates.next_ms("unknown") is None
    known.endpoints.clear()
    known.estimates.note(known.start("e", 50, 7_000))
    await known.estimates.load()
    assert known.estimates._starts == {}, "a worker that becomes ready after its endpoint was deleted"


def test_the_next_rung_is_the_best_there_is(known):
    """Frozen of the current revision, then a launcher that is ready, then what it was the last time."""
    known.deploy("e", version=2)
    assert known.estimates.next_rung("e") == "cold"
    known.estimates.note(known.start("e", 1, 20_000, rung="plain"))
    assert known.estimates.next_rung("e") == "plain"
    known.estimates.note(known.start("e", 2, 10_000, rung="cold"))
    known.estimates.note(known.start("e", 3, 50, rung="frozen"))
    assert (known.estimates.next_rung("e"), known.estimates.next_ms("e")) == ("cold", 10_000)
    known.launchable.add("e")
    assert (known.estimates.next_rung("e"), known.estimates.next_ms("e")) == ("launchable", None)
    frozen = Worker(id="w", endpoint_id="e", version=1, state=WorkerState.FROZEN)
    known.workers["e"] = [frozen]
    assert known.estimates.next_rung("e") == "launchable"
    known.workers["e"] = [replace(frozen, version=2)]
    assert (known.estimates.next_rung("e"), known.estimates.next_ms("e")) == ("frozen", 50)


def test_workers_that_are_not_ours_start_as_they_are(known):
    known.deploy("q", kind=EndpointKind.QUEUE)
    known.deploy("fixed", engine_url="http://127.0.0.1:9")
    assert known.estimates.next_rung("q") == "plain"
    assert known.estimates.next_rung("fixed") is None


def test_an_endpoint_that_never_started_borrows_from_its_model(known):
    for id in ("a", "b"):
        known.deploy(id)
    known.deploy("new")
    known.deploy("other", model="x")
    for number, (id, took_ms) in enumerate((("a", 4_000), ("b", 8_000), ("a", 5_000))):
        known.estimates.note(known.start(id, number, took_ms))
    assert known.estimates.next_ms("new") == 5_000
    assert known.estimates.next_ms("other") is None
    known.estimates.note(known.start("new", 9, 1_000, rung="launchable"))
    assert known.estimates.next_ms("new") is None, "it has starts of its own, and none from this rung"


def test_a_new_revision_is_judged_by_its_own_starts_once_there_are_any(known):
    known.deploy("e", version=2)
    for number in range(5):
        known.estimates.note(known.start("e", number, 30_000))
    assert known.estimates.next_ms("e") == 30_000
    known.estimates.note(known.start("e", 5, 2_000, version=2))
    assert known.estimates.next_ms("e") == 2_000


def test_what_was_fetched_does_not_count(known):
    start = known.start("e", 0, 9_000)
    fetched = (("decision", 0), ("downloading", 100), ("importing", 7_100), ("ready", 9_000))
    assert start_took_ms(replace(start, stages=fetched)) == 2_000
    assert start_took_ms(replace(start, stages=(("decision", 0),))) is None
