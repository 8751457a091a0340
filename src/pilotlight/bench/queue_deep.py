"""A queue of a million jobs: what it does to submissions, takes, memory, `/health` and `purge-queue`.

Two gateways, alike but for the depth of the queue, are measured in turn. The deep queue is made by the
store itself before its gateway starts (`bench.harness.fill`).
"""

from __future__ import annotations

import http.client
import json
import time
from pathlib import Path
from typing import Any

from pilotlight.bench.errors import BenchError
from pilotlight.bench.figures import Report
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench, python_module
from pilotlight.bench.queue_load import PILOTLIGHT, Load, ask_clients, queue_endpoint
from pilotlight.cli.output import note

_HEALTH_CALLS = 50
_FILL_S = 1800.0
_START_S = 60.0

_ROOM = {"PILOTLIGHT_LIMITS__QUEUE_JOBS": "4000000"}
"""The default bound is the depth that is measured; submissions must still be accepted there."""


def measure_deep(bench: Bench, load: Load, report: Report) -> None:
    """Measure and print."""
    shallow = _Queue(bench, "shallow", load)
    deep = _Queue(bench, "deep", load, jobs=load.deep)
    seen: dict[str, list[float]] = {"deep_submit_ratio": [], "deep_take_ratio": []}
    for number in range(load.rounds):
        submitted, taken = {}, {}
        for queue in (shallow, deep)[:: -1 if number % 2 else 1]:
            note(f"queue: {queue.name} queue, round {number + 1} of {load.rounds}")
            answer = ask_clients(
                bench, "submit", queue.port, queue.endpoint, queue.key, load.seconds, load.connections
            )
            submitted[queue.name] = answer["jobs_per_s"]
            taken[queue.name] = queue.taken_per_s(bench, load)
        seen["deep_submit_ratio"].append(submitted["deep"] / submitted["shallow"])
        seen["deep_take_ratio"].append(taken["deep"] / taken["shallow"])
    for metric, ratios in seen.items():
        report.add(PILOTLIGHT, metric, "ratio", ratios)
    asked = [deep.timed("GET", "health")[0] for _ in range(_HEALTH_CALLS)]
    report.add(PILOTLIGHT, "deep_health_ms", "ms", asked, value=max(asked))
    report.add(PILOTLIGHT, "deep_rss_mb", "MB", [_peak_mb(deep.installation.pid)])
    left = deep.health()["inQueue"]
    took, answer = deep.timed("POST", "purge-queue")
    report.add(PILOTLIGHT, "deep_purge_ms", "ms", [took])
    note(f"queue: purged {answer.get('removed')} of {left} jobs")


class _Queue:
    """A gateway with one endpoint that is not served until takes are measured."""

    def __init__(self, bench: Bench, name: str, load: Load, *, jobs: int = 0) -> None:

        self.name = name
        self._workers = load.batch_workers
        self.installation = Installation(bench, name, **_ROOM)
        command = python_module("pilotlight.bench.harness.job_worker", 1, load.batch)
        self.endpoint = queue_endpoint(self.installation, name, command, workers=0, slots=load.batch)
        self.key = self.installation.run_key(self.endpoint)
        if jobs:
            note(f"queue: making a queue of {jobs} jobs")
            bench.end(self.installation.child)
            home = str(bench.folder / name)
            bench.run(
                "fill",
                python_module("pilotlight.bench.harness.fill", home, self.endpoint, jobs),
                timeout_s=_FILL_S,
            )
            self.installation = Installation(bench, name, **_ROOM)
        self.port = self.installation.port

    def taken_per_s(self, bench: Bench, load: Load) -> float:
        """Jobs taken and finished per second by workers that come to a queue which is there already."""
        wanted = load.shallow_per_s * load.seconds
        lacking = wanted - self.health()["inQueue"]
        if lacking > 0:
            ask_clients(bench, "submit", self.port, self.endpoint, self.key, 600, load.connections, lacking)
        self._resize(self._workers)
        try:
            began = self.health()["completed"]
            self.installation.wait(
                "the first job to be finished", lambda: self.health()["completed"] > began, timeout_s=_START_S
            )
            # All of the workers have come by then, or nearly.
            time.sleep(min(1.0, load.seconds / 4))
            started, before = time.perf_counter(), self.health()["completed"]
            done = before
            while time.perf_counter() - started < load.seconds and self.health()["inQueue"]:
                time.sleep(0.02)
                done = self.health()["completed"]
            took = time.perf_counter() - started
        finally:
            self._resize(0)
            self.installation.wait_no_workers(self.endpoint)
        if done == before:
            raise BenchError(f"{self.name} queue: nothing was taken within {took:.1f} s")
        return (done - before) / took

    def health(self) -> dict[str, int]:
        """The counters of jobs."""
        jobs: dict[str, int] = self.timed("GET", "health")[1]["jobs"]
        return jobs

    def timed(self, method: str, operation: str) -> tuple[float, dict[str, Any]]:
        """Milliseconds of a request, on a connection of its own, and its answer."""
        started = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {"authorization": f"Bearer {self.key}"}
            connection.request(method, f"/v2/{self.endpoint}/{operation}", headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        took = (time.perf_counter() - started) * 1000
        if answer.status != 200:
            raise BenchError(f"{operation}: status {answer.status}: {body[:200]!r}")
        return took, json.loads(body)

    def _resize(self, workers: int) -> None:
        self.installation.client.revise_endpoint(self.endpoint, {"min": workers, "max": workers})


def _peak_mb(pid: int) -> float:
    """The most memory that a process has had resident, in megabytes (10⁶ bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise BenchError(f"process {pid} has ended")
