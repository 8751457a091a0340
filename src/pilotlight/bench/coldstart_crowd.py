"""Many endpoints at once: what frozen ones hold, and how launchable ones take a burst.

Parts of `pilotlight bench coldstart`; `coldstart.run` calls them.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pilotlight.bench.costs import Cost, cost_of, session_of, worker_processes
from pilotlight.bench.engine import MODEL, first_token, start_plain_engine, wait_first_token
from pilotlight.bench.figures import Figure, Report
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench
from pilotlight.cli.output import note
from pilotlight.domain.worker import Rung

PLAIN = "plain-vllm"

BURST_ENDPOINTS = 5
BURST_REQUESTS = 10


@dataclass(frozen=True, slots=True)
class _Target:
    """An endpoint and a key for it."""

    endpoint_id: str
    key: str


def measure_crowd(count: int, report: Report) -> None:
    """Memory of so many frozen endpoints of one launcher, against as many plain servers, all there at once.

    Figures are proportional set sizes. The KV cache, which both have, is printed beside them.
    """
    with Bench() as bench:
        installation = Installation(bench, PILOTLIGHT_WORKERS__FROZEN_MEMORY_BYTES=str(1 << 40))
        targets = [_deploy(installation, f"frozen-{number}", flashboot=True) for number in range(count)]
        env = installation.client.endpoint(targets[0].endpoint_id)["env"]
        for number, target in enumerate(targets):
            note(f"coldstart: frozen endpoint {number + 1} of {count}")
            _ask(installation, target)
            installation.wait_frozen(target.endpoint_id)
        workers = [worker for target in targets for worker in installation.worker_ids(target.endpoint_id)]
        launchers = installation.launcher_pids()
        frozen = cost_of([*worker_processes(workers), *launchers])
        launcher = cost_of(launchers)
    cache_mb = count * int(env.get("KV_CACHE_MEMORY_BYTES", "0")) / 1e6
    plain = _plain_crowd(count, env)
    reference = report.add(PLAIN, f"memory_of_{count}_mb", "MB", [plain.memory_mb])
    report.add("frozen", f"memory_of_{count}_mb", "MB", [frozen.memory_mb], reference=reference)
    report.add("frozen", f"kv_cache_of_{count}_mb", "MB", [cache_mb])
    report.add("launcher", f"memory_beside_{count}_mb", "MB", [launcher.memory_mb])


def _plain_crowd(count: int, env: dict[str, str]) -> Cost:
    with Bench() as bench:
        engines = []
        for number in range(count):
            note(f"coldstart: plain server {number + 1} of {count}")
            engine = start_plain_engine(bench, env)
            wait_first_token(engine)
            engines.append(engine)
        return cost_of([pid for engine in engines for pid in session_of(engine.child.pid)])


def measure_burst(rounds: int, report: Report, *, reference: Figure) -> None:
    """Ten requests at once to five launchable endpoints: when the last of them has its first token.

    Compared with what the processors allow: five times the CPU seconds of one launch, on all processors.
    """
    last: list[float] = []
    share: list[float] = []
    single: list[float] = []
    with Bench() as bench:
        installation = Installation(bench)
        targets = [
            _deploy(installation, f"burst-{number}", flashboot=False) for number in range(BURST_ENDPOINTS)
        ]
        installation.wait_launcher()
        _launch_alone(installation, targets[0])
        for number in range(rounds):
            note(f"coldstart: burst {number + 1} of {rounds}")
            cpu_s = _launch_alone(installation, targets[0])
            started = time.monotonic()
            with ThreadPoolExecutor(BURST_REQUESTS) as pool:
                asked = [
                    pool.submit(_ask, installation, targets[place % BURST_ENDPOINTS])
                    for place in range(BURST_REQUESTS)
                ]
                moments = [one.result() - started for one in asked]
            for target in targets:
                installation.wait_no_workers(target.endpoint_id)
            single.append(cpu_s)
            last.append(max(moments))
            share.append(max(moments) / (BURST_ENDPOINTS * cpu_s / len(os.sched_getaffinity(0))))
    report.add("burst", "last_first_token_s", "s", last, reference=reference)
    report.add("burst", "cpu_s_of_one_launch", "s", single)
    report.add("burst", "last_by_cpu_bound", "ratio", share)


def _launch_alone(installation: Installation, target: _Target) -> float:
    """CPU seconds of one launch until its first token, of all that take part, with nothing else going on."""
    standing = [installation.pid, *installation.launcher_pids()]
    before_s = cost_of(standing).cpu_s
    earlier = installation.client.starts(target.endpoint_id, limit=1)
    _ask(installation, target)
    worker = worker_processes(installation.worker_ids(target.endpoint_id))
    cpu_s = cost_of([*standing, *worker]).cpu_s - before_s
    start = installation.start_after(target.endpoint_id, earlier)
    assert start["rung"] == Rung.LAUNCHABLE, start
    installation.wait_no_workers(target.endpoint_id)
    return cpu_s


def _deploy(installation: Installation, name: str, *, flashboot: bool) -> _Target:
    endpoint_id = installation.deploy(
        model=MODEL, name=name, min=0, max=1, idle_timeout_s=1, flashboot=flashboot
    )
    return _Target(endpoint_id, installation.run_key(endpoint_id))


def _ask(installation: Installation, target: _Target) -> float:
    return first_token(installation.port, f"/v2/{target.endpoint_id}/openai/v1/chat/completions", target.key)
