"""`?timeline=true`, replay of streams and kinds of endpoints (serverless-api.md §2.8, §2.14, §12 item 13)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime

import pytest

from pilotlight.core.lifecycle import STREAM_BEGUN
from pilotlight.domain.endpoint import EndpointKind
from pilotlight.domain.worker import Failure, Stage, WorkerState
from pilotlight.ports.fleet import Health


@pytest.fixture(params=["memory", "sqlite"])
async def platform(make_platform, request):
    """The same on every store that a test can have for nothing."""
    holds = {"take_hold_s": 1, "stop_hold_s": 1}
    async with make_platform(jobs=holds, sqlite=request.param == "sqlite") as made:
        yield made


async def story(platform, job_id, **arguments):
    answer = await platform.call("GET", f"/status/{job_id}?timeline=true", **arguments)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_timeline_of_a_job_that_streamed(platform):
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.ping(job_id)
    await platform.chunk(job_id, "a")
    await platform.done(job_id, {"output": []}, stream=True)
    job = await story(platform, job_id)
    events = job["timeline"]
    assert [event["event"] for event in events] == ["queued", "leased", "started", "first_output", "finished"]
    assert events[0].keys() == {"event", "at"}
    assert events[1] == {"event": "leased", "at": events[1]["at"], "attempt": 1, "workerId": "w1"}
    assert events[-1]["reason"] == "COMPLETED"
    moments = [datetime.fromisoformat(event["at"]) for event in events]
    assert moments == sorted(moments)
    assert all(len(event["at"]) == len("2026-08-20T10:00:00.123Z") for event in events)
    assert "waiting" not in job
    assert "timeline" not in await platform.status(job_id)


async def test_timeline_of_a_job_that_lost_its_worker(platform):
    """§2.10: the story says why it was queued again."""
    platform.fleet.add("w1", capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.fleet.end("w1", "exit status 139")
    job = await story(platform, job_id)
    last = job["timeline"][-1]
    assert (last["event"], last["workerId"], last["reason"]) == ("requeued", "w1", "exit status 139")
    assert job["waiting"]["reason"] == "no_worker"


async def test_timeline_of_a_job_whose_stream_had_begun(platform):
    """worker-protocol.md §7.2: the break is marked where its owner looks."""
    platform.fleet.add("w1", capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.chunk(job_id, "a")
    await platform.call("GET", f"/stream/{job_id}")
    await platform.fleet.end("w1", "exit status 139")
    events = (await story(platform, job_id))["timeline"]
    assert [event["event"] for event in events] == ["queued", "leased", "started", "first_output", "requeued"]
    assert events[-1]["reason"] == f"exit status 139{STREAM_BEGUN}"


async def test_why_a_job_waits(platform):
    """Paused, starting, backing off, no capacity, busy, position; each with a sentence for people."""
    first = await platform.run()
    second = await platform.run()
    low = await platform.run({"input": 1, "policy": {"lowPriority": True}})

    async def waiting(job_id=second):
        found = (await story(platform, job_id))["waiting"]
        assert found.keys() == {"reason", "detail", "ahead"}
        return found["reason"], found["detail"], found["ahead"]

    assert (await waiting())[0] == "no_worker"
    platform.fleet.state = Health(
        failures=3,
        failure=Failure(kind="out_of_memory", cause="CUDA out of memory"),
        retry_ms=platform.clock.now_ms() + 60_000,
    )
    reason, detail, ahead = await waiting()
    assert (reason, ahead) == ("backing_off", 1)
    assert "CUDA out of memory" in detail
    platform.fleet.state = Health(throttled="no GPU is free")
    assert (await waiting())[:2] == ("no_capacity", "no room for a worker: no GPU is free")
    platform.fleet.add("w1")
    worker = platform.fleet.living["w1"]
    platform.fleet.living["w1"] = replace(worker, stage=Stage.LOADING_WEIGHTS)
    platform.fleet.steps["w1"] = [("loading_weights", platform.clock.now_ms() - 12_000)]
    reason, detail, _ = await waiting()
    assert (reason, detail) == ("starting", "worker w1 is starting: at stage loading_weights for 12 s")
    platform.fleet.become("w1", WorkerState.READY)
    platform.slots.open_worker("ep1", "w1", capacity=1, registration=None)
    assert await waiting() == ("position", "1 job must be served before it", 1)
    assert (await waiting(first))[0] == "next"
    assert (await waiting(low))[:2] == (
        "behind_normal_priority",
        "it has low priority, and 2 jobs of normal priority must be served first",
    )
    await platform.take()
    assert await waiting() == ("busy", "the only slot is in use", 0)


async def test_job_of_a_paused_endpoint_says_so(platform):
    """§12 item 40."""
    job_id = (await platform.call("POST", "/run", endpoint="ep2", json={"input": 1})).json()["id"]
    assert (await story(platform, job_id, endpoint="ep2"))["waiting"]["reason"] == "paused"


@pytest.mark.parametrize(("value", "shown"), [("true", True), ("1", True), ("false", False), ("0", False)])
async def test_timeline_is_asked_for(platform, value, shown):
    job_id = await platform.run()
    answer = await platform.call("POST", f"/status/{job_id}?timeline={value}")
    assert ("timeline" in answer.json()) is shown
    assert (await platform.call("GET", f"/status/{job_id}?timeline=yes")).status_code == 400


# /stream?cursor=N


async def test_stream_can_be_read_again(platform):
    """§12 item 13: all chunks from N, as often as wanted; the answer says where to go on."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    for value in "abc":
        await platform.chunk(job_id, value)
    first = (await platform.call("GET", f"/stream/{job_id}?cursor=0")).json()
    assert first.keys() == {"status", "stream", "cursor"}
    assert [chunk["output"] for chunk in first["stream"]] == ["a", "b", "c"]
    assert (await platform.call("GET", f"/stream/{job_id}?cursor=0")).json() == first
    await platform.chunk(job_id, "d")
    second = (await platform.call("POST", f"/stream/{job_id}?cursor={first['cursor']}")).json()
    assert [chunk["output"] for chunk in second["stream"]] == ["d"]
    await platform.done(job_id, {"output": []}, stream=True)
    last = (await platform.call("GET", f"/stream/{job_id}?cursor={second['cursor']}")).json()
    assert last == {"status": "COMPLETED", "stream": [], "cursor": second["cursor"]}
    # The destructive reader has lost nothing by it (§2.8).
    drained = (await platform.call("GET", f"/stream/{job_id}")).json()
    assert [chunk["output"] for chunk in drained["stream"]] == ["a", "b", "c", "d"]
    again = (await platform.call("GET", f"/stream/{job_id}?cursor=0")).json()
    assert [chunk["output"] for chunk in again["stream"]] == ["a", "b", "c", "d"]


