"""Progress line by line, and the records of the past below `/pilotlight/v1`."""

from __future__ import annotations

import asyncio
import json

from pilotlight.clusters.launcher import LauncherState
from pilotlight.clusters.launchers import LauncherInfo
from pilotlight.domain.usage import Outcome, RequestRecord, Road, StartRecord, UsageInterval
from pilotlight.domain.worker import Failure, WorkerState
from pilotlight.errors import EngineEnvironmentError
from pilotlight.management.ndjson import progress_lines

URL = "/pilotlight/v1/endpoints"
NDJSON = {"Accept": "application/x-ndjson"}


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


async def test_progress_ends_with_the_endpoint(management):
    answer = await management.http.post(URL, json={"model": str(management.model)}, headers=NDJSON)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    told = lines(answer.text)
    assert told[0] == {
        "event": "progress",
        "stage": "checking",
        "message": f"model {management.model}",
        "done": None,
        "total": None,
    }
    assert [line["stage"] for line in told[:-1]] == ["checking", "storing"]
    endpoint_id = told[-1]["endpoint"]["id"]
    assert told[-1] == {
        "event": "done",
        "endpoint": (await management.http.get(f"{URL}/{endpoint_id}")).json(),
    }
    revised = await management.http.patch(f"{URL}/{endpoint_id}", json={"env": {"A": "1"}}, headers=NDJSON)
    assert lines(revised.text)[-1]["endpoint"]["version"] == 2


async def test_progress_ends_with_the_error(management):
    answer = await management.http.post(URL, json={"model": "/no/such"}, headers=NDJSON)
    assert answer.status_code == 200
    last = lines(answer.text)[-1]
    assert (last["event"], last["status"]) == ("error", 422)
    assert "/no/such does not exist" in last["detail"]
    invalid = await management.http.post(URL, json={"bogus": 1}, headers=NDJSON)
    assert invalid.status_code == 422, "what is wrong at sight is said before anything begins"


async def test_a_variable_that_the_endpoint_overrides_is_pointed_out(management):
    """The worker program gets the endpoint's concurrency, which may be changed without a new revision."""
    answer = await management.http.post(
        URL, json={"model": str(management.model), "env": {"MAX_CONCURRENCY": "auto"}}, headers=NDJSON
    )
    messages = [line["message"] for line in lines(answer.text) if line["event"] == "progress"]
    assert any(message.startswith("env.MAX_CONCURRENCY=auto has no effect") for message in messages)


async def test_misspelt_variables_are_pointed_out(management):
    answer = await management.http.post(
        URL, json={"model": str(management.model), "env": {"MAX_MODEL_LENN": "5"}}, headers=NDJSON
    )
    messages = [line["message"] for line in lines(answer.text) if line["event"] == "progress"]
    assert any("MAX_MODEL_LENN" in message and "MAX_MODEL_LEN" in message for message in messages)


async def test_a_hub_models_weights_are_fetched_before_it_is_stored(management, monkeypatch, hub_stub):
    monkeypatch.setattr(
        "pilotlight.management.checks.resolve_model", lambda wanted, **_: hub_stub.facts(wanted.name)
    )
    monkeypatch.setattr("pilotlight.models.hub.fetch", hub_stub.fetch)
    answer = await management.http.post(
        URL, json={"model": "some/model", "env": {"MODEL_REVISION": "v1", "HF_TOKEN": "t"}}, headers=NDJSON
    )
    told = lines(answer.text)
    counts = [(line["done"], line["total"]) for line in told if line.get("stage") == "downloading"]
    assert counts[-1] == (1000, 1000)
    assert told[-1]["endpoint"]["model"] == "some/model"
    assert hub_stub.asked == [("some/model", "v1", "t")]


async def test_a_reader_that_goes_away_stops_the_download(management, monkeypatch, hub_stub):
    monkeypatch.setattr(
        "pilotlight.management.checks.resolve_model", lambda wanted, **_: hub_stub.facts(wanted.name)
    )
    monkeypatch.setattr("pilotlight.models.hub.fetch", hub_stub.fetch_until_cancelled)
    started = asyncio.Event()

    def progress(stage, message, done=None, total=None):
        if done == 1:
            started.set()

    task = asyncio.ensure_future(management.service.checker.check("some/model", {}, None, progress))
    await started.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await asyncio.to_thread(hub_stub.ended.wait)
    assert await management.store.endpoints() == []


async def test_byte_counts_replace_each_other_for_a_slow_reader():
    async def work(progress):
        progress("checking", "a")
        for done in range(500):
            progress("downloading", "b", done, 500)
        for number in range(500):
            progress("checking", str(number))
        raise EngineEnvironmentError("gone")

    told = [json.loads(line) async for line in progress_lines(work)]
    assert told[1]["done"] == 499
    assert len(told) == 201
    assert (told[-1]["event"], told[-1]["status"]) == ("error", 503)


def start(endpoint_id, worker_id, **changes):
    values = {"version": 1, "rung": "cold", "stages": (("decision", 1000),), **changes}
    return StartRecord(worker_id=worker_id, endpoint_id=endpoint_id, **values)


