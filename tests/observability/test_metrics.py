"""What Prometheus is told, read with the parser of Prometheus' own client."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from prometheus_client import exposition
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from pilotlight.core.admission import AdmissionLimits
from pilotlight.core.engine_capacity import CapacityReason, EngineReading
from pilotlight.core.request_totals import ErrorClass
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.key import ApiKey, Scope, hash_secret
from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Address, Registration, Worker, WorkerState
from pilotlight.errors import StoreError
from pilotlight.gateway.asgi import Headers
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.metrics import Metrics
from pilotlight.gateway.recorder import RequestRecorder
from pilotlight.gateway.slots import Ask, SlotTable
from pilotlight.loops.engine_load import EngineLoadView
from pilotlight.stores.memory import MemoryStore

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guides" / "observability.md").read_text()
DASHBOARD = ROOT / "deploy" / "grafana" / "pilotlight.json"
FIVE_MINUTES_MS = 300_000


class Fleet:
    """Workers as a test wants them."""

    def __init__(self):
        self.living = {}

    def worker(self, worker_id):
        return self.living.get(worker_id)

    def workers(self, endpoint_id):
        return [worker for worker in self.living.values() if worker.endpoint_id == endpoint_id]

    def add(self, worker_id, state=WorkerState.READY):
        self.living[worker_id] = Worker(id=worker_id, endpoint_id="ep", version=1, state=state)


class Rig:
    """Metrics on real parts but for the workers."""

    def __init__(self, clock):
        self.clock = clock
        self.store = MemoryStore()
        self.directory = Directory(self.store)
        self.slots = SlotTable(clock, AdmissionLimits(requests=9, bytes=9000))
        self.fleet = Fleet()
        self.recorder = RequestRecorder(self.store)
        self.leads = True
        self.readings = {}
        self.metrics = self.make()
        self.recorder.observe(self.metrics)

    def make(self, **more):
        return Metrics(
            directory=self.directory, slots=self.slots, fleet=self.fleet, jobs=self.store, clock=self.clock,
            rows=self.recorder, engines=self, leads=lambda: self.leads, lines_dropped=lambda: 7, **more,
        )  # fmt: skip

    def views(self):
        return {
            worker_id: EngineLoadView(reading=reading, capacity=1, reason=CapacityReason.CONFIGURED)
            for worker_id, reading in self.readings.items()
        }

    async def fill(self):
        for number, name in enumerate(("ep", "other")):
            revision = Revision(endpoint_id=name, version=1, model="org/model", created_ms=number)
            await self.store.add_endpoint(Endpoint(id=name, name=f'the "{name}"', revision=revision))
        for name, scope in (("admin", Scope.ADMIN), ("run", Scope.RUN)):
            key = ApiKey(id=name, name=name, scope=scope, endpoint_ids=frozenset(), hash=hash_secret(name))
            await self.store.add_key(key)
        await self.directory.refresh()

    async def families(self):
        answer = await self.metrics.answer(Headers([(b"authorization", b"Bearer admin")]))
        assert answer.status_code == 200, answer.body
        assert answer.media_type == exposition.CONTENT_TYPE_PLAIN_0_0_4
        return list(text_string_to_metric_families(answer.body.decode()))

    async def samples(self):
        """Values by name and labels."""
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in await self.families()
            for sample in family.samples
        }


def key(name, /, **labels):
    return name, frozenset(labels.items())


@pytest.fixture
async def rig(clock):
    made = Rig(clock)
    await made.fill()
    return made


async def test_requests_are_told_by_endpoint_and_by_worker(rig, row):
    rig.fleet.add("w1")
    rig.recorder.record(row())
    rig.recorder.record(row(id="2", outcome=Outcome.FAILED, continued=1, tokens_out=None))
    rig.recorder.record(
        row(id="3", worker_id="", status=429, outcome=Outcome.SHED, streamed=False, tokens_in=None)
    )
    told = await rig.samples()
    route = "/v1/chat/completions"
    by_endpoint = {"endpoint": "ep", "route": route}
    assert told[key("pilotlight_requests_total", **by_endpoint, outcome="ok", status="2xx")] == 1
    assert told[key("pilotlight_requests_total", **by_endpoint, outcome="shed", status="4xx")] == 1
    assert told[key("pilotlight_request_errors_total", endpoint="ep", error="stream_cut")] == 1
    assert told[key("pilotlight_request_errors_total", endpoint="ep", error="queue_full")] == 1
    assert told[key("pilotlight_tokens_total", endpoint="ep", kind="prompt")] == 240
    assert told[key("pilotlight_streams_continued_total", endpoint="ep")] == 1
    by_worker = {"endpoint": "ep", "worker": "w1"}
    assert (
        told[key("pilotlight_worker_requests_total", **by_worker, route=route, outcome="ok", status="2xx")]
        == 1
    )
    assert key("pilotlight_worker_request_errors_total", **by_worker, error="queue_full") not in told
    assert told[key("pilotlight_worker_tokens_total", **by_worker, kind="completion")] == 4
    for name, total in (
        ("time_to_first_token", 0.08), ("inter_token_latency", 0.1), ("request_queue", 0.004), ("request_duration", 0.68),
    ):  # fmt: skip
        assert told[key(f"pilotlight_{name}_seconds_sum", endpoint="ep")] == pytest.approx(total)
        assert told[key(f"pilotlight_worker_{name}_seconds_sum", **by_worker)] == pytest.approx(total)
    bucket = "pilotlight_time_to_first_token_seconds_bucket"
    assert [told[key(bucket, endpoint="ep", le=bound)] for bound in ("0.025", "0.05", "+Inf")] == [0, 2, 2]
    assert told[key("pilotlight_access_log_dropped_lines_total")] == 7


async def test_what_goes_on_is_told_as_it_is(rig):
    rig.fleet.add("w1")
    rig.fleet.add("w2", WorkerState.STARTING)
    rig.slots.open_worker("ep", "w1", capacity=1, registration=Registration(engine=Address(url="unix:/e")))
    rig.slots.admit("ep", Ask(1))
    waiting = rig.slots.wait("ep", Ask(1), lambda _: None, lambda _: None)
    told = await rig.samples()
    about = {"endpoint": "ep", "name": 'the "ep"', "kind": "vllm", "model": "org/model"}
    assert told[key("pilotlight_endpoint_info", **about)] == 1
    states = {
        state: told[key("pilotlight_workers", endpoint="ep", state=state)]
        for state in ("ready", "starting", "frozen")
    }
    assert states == {"ready": 1, "starting": 1, "frozen": 0}
    assert told[key("pilotlight_worker_slots", endpoint="ep", worker="w1")] == 1
    assert told[key("pilotlight_worker_slots_occupied", endpoint="ep", worker="w1")] == 1
    assert told[key("pilotlight_requests_held", endpoint="ep")] == 1
    assert told[key("pilotlight_requests_in_flight", endpoint="ep")] == 1
    assert told[key("pilotlight_jobs", endpoint="ep", status="queued")] == 0
    assert key("pilotlight_worker_engine_cache_ratio", endpoint="ep", worker="w1") not in told
    rig.readings = {"w1": EngineReading(running=1, waiting=2, cache_use=0.5, preemptions=3), "w9": None}
    told = await rig.samples()
    engine = {"endpoint": "ep", "worker": "w1"}
    asked = [
        told[key("pilotlight_worker_engine_requests", **engine, state=state)]
        for state in ("running", "waiting")
    ]
    assert asked == [1, 2]
    assert told[key("pilotlight_worker_engine_cache_ratio", **engine)] == 0.5
    assert told[key("pilotlight_worker_engine_preemptions_total", **engine)] == 3
    waiting.cancel()


async def test_a_follower_and_a_store_that_is_away_tell_nothing_of_queues(rig, monkeypatch):
    queued = key("pilotlight_jobs", endpoint="ep", status="queued")
    rig.leads = False
    assert queued not in await rig.samples()
    rig.leads = True

    async def away(endpoint_id):
        raise StoreError("gone")

    monkeypatch.setattr(rig.store, "counts", away)
    told = await rig.samples()
    assert queued not in told
    assert key("pilotlight_requests_held", endpoint="ep") in told


async def test_strangers_and_callers_of_nothing_become_no_labels(rig, row):
    """Rows of strangers are counted, and not stored."""
    for number in range(20):
        rig.recorder.record(
            row(id=str(number), endpoint_id=f"x{number}", worker_id="", key_id="", route=f"/{number}", status=401,
                outcome=Outcome.REJECTED)
        )  # fmt: skip
    told = await rig.samples()
    none = {"endpoint": "none", "route": "other", "outcome": "rejected", "status": "4xx"}
    assert told[key("pilotlight_requests_total", **none)] == 20
    assert {dict(labels)["endpoint"] for name, labels in told if name == "pilotlight_requests_total"} == {
        "none"
    }
    await rig.recorder.flush()
    assert await rig.store.requests() == []


async def test_a_worker_that_ended_leaves_after_a_while_and_its_requests_stay(rig, row):
    worker = key("pilotlight_worker_tokens_total", endpoint="ep", worker="w1", kind="prompt")
    endpoint = key("pilotlight_tokens_total", endpoint="ep", kind="prompt")
    rig.fleet.add("w1")
    rig.recorder.record(row())
    assert (await rig.samples())[worker] == 120
    rig.fleet.living.clear()
    assert worker in await rig.samples()
    rig.clock.now += FIVE_MINUTES_MS
    told = await rig.samples()
    assert worker not in told
    assert told[endpoint] == 120
    rig.fleet.add("w1")
    rig.recorder.record(row(id="2"))
    assert (await rig.samples())[endpoint] == 240


async def test_workers_that_come_and_go_take_no_memory_though_nobody_scrapes(rig, row):
    for number in range(50):
        rig.metrics.note([row(worker_id=f"w{number}")])
        rig.clock.now += FIVE_MINUTES_MS // 2
    assert len(rig.metrics._counted["ep"].workers) <= 4


async def test_a_deleted_endpoint_leaves_after_a_while(rig, row):
    rig.recorder.record(row())
    await rig.samples()
    await rig.store.delete_endpoint("ep", now_ms=1)
    await rig.directory.refresh()
    told = await rig.samples()
    assert key("pilotlight_tokens_total", endpoint="ep", kind="prompt") in told
    assert key("pilotlight_requests_held", endpoint="ep") not in told
    rig.clock.now += FIVE_MINUTES_MS
    assert not [labels for _, labels in await rig.samples() if ("endpoint", "ep") in labels]


async def test_metrics_are_for_admin_keys_unless_they_are_open(rig):
    async def status(metrics, secret):
        headers = [] if secret is None else [(b"authorization", b"Bearer " + secret)]
        return (await metrics.answer(Headers(headers))).status_code

    assert [await status(rig.metrics, secret) for secret in (None, b"wrong", b"run", b"admin")] == [
        401,
        401,
        403,
        200,
    ]
    assert await status(rig.make(public=True), None) == 200


async def test_a_scraper_gets_the_format_it_prefers(rig, row):
    rig.recorder.record(row())
    accept = b"application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
    headers = Headers([(b"authorization", b"Bearer admin"), (b"accept", accept)])
    answer = await rig.metrics.answer(headers)
    assert answer.media_type.startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in openmetrics.text_string_to_metric_families(answer.body.decode())}
    assert "pilotlight_requests" in names
    odd = Headers([(b"authorization", b"Bearer admin"), (b"accept", b"text/plain;version=x")])
    assert (await rig.metrics.answer(odd)).media_type == exposition.CONTENT_TYPE_PLAIN_0_0_4


async def test_a_crowd_of_scrapers_costs_two_scrapes(rig, monkeypatch):
    told = 0
    tell = rig.recorder.tell

    async def counting():
        nonlocal told
        told += 1
        await tell()

    monkeypatch.setattr(rig.recorder, "tell", counting)
    headers = Headers([(b"authorization", b"Bearer admin")])
    answers = await asyncio.gather(*(rig.metrics.answer(headers) for _ in range(10)))
    assert {answer.status_code for answer in answers} == {200}
    assert told <= 2


async def everything(rig, row):
    """Families with every label that there is."""
    rig.fleet.add("w1")
    rig.slots.open_worker("ep", "w1", capacity=1, registration=None)
    rig.readings = {"w1": EngineReading(running=1, waiting=0)}
    for number, outcome in enumerate(Outcome):
        rig.recorder.record(row(id=str(number), outcome=outcome))
    return await rig.families()


async def test_the_guide_lists_every_metric_and_every_class_of_errors(rig, row):
    families = await everything(rig, row)
    ours = {
        sample.name
        for family in families
        for sample in family.samples
        if sample.name.startswith("pilotlight")
    }
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours if not name.endswith("_created")}
    listed = set(re.findall(r"^\| `(pilotlight_\w+)` \|", GUIDE, re.MULTILINE))
    by_worker = {name for name in names if name.startswith("pilotlight_worker_") and name not in listed}
    assert {name.replace("_worker_", "_", 1) for name in by_worker} <= listed
    assert names - by_worker == listed
    classes = GUIDE.partition("| class | what happened |")[2]
    assert {error.value for error in ErrorClass} == set(
        re.findall(r"`(\w+)`", re.sub(r"\|[^|]*\|\n", "|\n", classes.split("\n\n")[0]))
    )


async def test_the_dashboard_asks_for_what_there_is(rig, row):
    labels = {}
    for family in await everything(rig, row):
        for sample in family.samples:
            labels.setdefault(sample.name, {"job", "instance"}).update(sample.labels)
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert len(queries) > 20
    asked = set()
    for query in queries:
        names = set(re.findall(r"\b(?:pilotlight|process)_\w+", query))
        assert names, query
        assert names <= labels.keys(), query
        known = set().union(*(labels[name] for name in names))
        used = set(re.findall(r"(\w+)=~?\"", query))
        for group in re.findall(r"\b(?:by|on|group_left) \(([^)]*)\)", query):
            used |= {label.strip() for label in group.split(",")}
        assert used <= known, query
        asked |= names
    histograms = {re.sub("_bucket$", "", name) for name in asked if name.endswith("_bucket")}
    assert {
        f"pilotlight_{name}_seconds"
        for name in ("time_to_first_token", "inter_token_latency", "request_queue")
    } <= histograms
