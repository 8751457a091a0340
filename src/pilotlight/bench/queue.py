"""`pilotlight bench queue`: what the job queue takes per second and how long jobs wait, beside other queues.

A real gateway with default settings (SQLite, durable before the answer), real worker processes that it starts
itself, and lean load generators in processes of their own. Five measurements a round:

1. submissions per second over many connections, nobody taking them;
2. submissions on a fixed schedule to a worker that is polling: time to the answer, time to the worker;
3. end to end (submitted, taken, result posted, status read) with takes and posts of many jobs;
4. the same one job at a time, with the protocol client of our own worker program;
5. the same with each peer (`bench.queue_peers`).

What a million queued jobs change is measured by `bench.queue_deep`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotlight.bench.figures import Report, quantile
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench, children_of, cpu_s, python_module
from pilotlight.bench.queue_deep import measure_deep
from pilotlight.bench.queue_load import PILOTLIGHT, Load, ask_clients, queue_endpoint, wait_ready
from pilotlight.bench.queue_peers import Peer, start_peers
from pilotlight.cli.output import note

DURABILITY = "on disk (fsync) before the answer"

_MICRO = 1e6
_FSYNCS = 200


@dataclass(slots=True)
class Samples:
    """Values by metric, one per round."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def note(self, **values: float) -> None:
        """Add one round's values."""
        for metric, value in values.items():
            self.values.setdefault(metric, []).append(value)


UNITS = {
    "submit_jobs_per_s": "1/s",
    "submit_gateway_us": "us",
    "submit_client_us": "us",
    "end_to_end_batch16_jobs_per_s": "1/s",
    "end_to_end_batch16_gateway_us": "us",
    "end_to_end_batch16_others_us": "us",
    "end_to_end_single_jobs_per_s": "1/s",
    "end_to_end_single_gateway_us": "us",
    "end_to_end_single_others_us": "us",
    "submit_ms_p50": "ms",
    "submit_ms_p99": "ms",
    "queue_wait_ms_p50": "ms",
    "queue_wait_ms_p99": "ms",
    "fsync_ms_p50": "ms",
    "failed_jobs": "count",
}
"""What is measured of Pilotlight each round, with units, in the order of the output.

`…_us` is CPU time per job: of the gateway, of the clients, of clients and workers together.
"""

SINGLE = "end_to_end_single_jobs_per_s"


def run(load: Load, report: Report) -> None:
    """Measure and print.

    Raises:
        UsageError: A peer is asked for that is not known.
        BenchError: Something that was started failed, or a job was lost.
    """
    with Bench() as bench, contextlib.closing(report):
        peers = start_peers(bench, load.peers)
        queue = _Pilotlight(Installation(bench), load)
        ours = Samples()
        theirs: dict[str, list[float]] = {peer.case: [] for peer in peers}
        for number in range(load.rounds):
            told = f"queue: round {number + 1} of {load.rounds}"
            # The order turns, so that nobody always comes first or last.
            for case in [None, *peers][:: -1 if number % 2 else 1]:
                if case is None:
                    note(f"{told}: {PILOTLIGHT}")
                    _measure(bench, queue, load, ours)
                else:
                    note(f"{told}: {case.case}")
                    theirs[case.case].append(case.measure(bench, seconds=load.seconds, window=load.window))
        _print(report, ours, peers, theirs)
        if load.deep:
            measure_deep(bench, load, report)


