"""Workers come with requests and go without them; the account of their life adds up. Jobs end to end."""

from __future__ import annotations

import itertools
import json

import pytest


def stage_ms(start, stage):
    return next(each["at_ms"] for each in start["stages"] if each["stage"] == stage)


def test_zero_one_zero_one(installation, tools):
    """1. A request to an endpoint without workers is held and answered. 2. After the idle timeout the worker is
    gone: processes, sockets, reserved memory. 3. The next request starts another one. 4. Usage adds up."""
    endpoint = installation.deploy(idle_timeout_s=1)
    assert installation.processes() == {}
    lives = []
    for turn in (1, 2):
        answer = endpoint.chat("one two three")
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "one two three"
        processes = installation.processes()
        assert len(processes) == 2, "the worker program and its engine"
        (worker_id,) = set(processes.values())
        assert endpoint.engine_pid(turn) in processes
        assert list(installation.sockets.rglob("*.sock"))
        tools.until(lambda: not installation.processes(), "no process is left")
        tools.until(lambda: not endpoint.workers() and endpoint.view()["workers"] == {}, "no worker is left")
        tools.until(lambda: not list(installation.sockets.glob("*/*")), "sockets and their folders are gone")
        lives.append(worker_id)
    assert len(set(lives)) == 2, "the second request started another worker"

    starts = endpoint.starts()
    rows = [row for row in endpoint.requests(2) if row["road"] == "data"]
    for worker_id in lives:
        start = next(each for each in starts if each["worker_id"] == worker_id)
        row = next(each for each in rows if each["worker_id"] == worker_id)
        assert start["outcome"] == "ready"
        assert row["arrival_ms"] <= stage_ms(start, "decision") <= stage_ms(start, "spawned")
        assert row["wait_ms"] >= stage_ms(start, "ready") - row["arrival_ms"] - 1
        answered_ms = row["arrival_ms"] + row["first_token_ms"]
        assert stage_ms(start, "ready") <= stage_ms(start, "first_token")
        assert abs(stage_ms(start, "first_token") - answered_ms) <= 1
        assert (row["outcome"], row["status"], row["tokens_out"]) == ("ok", 200, 3)

    intervals = {worker_id: [] for worker_id in lives}
    for interval in endpoint.usage():
        intervals[interval["worker_id"]].append(interval)
    assert installation.interrupt() == 0
    assert list(installation.sockets.iterdir()) == []
    recorded = {
        worker_id: (state, created, ready, ended)
        for worker_id, state, created, ready, ended in installation.table(
            "SELECT id, state, created_ms, ready_ms, ended_ms FROM workers"
        )
    }
    assert set(recorded) == set(lives)
    for worker_id in lives:
        state, created, ready, ended = recorded[worker_id]
        assert state == "stopped"
        mine = sorted(intervals[worker_id], key=lambda each: each["sequence"])
        assert mine[0]["start_ms"] == created
        assert mine[-1]["end_ms"] == ended
        assert all(before["end_ms"] == after["start_ms"] for before, after in itertools.pairwise(mine))
        assert sum(each["duration_ms"] for each in mine) == ended - created
        idle = next(each for each in mine if each["state"] == "ready")
        assert idle["start_ms"] == ready
        assert idle["duration_ms"] >= 1000, "it stayed for the idle timeout"


def test_jobs_end_to_end(shared, tools, tmp_path):
    """Submitting, waiting, streaming, cancelling, and the counters while requests and jobs wait and run."""
    gate = tmp_path / "loaded"
    hold = tmp_path / "go-on"
    endpoint = shared.deploy(
        {
            "FAKE_ENGINE_LOAD_FILE": str(gate),
            "FAKE_ENGINE_HOLD_FILE": str(hold),
            "FAKE_ENGINE_HOLD_WHOLE_FILE": str(hold),
        },
        max=1,
        concurrency=3,
    )
    first = endpoint.run("count to 3")
    second = endpoint.run("count to 4", stream=True)
    waiting = shared.background(
        lambda: endpoint.post("runsync?wait=30000", input={"messages": [{"role": "user", "content": "a b"}]})
    )
    held = shared.background(lambda: list(read(endpoint, "x y z")))
    tools.until(lambda: endpoint.health()["jobs"]["inQueue"] == 4, "three jobs and a held request wait")
    tools.until(lambda: endpoint.health()["workers"]["initializing"] == 1, "a worker starts")
    assert endpoint.job(first)["status"] == "IN_QUEUE"

    gate.touch()
    tools.until(lambda: endpoint.health()["jobs"]["inProgress"] == 3, "one slot count covers both roads")
    counters = endpoint.health()
    assert counters["jobs"]["inQueue"] == 1
    assert counters["workers"]["running"] == 1
    assert counters["workers"]["ready"] == 0, "no slot is free"
    assert endpoint.workers()[0]["occupied"] == 3

    hold.touch()
    assert endpoint.result(first)["status"] == "COMPLETED"
    texts = []
    while True:
        answer = endpoint.chunks(second)
        texts += [chunk["output"] for chunk in answer["stream"]]
        if answer["status"] == "COMPLETED":
            break
    assert "".join(text_of(each) for each in texts).split() == ["1", "2", "3", "4"]
    answer = waiting.result()
    assert answer.status_code == 200
    assert answer.json()["status"] == "COMPLETED"
    assert answer.json()["id"].startswith("sync-")
    events = held.result()
    assert events[-1] == "[DONE]"
    tools.until(lambda: endpoint.health()["jobs"]["inProgress"] == 0, "all slots are free again")
    assert endpoint.health()["jobs"]["completed"] == 3
    assert endpoint.health()["workers"]["idle"] == 1


