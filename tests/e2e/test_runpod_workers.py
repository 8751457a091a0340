"""Workers built on the unmodified `runpod` package, started and ended by a whole installation."""

from __future__ import annotations

import signal
import sys
from collections import Counter

import pytest

HANDLER = """
import os, time
import runpod

def handler(job):
    value = job["input"]
    if "until" in value:
        with open(value["until"] + ".pid", "w") as file:
            file.write(str(os.getpid()))
        os.rename(value["until"] + ".pid", value["until"] + ".begun")
        while not os.path.exists(value["until"]):
            time.sleep(0.01)
    files = sorted(os.listdir("."))
    open("trace", "w").close()
    output = {"worker": os.environ["RUNPOD_POD_ID"], "files": files}
    return {**output, "refresh_worker": True} if value.get("refresh") else output

if os.environ.get("UNFIT"):
    @runpod.serverless.register_fitness_check
    def model_is_there():
        raise RuntimeError("model file is missing")

runpod.serverless.start({"handler": handler})
"""


class Gate:
    """Holds a handler up; knows its process."""

    def __init__(self, path, tools):
        self.path = path
        self.tools = tools

    def pid(self):
        begun = self.path.with_suffix(".begun")
        self.tools.until(begun.exists, "the handler runs")
        pid = int(begun.read_text())
        begun.unlink()
        return pid


class Endpoint:
    def __init__(self, installation, script, **settings):
        self.installation = installation
        body = {"kind": "queue", "command": [sys.executable, str(script)], "memory_bytes": 100_000_000}
        answer = installation.api.post("/pilotlight/v1/endpoints", json=body | settings)
        assert answer.status_code == 201, answer.text
        self.id = answer.json()["id"]

    def view(self):
        return self.installation.api.get(f"/pilotlight/v1/endpoints/{self.id}").json()

    def submit(self, **given):
        answer = self.installation.api.post(f"/v2/{self.id}/run", json={"input": given})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def result(self, job_id):
        for _ in range(4):
            job = self.installation.api.get(f"/v2/{self.id}/status-sync/{job_id}?wait=20000").json()
            if job["status"] not in {"IN_QUEUE", "IN_PROGRESS"}:
                return job
        pytest.fail(f"{job}\n{self.installation.log.read_text()[-4000:]}")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "handler.py"
    path.write_text(HANDLER)
    return path


def test_lives_of_workers(installation, script, tools, tmp_path):
    """worker-protocol.md §15: 9 (the main process is killed), 15 (refresh), 16 (fitness), 21 (fresh folder)."""
    endpoint = Endpoint(installation, script, idle_timeout_s=600)
    unfit = Endpoint(installation, script, idle_timeout_s=600, env={"UNFIT": "1"})
    waiting = unfit.submit(n=1)
    first = endpoint.result(endpoint.submit(refresh=True))
    assert first["output"]["files"] == []
    # The worker that asked for it is replaced, and nobody counts that as a failure.
    gate = Gate(tmp_path / "gate", tools)
    second = endpoint.submit(until=str(gate.path))
    pid = gate.pid()
    installation.signal(pid, signal.SIGKILL)
    assert gate.pid() != pid
    gate.path.touch()
    done = endpoint.result(second)
    assert (done["status"], done["retries"]) == ("COMPLETED", 1)
    # A worker that begins anew finds nothing of the one before (worker-protocol.md §11).
    assert done["output"]["files"] == []
    assert done["output"]["worker"] != first["output"]["worker"]
    failure = tools.until(lambda: unfit.view().get("failure"), "the failure is shown")
    assert "model file is missing" in str(failure)
    unfit.installation.api.post(f"/v2/{unfit.id}/cancel/{waiting}")


def test_idle_workers_end_by_themselves_when_the_gateway_stops(installation, script, tools):
    """worker-protocol.md §6.3: signal, then answers to the polls, and the exit of an idle worker is a second.

    All polls were answered before the first signal: most workers asked again, were answered 429, slept for 5 s,
    and were killed when the grace of 4 s was over.
    """
    endpoint = Endpoint(installation, script, idle_timeout_s=600, min=3, max=3)
    # Ready at their first take, which is held for longer than this test lasts.
    health = f"/v2/{endpoint.id}/health"
    tools.until(
        lambda: installation.api.get(health).json()["workers"]["idle"] == 3, "three workers are ready"
    )
    assert installation.interrupt() == 0
    logs = [path.read_text() for path in (installation.home / "logs").glob("*.log")]
    assert len(logs) == 3
    for log in logs:
        assert "exited with status 0" in log, log[-2000:]


def test_gateway_that_is_killed_while_a_job_runs(installation, script, tools, tmp_path):
    """worker-protocol.md §15 scenario 7: after the restart the job runs again, and has used no retry."""
    endpoint = Endpoint(installation, script, idle_timeout_s=600)
    gate = Gate(tmp_path / "gate", tools)
    job_id = endpoint.submit(until=str(gate.path))
    pid = gate.pid()
    installation.crash()
    installation.start()
    tools.wait_dead(pid)
    assert gate.pid() != pid
    gate.path.touch()
    done = endpoint.result(job_id)
    assert (done["status"], "retries" in done) == ("COMPLETED", False)
    answer = installation.api.get(f"/v2/{endpoint.id}/health").json()
    assert Counter(answer["jobs"]) == Counter(completed=1)
