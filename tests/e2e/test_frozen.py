"""Whole installations with FlashBoot: idle workers stand still instead of ending, and go on for the next caller."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

HANDLER = """
import os
import runpod

runpod.serverless.start({"handler": lambda job: {"worker": os.environ["RUNPOD_POD_ID"], "pid": os.getpid()}})
"""


SERVER = """
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = str(os.getpid()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


@pytest.fixture
def installation(make_installation):
    """Patient: a busy machine may be slow to answer after a thaw, which is not what is tested."""
    return make_installation(PILOTLIGHT_WORKERS__THAW_TIMEOUT_S="20").start()


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until_frozen(endpoint, tools, *stopped):
    """Its worker as soon as it is frozen, and these processes stand still; it is called so a moment earlier."""
    worker = tools.until(
        lambda: next((each for each in endpoint.workers() if each["state"] == "frozen"), None),
        "a frozen worker",
    )
    tools.until(lambda: all(state_of(pid) == "T" for pid in stopped), "its processes stand still")
    return worker


class Foreign:
    """An endpoint of workers that are not our program."""

    def __init__(self, installation, script, kind="queue"):
        self.installation = installation
        body = {
            "kind": kind, "command": [sys.executable, str(script)], "memory_bytes": 100_000_000,
            "idle_timeout_s": 1, "flashboot": True,
        }  # fmt: skip
        answer = installation.api.post("/pilotlight/v1/endpoints", json=body)
        assert answer.status_code == 201, answer.text
        self.id = answer.json()["id"]

    def run(self):
        answer = self.installation.api.post(f"/v2/{self.id}/runsync?wait=30000", json={"input": {}})
        return answer.json()

    def workers(self):
        return self.installation.api.get(f"/pilotlight/v1/endpoints/{self.id}/workers").json()["workers"]


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "handler.py"
    path.write_text(HANDLER)
    return path


def test_an_idle_worker_stands_still_and_answers_the_next_caller(installation, tools):
    """1. After its idle timeout its engine is stopped, its program is not. 2. It is in no counter of RunPod's.
    3. The next request and the next job find the same engine, and their thaws are on record. 4. A lowered maximum
    ends it as it is; frozen time is a usage of its own, without a gap."""
    endpoint = installation.deploy(idle_timeout_s=1, flashboot=True)
    assert endpoint.chat("x").status_code == 200
    engine = endpoint.engine_pid()
    worker = until_frozen(endpoint, tools, engine)
    assert state_of(worker["pid"]) != "T"
    assert set(endpoint.health()["workers"].values()) == {0}
    assert endpoint.chat("y").status_code == 200
    until_frozen(endpoint, tools)
    job = endpoint.result(endpoint.run("count to 3"))
    assert (job["status"], job["workerId"]) == ("COMPLETED", worker["id"])
    thaws = [start for start in endpoint.starts() if start["rung"] == "frozen"]
    assert [start["outcome"] for start in thaws] == ["ready", "ready"]
    until_frozen(endpoint, tools, engine)
    endpoint.revise(max=0)
    tools.wait_dead(engine)
    tools.wait_dead(worker["pid"])
    assert len(endpoint.happenings("start")) == 1
    assert installation.interrupt() == 0
    installation.check_account()
    frozen = installation.table("SELECT count(*) FROM usage_intervals WHERE state = 'frozen'")
    assert frozen[0][0] >= 3


def test_a_worker_of_another_program_is_used_again_after_a_second_and_after_six(installation, tools, script):
    """worker-protocol.md §6.6: its polls had been open all the while, and no job is written into those."""
    endpoint = Foreign(installation, script)
    first = endpoint.run()
    assert first["status"] == "COMPLETED", first
    for pause_s in (1, 6):
        until_frozen(endpoint, tools, *installation.processes())
        time.sleep(pause_s)
        again = endpoint.run()
        assert (again["status"], again.get("retries")) == ("COMPLETED", None), again
        assert again["output"] == first["output"]
    assert installation.interrupt() == 0
    installation.check_account()


def test_a_server_is_used_again(installation, tools, tmp_path):
    """1. A load-balancing worker is frozen in the middle of its keep-alive connections and health checks. 2. A
    request finds it again, and one that is pinned to it as well."""
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    endpoint = Foreign(installation, script, kind="load-balancer")
    first = installation.api.get(f"/lb/{endpoint.id}/")
    assert first.status_code == 200, first.text
    for headers in ({}, {"X-Runpod-Worker-Id": "strict {id}"}):
        worker = until_frozen(endpoint, tools, *installation.processes())
        pinned = {name: value.format(id=worker["id"]) for name, value in headers.items()}
        again = installation.api.get(f"/lb/{endpoint.id}/", headers=pinned)
        assert (again.status_code, again.text) == (200, first.text)


def test_a_gateway_that_is_killed_leaves_frozen_workers_to_its_next_life(installation, tools, script):
    """1. Workers of both kinds stand still when the gateway gets SIGKILL; nothing wakes them. 2. After the restart
    no process of them is left, and their ends are on record. 3. The next callers are served."""
    ours, foreign = installation.deploy(idle_timeout_s=1, flashboot=True), Foreign(installation, script)
    assert ours.chat("x").status_code == 200
    first = foreign.run()
    until_frozen(ours, tools, ours.engine_pid())
    until_frozen(foreign, tools, first["output"]["pid"])
    left = installation.processes()
    assert {ours.engine_pid(), first["output"]["pid"]} < left.keys()
    installation.crash()
    assert {state_of(ours.engine_pid()), state_of(first["output"]["pid"])} == {"T"}
    installation.start()
    for pid in left:
        tools.wait_dead(pid)
    assert ours.chat("y").status_code == 200
    assert foreign.run()["status"] == "COMPLETED"
    assert installation.interrupt() == 0
    installation.check_account()
    ends = installation.table("SELECT state, failure FROM workers WHERE failure LIKE '%orphaned%'")
    assert len(ends) == 2
