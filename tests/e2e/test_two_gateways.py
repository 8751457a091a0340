"""Two whole gateways on one PostgreSQL: one leads and has the workers, the other serves the same queue."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..conftest import LiveInstallation, live_installation  # noqa: TID252

WAIT_S = 60
"""Bound of every wait; nothing is asserted about how much of it is used."""

WORKER = r"""
import json, os, signal, sys, threading, time, urllib.request

signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
me = os.environ["RUNPOD_POD_ID"]

def call(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": os.environ["RUNPOD_AI_API_KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method="GET" if data is None else "POST")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return answer.status, answer.read()

holding, stopped = [], set()

def beat():
    while True:
        call(os.environ["RUNPOD_WEBHOOK_PING"].replace("$RUNPOD_POD_ID", me) + "&job_id=" + ",".join(holding))
        time.sleep(0.3)

threading.Thread(target=beat, daemon=True).start()
while True:
    status, body = call(os.environ["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", me) + "&job_in_progress=0")
    if status != 200:
        continue
    job = json.loads(body)
    holding.append(job["id"])
    stream = os.environ["RUNPOD_WEBHOOK_POST_STREAM"].replace("$RUNPOD_POD_ID", me).replace("$ID", job["id"])
    done = os.environ["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$RUNPOD_POD_ID", me).replace("$ID", job["id"])
    for number in range(3):
        call(stream + "&isStream=true", {"output": number})
    while not os.path.exists(job["input"]["until"]):
        time.sleep(0.02)
    call(done + "&isStream=true", {"output": []})
    holding.clear()
"""


@pytest.fixture
def pair(postgresql_url: str, tmp_path: Path) -> Iterator[tuple[LiveInstallation, LiveInstallation]]:
    """Two gateways with data folders of their own and one secret; the first one leads."""
    settings = {
        "PILOTLIGHT_STORE__URL": postgresql_url,
        "PILOTLIGHT_SERVER__SECRET_KEY_FILE": str(tmp_path / "secret"),
        "PILOTLIGHT_ENGINE__COMMAND": json.dumps([sys.executable, "-m", "pilotlight.testing.fake_engine"]),
    }
    with live_installation(**settings) as leader, live_installation(**settings) as follower:
        yield leader, follower


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def deploy(gateway: LiveInstallation, **settings: object) -> str:
    answer = gateway.api.post(
        "/pilotlight/v1/endpoints",
        json={
            "kind": "queue",
            "command": [sys.executable, "-c", WORKER],
            "name": "streams",
            "memory_bytes": 50_000_000,
            **settings,
        },
    )
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def submit(gateway: LiveInstallation, endpoint_id: str, until_file: Path) -> str:
    answer = gateway.api.post(f"/v2/{endpoint_id}/run", json={"input": {"until": str(until_file)}})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def status(gateway: LiveInstallation, endpoint_id: str, job_id: str) -> str:
    return gateway.api.get(f"/v2/{endpoint_id}/status/{job_id}").json()["status"]


def worker_ids(gateway: LiveInstallation, endpoint_id: str) -> list[str]:
    answer = gateway.api.get(f"/v2/serverless/{endpoint_id}/workers").json()
    return [worker["id"] for worker in answer["workers"]]


def stream(gateway: LiveInstallation, endpoint_id: str, job_id: str) -> list[object]:
    """Everything a client of `/stream` sees (serverless-api.md §2.8)."""
    values: list[object] = []
    while True:
        answer = gateway.api.get(f"/v2/{endpoint_id}/stream/{job_id}").json()
        values += [chunk["output"] for chunk in answer["stream"]]
        if answer["status"] not in {"IN_QUEUE", "IN_PROGRESS"}:
            return values


def test_a_job_submitted_to_one_is_run_by_the_other_and_streamed_from_the_first(
    pair: tuple[LiveInstallation, LiveInstallation], tmp_path: Path
) -> None:
    """The follower makes the endpoint and takes the job; the leader's worker runs it."""
    leader, follower = pair
    endpoint_id = deploy(follower)
    go = tmp_path / "go"
    job_id = submit(follower, endpoint_id, go)
    until(lambda: status(follower, endpoint_id, job_id) == "IN_PROGRESS")
    assert worker_ids(leader, endpoint_id)
    # The follower has none of its own, and shows those of the leader.
    until(lambda: worker_ids(follower, endpoint_id) == worker_ids(leader, endpoint_id))
    go.touch()
    assert stream(follower, endpoint_id, job_id) == [0, 1, 2]
    assert status(leader, endpoint_id, job_id) == status(follower, endpoint_id, job_id) == "COMPLETED"
    health = [gateway.api.get(f"/v2/{endpoint_id}/health").json()["jobs"] for gateway in pair]
    assert health[0] == health[1]
    assert health[0]["completed"] == 1