def test_cancelling_jobs(shared, tools, tmp_path):
    """A queued job never starts; a running one's generation is aborted in the engine and its slot is freed."""
    hold = tmp_path / "go-on"
    endpoint = shared.deploy({"FAKE_ENGINE_HOLD_FILE": str(hold)}, max=1, concurrency=1)
    running = endpoint.run("count to 3", stream=True)
    endpoint.first_chunks(running)
    queued = endpoint.run("count to 5")
    assert endpoint.post(f"cancel/{queued}").json()["status"] == "CANCELLED"
    assert endpoint.post(f"cancel/{running}").json()["status"] == "CANCELLED"
    tools.until(lambda: endpoint.happenings("aborted"), "the engine has aborted the generation")
    hold.touch()
    assert endpoint.result(endpoint.run("count to 2"))["status"] == "COMPLETED"
    assert endpoint.job(queued)["status"] == "CANCELLED"
    assert endpoint.job(running)["status"] == "CANCELLED"
    prompts = [str(entry["body"]) for entry in endpoint.happenings("request")]
    assert not any("count to 5" in prompt for prompt in prompts)


def test_a_client_that_goes_away_ends_its_generation(shared, tools, tmp_path):
    hold = tmp_path / "go-on"
    endpoint = shared.deploy({"FAKE_ENGINE_HOLD_FILE": str(hold)})
    with endpoint.stream("count to 5") as events:
        next(events)
    tools.until(lambda: endpoint.happenings("aborted"), "the engine has aborted the generation")
    tools.until(lambda: endpoint.health()["jobs"]["inProgress"] == 0, "the slot is free")
    row = endpoint.requests(1)[0]
    assert (row["outcome"], row["estimated"]) == ("disconnected", True)


def test_a_deleted_endpoint(shared, tools, tmp_path):
    """1. Held callers are told, queued jobs are cancelled. 2. A worker that is starting ends. 3. A stream of a
    ready worker is not cut: its worker ends after it."""
    never, hold = tmp_path / "never", tmp_path / "go-on"
    starting = shared.deploy({"FAKE_ENGINE_LOAD_FILE": str(never)})
    held = shared.background(lambda: starting.chat("x"))
    starting.engine_pid()
    streaming = shared.deploy({"FAKE_ENGINE_HOLD_FILE": str(hold)})
    with streaming.stream("count to 3") as events:
        next(events)
        for endpoint in (starting, streaming):
            assert shared.api.delete(f"/v2/serverless/{endpoint.id}").status_code in {200, 204}
        assert held.result().status_code == 404
        assert starting.chat("x").status_code == 404
        tools.wait_dead(starting.engine_pid())
        tools.until(lambda: len(set(shared.processes().values())) == 1, "one worker lives")
        hold.touch()
        assert list(events)[-1] == "[DONE]"
    tools.until(lambda: not shared.processes(), "no process is left")


def test_a_revision_replaces_workers_without_cutting_streams(shared, tools, tmp_path):
    hold = tmp_path / "go-on"
    endpoint = shared.deploy({"FAKE_ENGINE_HOLD_FILE": str(hold)})
    with endpoint.stream("count to 3") as events:
        next(events)
        old = endpoint.ready()
        endpoint.revise(env={"FAKE_ENGINE_RECORD": str(endpoint.record)})
        tools.until(lambda: endpoint.workers()[0]["state"] == "draining", "the old one takes nothing more")
        answer = endpoint.chat("one two")
        assert answer.status_code == 200
        hold.touch()
        assert list(events)[-1] == "[DONE]"
    tools.wait_dead(old["pid"])
    (new,) = tools.until(lambda: len(found := endpoint.workers()) == 1 and found, "one worker is left")
    assert (old["version"], new["version"]) == (1, 2)


def test_models_are_listed_without_waking_anything(shared):
    endpoint = shared.deploy()
    listed = endpoint.get("openai/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["pilotlight/ember"]
    assert endpoint.view()["status"] == "idle"
    assert shared.processes() == {}


@pytest.mark.soak
def test_from_arrival_to_spawn_twenty_times(installation, tools, record_property):
    """Prints the time from a request's arrival to the spawn of its worker; measures, does not judge."""
    waits = []
    for _ in range(20):
        endpoint = installation.deploy(idle_timeout_s=1)
        assert endpoint.chat("x").status_code == 200
        (row,) = endpoint.requests(1)
        (start,) = endpoint.starts()
        waits.append(stage_ms(start, "spawned") - row["arrival_ms"])
        tools.until(lambda: not installation.processes(), "no process is left")
    waits.sort()
    figure = {"n": len(waits), "p50_ms": waits[9], "p95_ms": waits[18], "max_ms": waits[-1]}
    record_property("arrival_to_spawn", figure)
    print(json.dumps({"arrival_to_spawn": figure}))


def read(endpoint, text):
    with endpoint.stream(text) as events:
        yield from events


def text_of(chunk):
    """The text of one native chunk (vllm-worker.md §3.3), whichever of its forms."""
    found = []

    def walk(value):
        if isinstance(value, dict):
            for name, inner in value.items():
                if name == "tokens":
                    found.extend(inner)
                else:
                    walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(chunk)
    return "".join(found)