async def test_replay_waits_for_the_next_chunk(platform):
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.chunk(job_id, "a")
    cursor = (await platform.call("GET", f"/stream/{job_id}?cursor=0")).json()["cursor"]
    held = asyncio.create_task(platform.call("GET", f"/stream/{job_id}?cursor={cursor}&wait=300000"))
    await platform.watched()
    await platform.chunk(job_id, "b")
    assert [chunk["output"] for chunk in (await held).json()["stream"]] == ["b"]


async def test_long_replay_ends_only_with_the_last_chunk(platform):
    """§2.8: a terminal status only together with everything that remains."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    for number in range(11):
        await platform.chunk(job_id, f"{number}" + "x" * 1_000_000)
    await platform.done(job_id, {"output": []}, stream=True)
    first = (await platform.call("GET", f"/stream/{job_id}?cursor=0")).json()
    second = (await platform.call("GET", f"/stream/{job_id}?cursor={first['cursor']}")).json()
    assert (first["status"], second["status"]) == ("IN_PROGRESS", "COMPLETED")
    assert len(first["stream"]) + len(second["stream"]) == 11


async def test_replay_of_a_cancelled_job_stays_possible(platform):
    """§2.8: chunks that came before the cancel stay readable; the 404 is for readers that drain."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    await platform.chunk(job_id, "a")
    await platform.call("POST", f"/cancel/{job_id}")
    platform.clock.advance(61)
    answer = (await platform.call("GET", f"/stream/{job_id}?cursor=0")).json()
    assert (answer["status"], answer["stream"]) == ("CANCELLED", [{"output": "a"}])


@pytest.mark.parametrize("cursor", ["-1", "x", "", "1.5", "2147483648", "²"])
async def test_bad_cursors(platform, cursor):
    job_id = await platform.run()
    answer = await platform.call("GET", f"/stream/{job_id}", params={"cursor": cursor})
    assert answer.status_code == 400
    assert "cursor must be an integer between 0 and" in answer.json()["error"]


# Kinds of endpoints


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/run"), ("POST", "/runsync"), ("GET", "/status/x"), ("GET", "/status-sync/x"),
        ("GET", "/stream/x"), ("POST", "/cancel/x"), ("POST", "/retry/x"), ("POST", "/purge-queue"),
        ("GET", "/requests"), ("GET", "/batch"),
    ],
)  # fmt: skip
async def test_queue_routes_of_a_load_balancing_endpoint(platform, method, path):
    """§2.14: 400 `not allowed for QB API`; §3: its `/health` works."""
    endpoint = replace(platform.endpoint, id="lb1", name="lb", kind=EndpointKind.LOAD_BALANCER)
    endpoint = replace(endpoint, revision=replace(endpoint.revision, endpoint_id="lb1", command=("serve",)))
    await platform.store.add_endpoint(endpoint)
    await platform.directory.refresh()
    body = {"json": {"input": 1}} if path.startswith("/run") else {}
    answer = await platform.call(method, path, endpoint="lb1", **body)
    text = "not allowed for QB API"
    assert (answer.status_code, answer.json()) == (400, {"error": text, "detail": text})
    assert (await platform.call("GET", "/health", endpoint="lb1")).status_code == 200
