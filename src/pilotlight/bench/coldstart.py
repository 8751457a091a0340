"""`pilotlight bench coldstart`: from a request to an endpoint without workers to its first token, by stage.

Two measurements:
1. With the real engine: our endpoint at zero, one request through the gateway with its key check; and in turn
   with it a plain vLLM server with the same flags, from its spawning to the first token of the same request,
   asked as soon as it listens. One plain start before all fills the machine's file cache; it is not counted.
2. With the stand-in engine: arrival of a request to the worker's process spawned, by the gateway's own
   records, over many arrivals. Stand-in because nothing of the engine is in this span, and a start of it
   takes half a second.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Sequence

from pilotlight.bench.engine import (
    MODEL,
    first_token,
    start_plain_engine,
    wait_first_token,
)
from pilotlight.bench.errors import BenchError
from pilotlight.bench.figures import Report, quantile
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench
from pilotlight.cli.output import note
from pilotlight.client.models import Start

PLAIN = "plain-vllm"
PILOTLIGHT = "pilotlight"

_LOG_S = 30.0
"""How long rows of the request log may take to be written."""


def run(starts: int, arrivals: int, report: Report) -> None:
    """Measure and print.

    Args:
        starts: Of each kind with the real engine.
        arrivals: With the stand-in.
        report: Takes the figures.

    Raises:
        BenchError: Something that was started failed.
        EngineEnvironmentError: No engine is installed.
    """
    with contextlib.closing(report):
        _measure_starts(starts, report)
        if arrivals:
            _measure_arrivals(arrivals, report)


def _measure_starts(count: int, report: Report) -> None:
    plain: list[float] = []
    ours: list[float] = []
    stages: dict[str, list[float]] = {}
    with Bench() as bench:
        installation = Installation(bench)
        # Without FlashBoot: the lowest rung of the ladder is what is compared with a plain start.
        endpoint_id = installation.deploy(
            model=MODEL, name="bench", min=0, max=1, idle_timeout_s=1, flashboot=False
        )
        env = installation.client.endpoint(endpoint_id)["env"]
        key = installation.run_key(endpoint_id)
        note("coldstart: a plain start that is not counted")
        _start_plain(bench, env)
        for number in range(count):
            # The order turns, so that neither kind always finds what the other one left in the caches.
            for case in (PLAIN, PILOTLIGHT)[:: -1 if number % 2 else 1]:
                note(f"coldstart: start {number + 1} of {count}: {case}")
                if case == PLAIN:
                    plain.append(_start_plain(bench, env))
                    continue
                took, spans = _start_ours(installation, endpoint_id, key)
                ours.append(took)
                for stage, seconds in spans.items():
                    stages.setdefault(stage, []).append(seconds)
    reference = report.add(PLAIN, "start_to_first_token_s", "s", plain)
    report.add(PILOTLIGHT, "start_to_first_token_s", "s", ours, reference=reference)
    for stage, spent in stages.items():
        report.add(PILOTLIGHT, f"stage_{stage}_s", "s", spent)


def _start_plain(bench: Bench, env: dict[str, str]) -> float:
    engine = start_plain_engine(bench, env)
    try:
        return wait_first_token(engine) - engine.spawned
    finally:
        bench.end(engine.child)


def _start_ours(installation: Installation, endpoint_id: str, key: str) -> tuple[float, dict[str, float]]:
    """Seconds to the first token, and seconds spent in each stage, which add up to them."""
    started, started_ms = time.monotonic(), time.time() * 1000
    answered = first_token(installation.port, f"/v2/{endpoint_id}/openai/v1/chat/completions", key)
    took = answered - started
    installation.wait_no_workers(endpoint_id)
    (start,) = installation.client.starts(endpoint_id, limit=1)
    return took, spans_of(start, started_ms=started_ms, answered_ms=started_ms + took * 1000)


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
        (stage["stage"], stage["at_ms"]) for stage in start["stages"] if stage["at_ms"] <= answered_ms
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
