"""`pilotlight deploy --kind`: what is sent for workers that are any command, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pilotlight.cli.deploy import _has_ready
from pilotlight.client import PilotlightClient

ADMIN_KEY = "rpa_admin0secret"
POST = ("POST", "/pilotlight/v1/endpoints")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a script, which is where we are."""
    monkeypatch.chdir(tmp_path)
    Path("handler.py").write_text("pass")
    Path("data").mkdir()
    return tmp_path


def test_a_queue_endpoint_is_made_of_a_command(cli, gateway, here):
    result = cli(
        "deploy", "--kind", "queue", "--command", "sh handler.py --size '2 words' data", "--name", "q"
    )
    assert result.exit_code == 0, result.output
    (sent,) = gateway.sent(*POST)
    program = os.path.abspath(shutil.which("sh"))  # noqa: PTH100 - links stay
    assert sent.body["command"] == [program, str(here / "handler.py"), "--size", "2 words", "data"]
    assert (sent.body["kind"], sent.body["scaler"]) == ("queue", "QUEUE_DELAY")
    assert "model" not in sent.body
    assert f"workers run: {program} {here}/handler.py --size '2 words' data" in result.stderr
    for text in ("kind     queue", "/runsync", "pilotlight logs q"):
        assert text in result.stdout


def test_a_load_balancer_scales_on_requests(cli, gateway, here):
    options = ["--kind", "load-balancer", "--name", "api", "--memory", "1.5G", "--gpus", "1", "--env", "A=1"]
    result = cli("deploy", *options, "--command", "/bin/sh ./handler.py", "--json")
    assert json.loads(result.stdout)["name"] == "api"
    (sent,) = gateway.sent(*POST)
    assert sent.body["command"] == ["/bin/sh", str(here / "handler.py")]
    assert (sent.body["scaler"], sent.body["memory_bytes"], sent.body["gpu_count"]) == (
        "REQUEST_COUNT",
        3 << 29,
        1,
    )


def test_what_is_not_here_is_left_to_the_gateway_to_judge(cli, gateway, here):
    cli("deploy", "--kind", "queue", "--command", "no-such-program missing -v")
    (sent,) = gateway.sent(*POST)
    assert sent.body["command"] == ["no-such-program", "missing", "-v"]


def test_a_name_that_exists_is_revised(cli, gateway, here):
    endpoint = gateway.add("q", kind="queue", model="", command=["old"])
    cli("deploy", "--kind", "queue", "--command", "/bin/sh new", "--name", "q", "--json")
    (sent,) = gateway.sent("PATCH", f"/pilotlight/v1/endpoints/{endpoint['id']}")
    assert sent.body == {"kind": "queue", "command": ["/bin/sh", "new"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kind", "queue"], ["--command", "--kind queue needs it"]),
        (["--kind", "queue", "org/model"], ["takes a --command instead"]),
        (["--kind", "load-balancer", "--engine-url", "http://h:1"], ["takes a --command instead"]),
        (["--command", "sh x"], ["--command", "name the kind"]),
        (["--kind", "vllm", "org/model", "--command", "sh x"], ["belongs to --kind queue"]),
        (["org/model", "--memory", "4G"], ["--memory", "is computed"]),
        (["--kind", "queue", "--command", "sh 'x"], ["No closing quotation"]),
        (["--kind", "queue", "--command", "sh missing.py"], ["no file 'missing.py' here"]),
        (["--kind", "queue", "--command", " "], ["names no program"]),
        (["--kind", "queue", "--command", "sh", "--memory", "much"], ["'much' is no size"]),
        (["--kind", "pod", "--command", "sh"], ["'vllm', 'queue', 'load-balancer'"]),
    ],
)
def test_what_contradicts_the_kind_is_refused_before_anything_is_sent(cli, gateway, arguments, words):
    result = cli("deploy", *arguments)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    for word in words:
        assert word in said
    assert not gateway.sent(*POST)


def test_wait_needs_a_minimum(cli, gateway):
    result = cli("deploy", "--kind", "queue", "--command", "/bin/sh x", "--name", "q", "--wait")
    assert result.exit_code == 2
    assert "--min 1" in result.output
    assert not gateway.sent(*POST), "nothing is stored that cannot be waited for"
    gateway.add("q", kind="queue", model="", command=["old"], min=1)
    arguments = ["deploy", "--kind", "queue", "--command", "/bin/sh x", "--name", "q", "--wait"]
    assert cli(*arguments, "--min", "0").exit_code == 2


def test_wait_fails_with_cause_and_advice(cli, gateway):
    failure = {"kind": "exited", "cause": "worker ended with exit status 1", "advice": "see the log"}
    gateway.add("q", kind="queue", model="", command=["old"], min=1, failure=failure)
    result = cli("deploy", "--kind", "queue", "--command", "/bin/sh x", "--name", "q", "--wait")
    assert result.exit_code != 0
    assert "exit status 1. see the log" in result.stderr


def test_wait_is_not_satisfied_by_a_worker_of_an_earlier_revision(gateway, a_worker):
    endpoint = gateway.add("q", kind="queue", model="", min=1, version=2)
    gateway.workers[endpoint["id"]] = [a_worker(version=1)]
    with PilotlightClient(gateway.url, ADMIN_KEY) as client:
        assert not _has_ready(client, endpoint)
        gateway.workers[endpoint["id"]].append(a_worker(version=2))
        assert _has_ready(client, endpoint)


def test_wait_returns_with_a_ready_worker(cli, gateway, a_worker):
    endpoint = gateway.add("q", kind="queue", model="", command=["old"], min=1, status="ready")
    gateway.workers[endpoint["id"]] = [a_worker(version=1), a_worker(version=2)]
    result = cli("deploy", "--kind", "queue", "--command", "/bin/sh x", "--name", "q", "--wait", "--json")
    assert result.exit_code == 0, result.output
    assert "ready after" in result.stderr


def test_lists_show_the_kind_and_the_command(cli, gateway, a_worker):
    endpoint = gateway.add("q", kind="load-balancer", model="", command=["/bin/sh", "a b"])
    gateway.workers[endpoint["id"]] = [a_worker()]
    assert "load-balancer" in cli("ls").stdout
    assert "/bin/sh 'a b'" in cli("ls").stdout
    assert "load-balancer" in cli("ps").stdout
