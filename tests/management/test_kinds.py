"""Endpoints whose workers are any command: made, revised, refused, shown."""

from __future__ import annotations

import sys

import pytest

from pilotlight.domain.endpoint import EndpointKind
from pilotlight.domain.worker import Stage, WorkerState
from pilotlight.errors import EngineEnvironmentError

URL = "/pilotlight/v1/endpoints"
COMMAND = [sys.executable, "-m", "http.server"]


async def create(management, **body):
    return await management.http.post(URL, json={"kind": "queue", "command": COMMAND, **body})


async def test_a_command_is_stored_and_shown(management):
    created = (await create(management, env={"A": "1"}, memory_bytes=1_000_000, name="q")).json()
    (stored,) = await management.store.endpoints()
    assert stored.kind is EndpointKind.QUEUE
    assert stored.revision.command == tuple(COMMAND)
    assert (stored.revision.model, dict(stored.revision.env)) == ("", {"A": "1"})
    assert (created["kind"], created["command"], created["memory_bytes"]) == ("queue", COMMAND, 1_000_000)
    assert (created["model"], created["served_names"]) == ("", [])
    assert created["url"] == f"http://127.0.0.1:8400/v2/{stored.id}"


async def test_no_engine_is_needed_for_a_command(management):
    management.surroundings["manifest"] = EngineEnvironmentError("none here")
    assert (await create(management)).status_code == 201


async def test_a_load_balancer_scales_on_requests_and_has_a_road_of_its_own(management):
    """serverless-api.md §3: REQUEST_COUNT only."""
    answer = await create(management, kind="load-balancer", env={"HEALTH_CHECK_PATH": "/healthz"})
    created = answer.json()
    assert (created["scaler"], created["openai_url"]) == ("REQUEST_COUNT", "")
    assert created["url"] == f"http://127.0.0.1:8400/lb/{created['id']}"
    shown = (await management.http.get(f"/v2/serverless/{created['id']}")).json()
    assert shown["type"] == "LOAD_BALANCER"
    assert shown["requestUrls"] == {"base": created["url"], "health": created["url"] + "/healthz"}
    assert shown["args"].endswith("-m http.server")


async def test_a_queue_of_a_command_is_a_queue_for_rest_v2(management):
    created = (await create(management)).json()
    shown = (await management.http.get(f"/v2/serverless/{created['id']}")).json()
    assert (shown["type"], shown["image"]) == ("QUEUE", "pilotlight/command")
    assert "run" in shown["requestUrls"]


@pytest.mark.parametrize(
    ("command", "name"),
    [(COMMAND, "python"), ([sys.executable, __file__], "test_kinds"), (["/bin/sh", "-c", "exit"], "sh")],
)
async def test_a_default_name_comes_from_the_script_or_the_program(management, command, name):
    assert (await create(management, command=command)).json()["name"].startswith(name)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"command": None}, "command or image is needed with kind queue"),
        ({"command": []}, "at least 1 item"),
        ({"command": [""]}, "names the program"),
        ({"command": ["a\0b"]}, "zero byte"),
        ({"command": "python x.py"}, "valid list"),
        ({"command": ["x" * 70_000]}, "at most 65536"),
        ({"model": "pilotlight/ember"}, "model belongs to the kind vllm, but kind is queue"),
        ({"engine_url": "http://h:1"}, "engine_url belongs to the kind vllm"),
        ({"kind": "pod"}, "'vllm', 'queue' or 'load-balancer'"),
        ({"kind": "vllm"}, "command belongs to the kinds queue and load-balancer, but kind is vllm"),
        ({"kind": "load-balancer", "scaler": "QUEUE_DELAY"}, "takes REQUEST_COUNT only"),
        ({"env": {"RUNPOD_POD_ID": "x"}}, "set by the platform"),
        ({"env": {"RUNPOD_WEBHOOK_GET_JOB": "x"}}, "set by the platform"),
        ({"memory_bytes": 0}, "greater than or equal to 1"),
    ],
)
async def test_what_contradicts_the_kind_is_refused(management, body, sentence):
    answer = await create(management, **body)
    assert answer.status_code == 422, answer.text
    assert any(sentence in error for error in answer.json()["errors"]), answer.json()
    assert await management.store.endpoints() == []


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"command": ["no-such-program"]}, "'no-such-program' is not found in the gateway's PATH"),
        ({"command": ["sh"], "env": {"PATH": "/nowhere"}}, "the endpoint's PATH"),
        ({"command": ["./run.sh"]}, "relative path"),
        ({"command": ["/no/such/program"]}, "does not exist"),
        ({"command": [__file__]}, "may not be executed"),
        ({"command": [sys.executable, "handler.py"]}, "script 'handler.py' is a relative path"),
        ({"command": [sys.executable, "/no/handler.py"]}, "script '/no/handler.py' does not exist"),
        ({"gpu_count": 9}, "this host has"),
        ({"memory_bytes": 1 << 49}, "this host can give a worker at most"),
        ({"kind": "load-balancer", "env": {"PORT": "80"}}, "each gets a free port in PORT"),
        ({"kind": "load-balancer", "env": {"PORT_HEALTH": "80"}}, "env.PORT_HEALTH is '80'"),
        ({"kind": "load-balancer", "env": {"HEALTH_CHECK_PATH": "ping"}}, "such as /ping"),
    ],
)
async def test_what_cannot_run_here_is_refused(management, body, sentence):
    answer = await create(management, **body)
    assert answer.status_code in {400, 422}, answer.text
    assert sentence in answer.text
    assert await management.store.endpoints() == []


