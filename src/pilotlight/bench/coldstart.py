"""`pilotlight bench coldstart`: from a request to its first token, from every rung of the warm ladder.

One run, interleaved, the same model and flags everywhere:

* `plain-vllm`: a plain vLLM server, from its spawning to the first token of a request that is sent as soon as
  it listens. It is what the others are compared with. One such start before all fills the machine's file
  cache and is not counted.
* `cold`: our endpoint at zero, in an installation without launchers: one import, then forks.
* `launchable`: our endpoint at zero, in an installation with a launcher.
* `frozen`: our endpoint with its worker stopped in place, after pauses of different lengths.

Ours go through the gateway with its key check. A start counts only if the record of it says that it came from
the rung that is measured. `coldstart_crowd` adds what many endpoints hold and how a burst fares.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pilotlight.bench.coldstart_crowd import measure_burst, measure_crowd
from pilotlight.bench.costs import Cost, cost_of, session_of, worker_processes
from pilotlight.bench.engine import (
    MODEL,
    first_token,
    start_plain_engine,
    wait_first_token,
)
from pilotlight.bench.errors import BenchError
from pilotlight.bench.figures import Figure, Report, quantile
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench
from pilotlight.cli.output import note
from pilotlight.client.models import Start
from pilotlight.domain.worker import Rung

PLAIN = "plain-vllm"
PILOTLIGHT = "pilotlight"

METRIC = "request_to_first_token_s"

_LOG_S = 30.0
"""How long rows of the request log may take to be written."""

_PAUSE_S = 1.0
_LONGER_PAUSE_S = 6.0
"""Every tenth time; vLLM's own server would close idle connections after 5 s."""
_LONGEST_PAUSE_S = 100.0
"""Once, when a run has this many thaws: longer than any timer that a minute would fire."""
_LONGEST_FROM = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        starts: Of a plain server, and cold ones.
        launches: Launchable ones.
        thaws: Frozen ones.
        arrivals: Arrivals with the stand-in engine.
        crowd: Endpoints that are held frozen at once, and plain servers to compare them with.
        bursts: How often a burst is sent.
    """

    starts: int = 10
    launches: int = 30
    thaws: int = 100
    arrivals: int = 20
    crowd: int = 10
    bursts: int = 3


@dataclass(slots=True)
class _Samples:
    """What was measured of one rung."""

    seconds: list[float] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Ours:
    """One endpoint of one installation, to be woken from one rung."""

    rung: Rung
    installation: Installation
    endpoint_id: str
    key: str


def run(plan: Plan, report: Report) -> None:
    """Measure and print.

    Args:
        plan: How much.
        report: Takes the figures.

    Raises:
        BenchError: Something that was started failed, or came up from another rung.
        EngineEnvironmentError: No engine is installed.
    """
    with contextlib.closing(report):
        reference = _measure_rungs(plan, report)
        if plan.crowd:
            measure_crowd(plan.crowd, report)
        if plan.bursts:
            measure_burst(plan.bursts, report, reference=reference)
        if plan.arrivals:
            _measure_arrivals(plan.arrivals, report)


def _measure_rungs(plan: Plan, report: Report) -> Figure:
    samples: dict[str, _Samples] = {name: _Samples() for name in (PLAIN, *map(str, _RUNGS))}
    with Bench() as bench:
        without = Installation(bench, "without-launcher", PILOTLIGHT_LAUNCHERS__ENABLED="false")
        installation = Installation(bench)
        ours = {
            Rung.COLD: _endpoint(without, Rung.COLD),
            Rung.LAUNCHABLE: _endpoint(installation, Rung.LAUNCHABLE),
            Rung.FROZEN: _endpoint(installation, Rung.FROZEN),
        }
        env = installation.client.endpoint(ours[Rung.LAUNCHABLE].endpoint_id)["env"]
        note("coldstart: a plain start that is not counted")
        _start_plain(bench, env, _Samples())
        installation.wait_launcher()
        (launcher,) = installation.launcher_pids()
        # Brings the first frozen worker, and the first fork after the launcher's imports.
        _ask(ours[Rung.FROZEN])
        thaws = 0
        for number, case in enumerate(interleaved(plan)):
            note(f"coldstart: {number + 1}: {case}")
            # An engine that has just answered spins for a second in wait of more (vLLM's shared memory ring):
            # it would take a processor from whatever is measured next.
            installation.wait_frozen(ours[Rung.FROZEN].endpoint_id)
            if case == PLAIN:
                _start_plain(bench, env, samples[case])
                continue
            if case == Rung.FROZEN:
                thaws += 1
                time.sleep(pause_s(thaws, plan.thaws))
            _start_ours(ours[Rung(case)], samples[case])
        launcher_cost = cost_of([launcher])
    return _report_rungs(samples, launcher_cost, report)


_RUNGS = (Rung.COLD, Rung.LAUNCHABLE, Rung.FROZEN)


def interleaved(plan: Plan) -> Iterator[str]:
    """The order of the measurements: every kind spread evenly over the run, so that none has all the calm."""
    counts = {
        PLAIN: plan.starts,
        str(Rung.COLD): plan.starts,
        str(Rung.LAUNCHABLE): plan.launches,
        str(Rung.FROZEN): plan.thaws,
    }
    moments = [
        ((number + 0.5) / count, place, case)
        for place, (case, count) in enumerate(counts.items())
        for number in range(count)
    ]
    return (case for _, _, case in sorted(moments))


def pause_s(number: int, count: int) -> float:
    """How long the worker stays frozen before the thaw of this number, of so many."""
    if number == count and count >= _LONGEST_FROM:
        return _LONGEST_PAUSE_S
    return _LONGER_PAUSE_S if number % 10 == 0 else _PAUSE_S


def _endpoint(installation: Installation, rung: Rung) -> _Ours:
    endpoint_id = installation.deploy(
        model=MODEL, name=str(rung), min=0, max=1, idle_timeout_s=1, flashboot=rung is Rung.FROZEN
    )
    return _Ours(rung, installation, endpoint_id, installation.run_key(endpoint_id))


def _start_plain(bench: Bench, env: dict[str, str], samples: _Samples) -> None:
    engine = start_plain_engine(bench, env)
    try:
        samples.seconds.append(wait_first_token(engine) - engine.spawned)
        samples.costs.append(cost_of(session_of(engine.child.pid)))
    finally:
        bench.end(engine.child)


def _ask(ours: _Ours) -> float:
    return first_token(ours.installation.port, f"/v2/{ours.endpoint_id}/openai/v1/chat/completions", ours.key)


def _start_ours(ours: _Ours, samples: _Samples) -> None:
    client = ours.installation.client
    before = ours.installation.worker_ids(ours.endpoint_id)
    used = cost_of(worker_processes(before)).cpu_s if before else 0.0
    earlier = client.starts(ours.endpoint_id, limit=1)
    started, started_ms = time.monotonic(), time.time() * 1000
    answered = _ask(ours)
    took = answered - started
    workers = ours.installation.worker_ids(ours.endpoint_id)
    cost = cost_of(worker_processes(workers))
    samples.costs.append(Cost(cost.memory_mb, cost.cpu_s - used))
    start = ours.installation.start_after(ours.endpoint_id, earlier)
    if start["rung"] != ours.rung:
        raise BenchError(f"worker {start['worker_id']} came up from {start['rung']}, not {ours.rung}")
    samples.seconds.append(took)
    for stage, spent in spans_of(start, started_ms=started_ms, answered_ms=started_ms + took * 1000).items():
        samples.stages.setdefault(stage, []).append(spent)
    if ours.rung is not Rung.FROZEN:
        ours.installation.wait_no_workers(ours.endpoint_id)


def _report_rungs(samples: dict[str, _Samples], launcher: Cost, report: Report) -> Figure:
    plain = samples[PLAIN]
    reference = report.add(PLAIN, METRIC, "s", plain.seconds)
    memory = report.add(PLAIN, "memory_mb", "MB", [cost.memory_mb for cost in plain.costs])
    cpu = report.add(PLAIN, "cpu_s", "s", [cost.cpu_s for cost in plain.costs])
    for rung in _RUNGS:
        measured = samples[rung]
        if not measured.seconds:
            continue
        report.add(rung, METRIC, "s", measured.seconds, reference=reference)
        speedups = [reference.value / seconds for seconds in measured.seconds]
        report.add(rung, "times_faster", "ratio", speedups)
        p95 = quantile(measured.seconds, 0.95)
        report.add(rung, f"{METRIC}_p95", "s", measured.seconds, value=p95)
        report.add(rung, "memory_mb", "MB", [cost.memory_mb for cost in measured.costs], reference=memory)
        report.add(rung, "cpu_s", "s", [cost.cpu_s for cost in measured.costs], reference=cpu)
        for stage, spent in measured.stages.items():
            report.add(rung, f"stage_{stage}_s", "s", spent)
    report.add("launcher", "memory_mb", "MB", [launcher.memory_mb], reference=memory)
    report.add("launcher", "cpu_s", "s", [launcher.cpu_s], reference=cpu)
    return reference


def spans_of(start: Start, *, started_ms: float, answered_ms: float) -> dict[str, float]:
    """Seconds in each stage of a start: `arrival` until the decision, then each stage until the next one.

    Args:
        start: As the management API shows it; its first stage is the decision.
        started_ms: Moment the request was sent, in milliseconds since the epoch.
        answered_ms: Moment of the first token; ends the last stage before it.

    Raises:
        BenchError: The start did not become ready.
    """
    if start["outcome"] not in {"ready", "stopped"}:
        raise BenchError(f"worker {start['worker_id']} did not become ready: {start['outcome']}")
    reached = [("arrival", started_ms)]
    reached += [
        (stage["stage"], stage["at_ms"])
        for stage in start["stages"]
        if stage["at_ms"] <= answered_ms and stage["stage"] != "first_token"
    ]
    reached.append(("first_token", answered_ms))
    return {name: (until - since) / 1000 for (name, since), (_, until) in itertools.pairwise(reached)}


def _measure_arrivals(count: int, report: Report) -> None:
    command = json.dumps([sys.executable, "-m", "pilotlight.testing.fake_engine"])
    with Bench() as bench:
        installation = Installation(bench, PILOTLIGHT_ENGINE__COMMAND=command)
        endpoint_id = installation.deploy(
            model=MODEL, name="bench", min=0, max=1, idle_timeout_s=1, flashboot=False
        )
        key = installation.run_key(endpoint_id)
        for number in range(count):
            if number % 5 == 0:
                note(f"coldstart: arrival {number + 1} of {count}")
            first_token(installation.port, f"/v2/{endpoint_id}/openai/v1/chat/completions", key)
            installation.wait_no_workers(endpoint_id)
        installation.wait(
            f"{count} rows of the request log",
            lambda: len(installation.requests(endpoint_id)) >= count,
            timeout_s=_LOG_S,
        )
        arrived = [row["arrival_ms"] for row in installation.requests(endpoint_id)]
        starts = installation.client.starts(endpoint_id, limit=1000)
    spans = arrival_to_spawn_ms(arrived, starts)
    report.add(PILOTLIGHT, "arrival_to_spawn_ms_p50", "ms", spans)
    report.add(PILOTLIGHT, "arrival_to_spawn_ms_p95", "ms", spans, value=quantile(spans, 0.95))


def arrival_to_spawn_ms(arrived_ms: Sequence[int], starts: Sequence[Start]) -> list[float]:
    """Milliseconds from each arrival to the process that it caused; both are whole milliseconds of one clock.

    Args:
        arrived_ms: Moments of arrival, one per start, in order.
        starts: The starts in any order.

    Raises:
        BenchError: There is not one start per arrival, so they cannot be matched.
    """
    spawned = sorted(
        stage["at_ms"] for start in starts for stage in start["stages"] if stage["stage"] == "spawned"
    )
    if len(spawned) != len(arrived_ms):
        raise BenchError(f"{len(arrived_ms)} arrivals caused {len(spawned)} starts; expected one each")
    return [float(after - before) for before, after in zip(arrived_ms, spawned, strict=True)]
