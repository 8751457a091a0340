"""REST v2 for endpoints of models: shapes, workers, logs (serverless-api.md §5.4, §7.2 to §7.4)."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace

import pytest

from pilotlight.domain.worker import Address, Failure, Registration, WorkerState
from pilotlight.gateway.slots import Ask
from pilotlight.ports.fleet import Health

ASK = Ask(1)


async def test_an_endpoint_has_the_contracts_shape(management):
    created = await management.create(scaler_value=4)
    endpoint_id = created["id"]
    url = f"http://127.0.0.1:8400/v2/{endpoint_id}"
    expected = {
        "id": endpoint_id,
        "name": "tiny",
        "type": "QUEUE",
        "requestUrls": {
            "run": f"{url}/run",
            "runSync": f"{url}/runsync",
            "status": f"{url}/status/{{job_id}}",
            "stream": f"{url}/stream/{{job_id}}",
            "cancel": f"{url}/cancel/{{job_id}}",
            "retry": f"{url}/retry/{{job_id}}",
            "purgeQueue": f"{url}/purge-queue",
            "health": f"{url}/health",
        },
        "image": "pilotlight/vllm",
        "args": "",
        "disk": 10,
        "ports": [],
        "env": created["env"],
        "registry": None,
        "gpu": None,
        "cpu": [{"id": "cpu3g", "vcpuCount": os.cpu_count(), "memory": 16}],
        "workers": {"min": 0, "max": 3, "idleTimeout": 60},
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
        "dataCenterIds": ["LOCAL"],
        "networkVolumes": [],
        "timeout": 600_000,
        "flashboot": "FLASHBOOT",
        "createdAt": "2026-05-28T20:26:40Z",
    }
    assert (await management.http.get(f"/v2/serverless/{endpoint_id}")).json() == expected
    assert (await management.http.get("/v2/serverless")).json() == {"endpoints": [expected]}
    assert (await management.http.get("/v2/serverless/unknown")).status_code == 404


async def test_shapes_follow_scaler_and_hardware(management, gpu_engine, gpu_host):
    management.surroundings.update(manifest=gpu_engine, host=gpu_host)
    created = await management.create(scaler="REQUEST_COUNT", scaler_value=3, flashboot=False)
    shown = (await management.http.get(f"/v2/serverless/{created['id']}")).json()
    assert shown["scaling"] == {"type": "REQUEST_COUNT", "requestCount": 3}
    assert shown["workers"] == {"min": 0, "max": 3}
    assert shown["flashboot"] == "OFF"
    assert "cpu" not in shown
    assert shown["gpu"] == {
        "pools": ["LOCAL"],
        "count": 1,
        "allowedCudaVersions": [],
        "minCudaVersion": None,
    }


async def test_workers_are_listed_in_both_vocabularies(management, gpu_host):
    """§5.4: starting is initializing; ready is idle or running; draining is running; failed is unhealthy."""
    created = await management.create()
    endpoint_id = created["id"]
    add, slots = management.fleet.add, management.slots
    add("w1", endpoint_id, WorkerState.STARTING)
    add("w2", endpoint_id, WorkerState.READY)
    add("w3", endpoint_id, WorkerState.READY)
    add("w4", endpoint_id, WorkerState.DRAINING, version=0)
    failure = Failure(kind="crash", cause="segfault")
    add("w5", endpoint_id, WorkerState.FAILED, failure=failure)
    for state in (WorkerState.FROZEN, WorkerState.STOPPING, WorkerState.STOPPED):
        add(f"hidden-{state}", endpoint_id, state)
    registration = Registration(engine=Address(url="unix:/run/s", key="engine-secret"))
    slots.open_worker(endpoint_id, "w2", capacity=4, registration=registration)
    slots.admit(endpoint_id, ASK)
    slots.open_worker(endpoint_id, "w3", capacity=4, registration=registration)
    answer = await management.http.get(f"/v2/serverless/{endpoint_id}/workers")
    body = answer.json()
    assert {worker["id"]: worker["status"] for worker in body["workers"]} == {
        "w1": "INITIALIZING",
        "w2": "RUNNING",
        "w3": "IDLE",
        "w4": "RUNNING",
        "w5": "UNHEALTHY",
    }
    summary = body["summary"]
    assert summary == {
        "running": 2, "idle": 1, "initializing": 1, "throttled": 0, "unhealthy": 1, "total": 5,
    }  # fmt: skip
    assert sum(count for name, count in summary.items() if name != "total") == summary["total"]
    assert body["endpointVersion"] == 1
    assert body["workers"][1] == {
        "id": "w2",
        "status": "RUNNING",
        "isStale": False,
        "version": 1,
        "gpuCount": 0,
        "image": "pilotlight/vllm",
        "uptimeSeconds": 90,
        "gpuTypeId": None,
        "dataCenterId": "LOCAL",
        "startedAt": "2026-05-28T20:25:10Z",
        "state": "ready",
        "stage": "ready",
        "progress": None,
        "failure": None,
        "memory_bytes": 3 << 30,
        "pid": 4711,
        "occupied": 1,
        "capacity": 4,
    }
    assert body["workers"][3]["isStale"] is True
    assert body["workers"][4]["failure"] == {"kind": "crash", "cause": "segfault", "advice": ""}
    assert "worker-key-hash" not in answer.text
    assert "engine-secret" not in answer.text
    management.surroundings["host"] = gpu_host
    worker = management.fleet.living["w2"]
    management.fleet.living["w2"] = replace(worker, devices=(0, 1))
    body = (await management.http.get(f"/v2/serverless/{endpoint_id}/workers")).json()
    assert (body["workers"][1]["gpuCount"], body["workers"][1]["gpuTypeId"]) == (2, "NVIDIA H200")


async def test_the_summary_counts_what_has_no_worker_to_list(management):
    """serverless-api.md §5.4, §13 item 13: as in `/health`, failed starts are unhealthy, no room is throttled."""
    endpoint_id = (await management.create())["id"]
    management.fleet.add("w1", endpoint_id, WorkerState.READY)
    management.fleet.add("w2", endpoint_id, WorkerState.FAILED)
    for failures, throttled, shown in ((0, None, (1, 0)), (1, None, (1, 0)), (3, "no room", (3, 1))):
        management.fleet.healths[endpoint_id] = Health(failures=failures, throttled=throttled)
        summary = (await management.http.get(f"/v2/serverless/{endpoint_id}/workers")).json()["summary"]
        assert (summary["unhealthy"], summary["throttled"]) == shown
        assert (summary["idle"], summary["total"]) == (1, 2)


async def test_frozen_workers_are_in_no_counter_and_in_our_own_list(management):
    endpoint_id = (await management.create())["id"]
    management.fleet.add("w1", endpoint_id, WorkerState.READY)
    management.fleet.add("w2", endpoint_id, WorkerState.FROZEN)
    body = (await management.http.get(f"/v2/serverless/{endpoint_id}/workers")).json()
    assert ([each["id"] for each in body["workers"]], body["summary"]["total"]) == (["w1"], 1)
    listed = (await management.http.get(f"/pilotlight/v1/endpoints/{endpoint_id}/workers")).json()["workers"]
    assert [(each["id"], each["state"], each["status"]) for each in listed] == [
        ("w1", "ready", "IDLE"),
        ("w2", "frozen", None),
    ]
    view = (await management.http.get(f"/pilotlight/v1/endpoints/{endpoint_id}")).json()
    assert (view["status"], view["workers"]) == ("ready", {"ready": 1, "frozen": 1})
    assert (await management.http.get("/pilotlight/v1/endpoints/nobody/workers")).status_code == 404


async def test_the_summary_of_no_workers(management):
    """serverless-api.md §5.4."""
    endpoint_id = (await management.create())["id"]
    body = (await management.http.get(f"/v2/serverless/{endpoint_id}/workers")).json()
    assert body["workers"] == []
    assert set(body["summary"].values()) == {0}


@pytest.fixture
async def logged(management, line):
    created = await management.create()
    management.fleet.add("w1", created["id"], WorkerState.READY)
    management.logs.lines["w1"] = [line(number) for number in range(1, 6)]
    management.logs.lines["w1"][1] = line(2, source="system")
    management.logs.ended.set()
    return f"/v2/serverless/{created['id']}/workers/w1/logs"


def events(text: str) -> list[tuple[str, dict]]:
    frames = [frame.split("\n") for frame in text.strip().split("\n\n") if frame]
    return [(frame[0].removeprefix("id: "), json.loads(frame[1].removeprefix("data: "))) for frame in frames]


async def test_logs_are_server_sent_events(management, logged):
    answer = await management.http.get(logged)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    first = events(answer.text)[0]
    assert first == (
        "2026-06-01T12:05:01.000Z/000000000001",
        {"ts": "2026-06-01T12:05:01.000Z", "source": "container", "line": "line 1"},
    )


@pytest.mark.parametrize(
    ("params", "headers", "numbers"),
    [
        ({}, {}, [1, 2, 3, 4, 5]),
        ({"tail": "2"}, {}, [4, 5]),
        ({"tail": "0"}, {}, []),
        ({"since": "2026-06-01T12:05:04Z"}, {}, [4, 5]),
        ({"since": "2026-06-01T14:05:04+02:00", "tail": "1"}, {}, [4, 5]),
        ({"tail": "1"}, {"Last-Event-ID": "2026-06-01T12:05:02.000Z/000000000002"}, [3, 4, 5]),
        ({"tail": "1"}, {"Last-Event-ID": "2026-06-01T12:05:02Z"}, [3, 4, 5]),
        ({"source": "system"}, {}, [2]),
        ({"source": "container,system", "follow": "false"}, {}, [1, 2, 3, 4, 5]),
    ],
)
async def test_where_a_log_begins(management, logged, params, headers, numbers):
    answer = await management.http.get(logged, params=params, headers=headers)
    assert answer.status_code == 200
    assert [int(event[0].split("/")[1]) for event in events(answer.text)] == numbers


@pytest.mark.parametrize(
    ("params", "headers"),
    [
        ({"tail": "5001"}, {}),
        ({"tail": "-1"}, {}),
        ({"since": "yesterday"}, {}),
        ({"source": "kernel"}, {}),
        ({}, {"Last-Event-ID": "a/b/c"}),
        ({}, {"Last-Event-ID": "nonsense"}),
    ],
)
async def test_bad_log_positions_are_refused(management, logged, params, headers):
    answer = await management.http.get(logged, params=params, headers=headers)
    assert answer.status_code == 422, answer.text


async def test_logs_of_unknown_workers_are_404(management, logged):
    other = await management.create()
    assert (await management.http.get(logged.replace("/w1/", "/w9/"))).status_code == 404
    assert (await management.http.get(f"/v2/serverless/{other['id']}/workers/w1/logs")).status_code == 404


async def test_an_ended_worker_keeps_its_log(management, logged):
    worker = management.fleet.living.pop("w1")
    await management.store.put_worker(replace(worker, state=WorkerState.STOPPED, ended_ms=1))
    answer = await management.http.get(logged, params={"follow": "false"})
    assert len(events(answer.text)) == 5


async def test_a_followed_log_shows_new_lines_until_its_reader_goes(management, logged, line):
    """1. The kept lines come at once. 2. A new line comes when it is written. 3. The reader goes; all ends."""
    management.logs.ended.clear()
    sent: asyncio.Queue[bytes] = asyncio.Queue()
    gone = asyncio.Event()
    requests = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive():
        message = next(requests, None)
        if message is None:
            await gone.wait()
            return {"type": "http.disconnect"}
        return message

    async def send(message):
        if message["type"] == "http.response.body" and message.get("body"):
            sent.put_nowait(message["body"])

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": "GET", "path": logged, "raw_path": logged.encode(), "root_path": "", "scheme": "http",
        "query_string": b"tail=1", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8400),
        "headers": [(b"authorization", b"Bearer " + management.admin.encode())],
    }  # fmt: skip
    call = asyncio.ensure_future(management.app(scope, receive, send))
    assert b"line 5" in await sent.get()
    management.logs.lines["w1"].append(line(6))
    management.logs.changed.set()
    assert b"line 6" in await sent.get()
    gone.set()
    await call