async def test_what_the_library_reads_may_be_set(management):
    """worker-protocol.md §2.2."""
    env = {"RUNPOD_SKIP_GPU_CHECK": "true", "RUNPOD_LOG_LEVEL": "DEBUG", "RUNPOD_API_KEY": "rpa_X"}
    created = await create(management, env=env)
    assert created.status_code == 201
    assert created.json()["env"]["RUNPOD_API_KEY"] == "********"


async def test_a_command_is_revised_and_a_setting_changes_in_place(management):
    created = (await create(management, env={"A": "1"}, memory_bytes=5_000_000)).json()
    url = f"{URL}/{created['id']}"
    changed = (await management.http.patch(url, json={"max": 7, "kind": "queue"})).json()
    assert (changed["max"], changed["version"]) == (7, 1)
    changed = (await management.http.patch(url, json={"command": COMMAND})).json()
    assert changed["version"] == 2, "its files may have changed"
    changed = (await management.http.patch(url, json={"env": {"A": "1"}})).json()
    assert changed["version"] == 2
    changed = (await management.http.patch(url, json={"env": {"A": "2"}, "memory_bytes": None})).json()
    assert (changed["version"], changed["env"], changed["memory_bytes"]) == (3, {"A": "2"}, 0)
    assert changed["command"] == COMMAND


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"kind": "vllm"}, "cannot change"),
        ({"kind": "load-balancer"}, "cannot change"),
        ({"model": "pilotlight/ember"}, "model belongs to the kind vllm"),
        ({"engine_url": None}, "engine_url belongs to the kind vllm"),
        ({"command": ["./x"]}, "relative path"),
    ],
)
async def test_a_revision_against_the_kind_changes_nothing(management, body, sentence):
    created = (await create(management)).json()
    answer = await management.http.patch(f"{URL}/{created['id']}", json=body)
    assert answer.status_code in {400, 422}
    assert sentence in answer.text
    assert (await management.store.endpoints())[0].revision.version == 1


async def test_a_model_endpoint_takes_no_command_and_a_balancer_no_queue_delay(management):
    model = (await management.create()).copy()
    answer = await management.http.patch(f"{URL}/{model['id']}", json={"command": COMMAND})
    assert "command belongs to the kinds queue and load-balancer" in answer.text
    balanced = (await create(management, kind="load-balancer")).json()
    answer = await management.http.patch(f"{URL}/{balanced['id']}", json={"scaler": "QUEUE_DELAY"})
    assert "REQUEST_COUNT only" in answer.text


async def test_a_worker_out_of_rotation_is_unhealthy(management):
    """serverless-api.md §5.4, §2.15: or initializing, while it answers 204; in no case idle."""
    created = (await create(management, kind="load-balancer")).json()
    for number, stage in enumerate((Stage.READY, Stage.UNHEALTHY, Stage.INITIALIZING)):
        management.fleet.add(f"w{number}", created["id"], WorkerState.READY, stage=stage)
    shown = (await management.http.get(f"/v2/serverless/{created['id']}/workers")).json()
    assert [worker["status"] for worker in shown["workers"]] == ["IDLE", "UNHEALTHY", "INITIALIZING"]
    assert shown["summary"] == {
        "running": 0, "idle": 1, "initializing": 1, "throttled": 0, "unhealthy": 1, "total": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("HF_TOKEN", "x", True),
        ("SIGNING_KEY", "x", True),
        ("BASIC_AUTH", "x", True),
        ("DB_PASSPHRASE", "x", True),
        ("SENTRY_DSN", "x", True),
        ("DATABASE_URL", "postgresql://user:word@host/db", True),
        ("BROKER", "redis://:word@host", True),
        ("SITE", "https://host/a@b", False),
        ("MAX_NUM_BATCHED_TOKENS", "1", False),
        ("KEYBOARD", "x", False),
        ("AUTHOR", "x", False),
    ],
)
async def test_values_that_look_secret_are_not_shown(management, name, value, hidden):
    body = {"kind": "queue", "command": [sys.executable], "env": {name: value}}
    answer = await management.http.post(URL, json=body)
    assert answer.status_code < 300, answer.text
    shown = (await management.http.get(f"{URL}/{answer.json()['id']}")).json()["env"][name]
    assert shown == ("********" if hidden else value)