async def test_starts_show_each_stage_after_the_decision(management):
    endpoint_id = (await management.create())["id"]
    stages = (("decision", 1000), ("spawned", 1015), ("ready", 26_000), ("first_token", 26_050))
    await management.store.put_start(
        start(endpoint_id, "w1", stages=stages, outcome="ready", memory_bytes=7, note="no launcher")
    )
    answer = await management.http.get(f"{URL}/{endpoint_id}/starts", params={"limit": 5})
    (shown,) = answer.json()["starts"]
    assert shown.pop("stages")[1] == {"stage": "spawned", "at_ms": 1015, "after_ms": 15}
    assert shown == {
        "worker_id": "w1",
        "version": 1,
        "rung": "cold",
        "outcome": "ready",
        "started_at": "1970-01-01T00:00:01Z",
        "ready_after_ms": 25_000,
        "first_token_after_ms": 25_050,
        "memory_bytes": 7,
        "note": "no launcher",
        "failure": None,
    }
    assert (await management.http.get(f"{URL}/unknown/starts")).status_code == 404
    bad = await management.http.get(f"{URL}/{endpoint_id}/starts", params={"limit": 0})
    assert bad.status_code == 422


async def test_a_start_that_failed_says_why(management):
    """vllm-worker.md §7 start failure."""
    endpoint_id = (await management.create())["id"]
    failure = Failure(kind="disk_full", cause="No space left on device", advice="Free disk space.")
    await management.store.put_start(start(endpoint_id, "w1", outcome="failed", failure=failure))
    await management.store.put_start(start(endpoint_id, "w2", outcome="stopped", stages=()))
    starts = (await management.http.get(f"{URL}/{endpoint_id}/starts")).json()["starts"]
    assert {start["worker_id"]: start["failure"] for start in starts} == {
        "w1": {"kind": "disk_full", "cause": "No space left on device", "advice": "Free disk space."},
        "w2": None,
    }
    assert {start["ready_after_ms"] for start in starts} == {None}


async def test_an_endpoint_tells_how_long_its_next_start_will_take(management):
    """Learned from the starts there were; where there was none, nothing is made up."""
    endpoint_id = (await management.create())["id"]
    shown = (await management.http.get(f"{URL}/{endpoint_id}")).json()
    assert shown["next_rung"] == "cold"
    assert shown["start_estimate_ms"] == {"frozen": None, "launchable": None, "cold": None, "plain": None}
    stages = (("decision", 1000), ("ready", 15_000))
    await management.store.put_start(start(endpoint_id, "w1", rung="plain", stages=stages, outcome="ready"))
    await management.estimates.load()
    shown = (await management.http.get(f"{URL}/{endpoint_id}")).json()
    assert (shown["next_rung"], shown["start_estimate_ms"]["plain"]) == ("plain", 14_000)


async def test_usage_adds_up(management):
    states = [WorkerState.STARTING, WorkerState.READY, WorkerState.READY]
    intervals = [
        UsageInterval(
            worker_id="w1",
            sequence=number,
            endpoint_id="e1",
            version=1,
            state=state,
            devices=0,
            start_ms=number * 100,
            end_ms=number * 100 + 100,
        )
        for number, state in enumerate(states)
    ]
    await management.store.add_usage(intervals)
    body = (await management.http.get("/pilotlight/v1/usage")).json()
    assert body["totals"] == [
        {"endpoint_id": "e1", "state": "ready", "duration_ms": 200},
        {"endpoint_id": "e1", "state": "starting", "duration_ms": 100},
    ]
    assert sum(interval["duration_ms"] for interval in body["intervals"]) == 300
    later = (await management.http.get("/pilotlight/v1/usage", params={"since_ms": 250})).json()
    assert [interval["sequence"] for interval in later["intervals"]] == [2]
    other = (await management.http.get("/pilotlight/v1/usage", params={"endpoint": "e2"})).json()
    assert other == {"intervals": [], "totals": []}


async def test_the_request_log_is_read(management):
    record = RequestRecord(
        id="r1",
        road=Road.DATA,
        endpoint_id="e1",
        key_id="k1",
        route="/v1/chat/completions",
        status=200,
        outcome=Outcome.OK,
        arrival_ms=5,
        tokens_out=7,
    )
    await management.store.add_requests([record])
    (row,) = (await management.http.get("/pilotlight/v1/requests", params={"endpoint": "e1"})).json()[
        "requests"
    ]
    assert (row["id"], row["road"], row["outcome"], row["tokens_out"]) == ("r1", "data", "ok", 7)


async def test_status_shows_the_engine_or_its_problem(management):
    await management.create()
    body = (await management.http.get("/pilotlight/v1/status")).json()
    assert body["url"] == "http://127.0.0.1:8400"
    assert (body["engine"]["version"], body["engine"]["platform"]) == ("0.32.0", "cpu")
    assert body["host"]["memory_bytes_total"] == 16 << 30
    assert (body["endpoints"], body["workers"]) == (1, 0)
    management.surroundings["manifest"] = EngineEnvironmentError("no engine at /x")
    body = (await management.http.get("/pilotlight/v1/status")).json()
    assert body["engine"]["problem"].startswith("no engine at /x")


async def test_launchers_are_listed(management):
    assert (await management.http.get("/pilotlight/v1/launchers")).json() == {"launchers": []}
    management.surroundings["launchers"] = [
        LauncherInfo(
            fingerprint="0123456789ab",
            version="0.32.0",
            state=LauncherState.FAILED,
            problem="exited with status 1",
            pid=None,
            memory_bytes=None,
            ready_s=None,
            launches=2,
            engines=0,
            endpoints=("e",),
            log="launcher-0123456789ab",
        )
    ]
    assert (await management.http.get("/pilotlight/v1/launchers")).json()["launchers"] == [
        {
            "fingerprint": "0123456789ab",
            "engine_version": "0.32.0",
            "state": "failed",
            "problem": "exited with status 1",
            "pid": None,
            "memory_bytes": None,
            "ready_s": None,
            "launches": 2,
            "engines": 0,
            "endpoints": ["e"],
            "log": "launcher-0123456789ab",
        }
    ]