def test_openai_calls_to_a_follower_become_jobs(pair: tuple[LiveInstallation, LiveInstallation]) -> None:
    """The engine is out of its reach, so the leader's worker is asked by way of the queue (vllm-worker.md §1.9)."""
    leader, follower = pair
    answer = leader.api.post(
        "/pilotlight/v1/endpoints",
        json={"model": "pilotlight/ember", "name": "ember", "max": 1},
    )
    assert answer.status_code in {201, 409, 503}, answer.text
    if answer.status_code != 201:
        pytest.skip("no engine here to check the model with")
    endpoint_id = answer.json()["id"]
    until(lambda: follower.api.get(f"/v2/{endpoint_id}/health").status_code == 200)
    route = f"/v2/{endpoint_id}/openai/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": "one two three"}], "stream": True}
    streamed = follower.api.post(route, json=body, timeout=WAIT_S)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == "one two three"
    whole = follower.api.post(route, json={**body, "stream": False}, timeout=WAIT_S)
    assert whole.json()["choices"][0]["message"]["content"] == "one two three"
    assert follower.api.get(f"/v2/{endpoint_id}/health").json()["jobs"]["completed"] == 2
    # What the data path refuses or answers itself is the same here (§1.10, §6.1).
    models = [gateway.api.get(f"/v2/{endpoint_id}/openai/v1/models").json() for gateway in pair]
    assert models[0] == models[1]
    assert models[0]["data"][0]["id"] == "pilotlight/ember"
    assert follower.api.get(route).status_code == 405
    assert follower.api.post(f"/v2/{endpoint_id}/openai/sleep", json={}).status_code == 403


def test_a_follower_refuses_at_once_what_no_worker_can_answer(
    pair: tuple[LiveInstallation, LiveInstallation],
) -> None:
    leader, follower = pair
    answer = leader.api.post(
        "/pilotlight/v1/endpoints", json={"model": "pilotlight/ember", "name": "ember", "max": 0}
    )
    assert answer.status_code in {201, 409, 503}, answer.text
    if answer.status_code != 201:
        pytest.skip("no engine here to check the model with")
    endpoint_id = answer.json()["id"]
    until(lambda: follower.api.get(f"/v2/{endpoint_id}/health").status_code == 200)
    refused = follower.api.post(f"/v2/{endpoint_id}/openai/v1/chat/completions", json={"messages": []})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert refused.json()["error"]["code"] == "no_worker"


def test_the_follower_takes_over_when_the_leader_is_killed(
    pair: tuple[LiveInstallation, LiveInstallation], tmp_path: Path
) -> None:
    """1. The leader's worker has a job. 2. The leader is killed. 3. The job runs again, at the other's worker."""
    leader, follower = pair
    endpoint_id = deploy(leader)
    go = tmp_path / "go"
    job_id = submit(leader, endpoint_id, go)
    until(lambda: status(follower, endpoint_id, job_id) == "IN_PROGRESS")
    leader.process.send_signal(signal.SIGKILL)
    leader.process.wait()
    until(lambda: follower.api.get(f"/v2/{endpoint_id}/health").json()["workers"].get("running", 0))
    go.touch()
    until(lambda: status(follower, endpoint_id, job_id) == "COMPLETED")
    answer = follower.api.get(f"/v2/{endpoint_id}/status/{job_id}").json()
    assert answer.get("retries", 0) == 0


def test_a_cancellation_through_the_follower_reaches_the_worker(
    pair: tuple[LiveInstallation, LiveInstallation], tmp_path: Path
) -> None:
    """The worker, which goes on with what was cancelled, is stopped, and its slot is free again."""
    leader, follower = pair
    endpoint_id = deploy(leader, max=1)
    until(lambda: follower.api.get(f"/v2/{endpoint_id}/health").status_code == 200)
    job_id = submit(follower, endpoint_id, tmp_path / "never")
    until(lambda: status(follower, endpoint_id, job_id) == "IN_PROGRESS")
    assert follower.api.post(f"/v2/{endpoint_id}/cancel/{job_id}").json()["status"] == "CANCELLED"
    go = tmp_path / "go"
    go.touch()
    second = submit(follower, endpoint_id, go)
    until(lambda: status(follower, endpoint_id, second) == "COMPLETED")