class _Pilotlight:
    """The gateway with its endpoints: one that nobody serves, and one for each kind of worker."""

    def __init__(self, installation: Installation, load: Load) -> None:
        self.installation = installation
        worker = "pilotlight.bench.harness.job_worker"
        self.idle = queue_endpoint(installation, "idle", python_module(worker, 1, 1), workers=0)
        self.polled = queue_endpoint(
            installation, "polled", python_module(worker, 1, 1), workers=load.polling_workers
        )
        self.batch = queue_endpoint(
            installation,
            "batch",
            python_module(worker, 1, load.batch),
            workers=load.batch_workers,
            slots=load.batch,
        )
        self.single = queue_endpoint(
            installation,
            "single",
            python_module("pilotlight.bench.harness.loop_worker"),
            workers=load.single_workers,
        )
        self.key = installation.run_key(self.idle, self.polled, self.batch, self.single)
        for endpoint_id, count in (
            (self.polled, load.polling_workers),
            (self.batch, load.batch_workers),
            (self.single, load.single_workers),
        ):
            wait_ready(installation, endpoint_id, count)

    def ask(
        self, bench: Bench, mode: str, endpoint_id: str, *arguments: int
    ) -> tuple[dict[str, Any], float, float]:
        """What the clients saw; CPU seconds of the gateway meanwhile, and of the workers and clients."""
        pid = self.installation.pid
        workers = children_of(pid)
        before, before_workers = cpu_s([pid]), cpu_s(workers)
        seen = ask_clients(bench, mode, self.installation.port, endpoint_id, self.key, *arguments)
        used = cpu_s([pid]) - before
        return seen, used, cpu_s(workers) - before_workers + seen["cpu_s"]


def _measure(bench: Bench, queue: _Pilotlight, load: Load, samples: Samples) -> None:
    seconds, connections, window = load.seconds, load.connections, load.window
    samples.note(fsync_ms_p50=fsync_ms(bench.folder))
    seen, gateway_s, clients_s = queue.ask(bench, "submit", queue.idle, seconds, connections)
    jobs = max(1, seen["jobs"])
    samples.note(
        submit_jobs_per_s=seen["jobs_per_s"],
        submit_gateway_us=gateway_s * _MICRO / jobs,
        submit_client_us=clients_s * _MICRO / jobs,
        failed_jobs=seen["failed"],
    )
    seen, _, _ = queue.ask(bench, "paced", queue.polled, seconds, load.rate)
    samples.note(
        submit_ms_p50=quantile(seen["submit_ms"], 0.5),
        submit_ms_p99=quantile(seen["submit_ms"], 0.99),
        queue_wait_ms_p50=quantile(seen["wait_ms"], 0.5),
        queue_wait_ms_p99=quantile(seen["wait_ms"], 0.99),
    )
    for name, endpoint_id in (("end_to_end_batch16", queue.batch), ("end_to_end_single", queue.single)):
        seen, gateway_s, others_s = queue.ask(bench, "drive", endpoint_id, seconds, connections, window)
        finished = max(1, seen["finished"])
        samples.note(
            **{
                f"{name}_jobs_per_s": seen["jobs_per_s"],
                f"{name}_gateway_us": gateway_s * _MICRO / finished,
                f"{name}_others_us": others_s * _MICRO / finished,
            }
        )


def fsync_ms(folder: Path, count: int = _FSYNCS) -> float:
    """Median milliseconds of appending a page to a file in this folder and waiting for the disk."""
    took = []
    path = folder / "fsync"
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    try:
        for _ in range(count):
            os.write(file, b"\0" * 4096)
            started = time.perf_counter()
            os.fdatasync(file)
            took.append((time.perf_counter() - started) * 1000)
    finally:
        os.close(file)
        path.unlink()
    return quantile(took, 0.5)


def _print(report: Report, ours: Samples, peers: list[Peer], theirs: Mapping[str, list[float]]) -> None:
    for peer in peers:
        report.add(peer.case, SINGLE, "1/s", theirs[peer.case])
    best = max(
        (made for made in report.figures if made.metric == SINGLE), key=lambda made: made.value, default=None
    )
    for metric, unit in UNITS.items():
        values = ours.values[metric]
        value = sum(values) if unit == "count" else None
        report.add(
            PILOTLIGHT, metric, unit, values, value=value, reference=best if metric == SINGLE else None
        )
    for case, durability in ((PILOTLIGHT, DURABILITY), *((peer.case, peer.durability) for peer in peers)):
        sys.stderr.write(f"queue: {case}: accepted work is {durability}\n")
