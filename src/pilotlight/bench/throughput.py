"""`pilotlight bench throughput`: tokens per second through Pilotlight against the same vLLM without it.

One engine; runs in pairs, directly and through the gateway, the order turning with each pair, so that a slow
minute of the machine hits both of a pair. The ratio is taken pair by pair; its geometric mean has a lower
bound from Student's t over the pairs, because pairs are independent of each other and streams inside one run
are not. The engine computes on one processor, which it has to itself; its API server, the gateway and the
clients share the others. What the gateway uses of those per event is measured beside.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pilotlight.bench.engine import MODEL, ONE_THREAD, PlainEngine, start_plain_engine, wait_first_token
from pilotlight.bench.figures import Report, lower_bound_95
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench, cpu_s, environment, python_module, settled_cpu_s
from pilotlight.bench.processors import move_children, one_set_aside
from pilotlight.cli.output import note

DIRECT = "vllm-direct"
PILOTLIGHT = "pilotlight"
ROUTE = "/v1/chat/completions"
RUN_S = 600.0
"""Longest single run."""
_QUIET_S = 1.25
"""Without work for so long, the gateway has written its request log too."""


def run(pairs: int, streams: int, tokens: int, report: Report) -> None:
    """Measure and print.

    Raises:
        BenchError: Something that was started failed, or a stream was not whole.
        EngineEnvironmentError: No engine is installed.
    """
    with Bench() as bench, contextlib.closing(report), one_set_aside() as processor:
        installation = Installation(bench)
        # Only to learn which environment a deployment on this machine gets; it never starts a worker.
        env = installation.client.endpoint(installation.deploy(model=MODEL, name="settings", max=0))["env"]
        note("throughput: starting vLLM")
        # An engine behind `engine_url` is reached without a key.
        engine = start_plain_engine(bench, env | ONE_THREAD | {"MAX_MODEL_LEN": "2048"}, key="")
        wait_first_token(engine)
        move_children(engine.child.pid, processor)
        measure_pairs(bench, installation, engine, pairs, streams, tokens, report)


def measure_pairs(
    bench: Bench,
    installation: Installation,
    engine: PlainEngine,
    pairs: int,
    streams: int,
    tokens: int,
    report: Report,
) -> None:
    """Measure this engine, directly and through this installation, and print.

    Args:
        bench: Where the clients run.
        installation: Gets an endpoint for the engine.
        engine: Answers already; asks for no key.
        pairs: Runs of each kind, and one more of each that is not counted.
        streams: At the same time.
        tokens: Per stream.
        report: Takes the figures.

    Raises:
        BenchError: The engine or the gateway has ended, or a stream was not whole.
    """
    endpoint_id = installation.deploy(
        model=MODEL, name="bench", engine_url=engine.url, concurrency=max(streams, 30)
    )
    key = installation.run_key(endpoint_id)
    roads = {
        DIRECT: (engine.port, ROUTE, ""),
        PILOTLIGHT: (installation.port, f"/v2/{endpoint_id}/openai{ROUTE}", key),
    }
    seen: dict[str, list[dict[str, Any]]] = {case: [] for case in roads}
    for number in range(-1, pairs):
        for case in list(roads)[:: -1 if number % 2 else 1]:
            before = cpu_s([installation.pid])
            result = _measure(bench, engine, roads[case], streams, tokens)
            if case == PILOTLIGHT:
                used = settled_cpu_s([installation.pid], quiet_s=_QUIET_S) - before
                result["gateway_us"] = used * 1e6 / result["events"]
            told = "not counted" if number < 0 else f"pair {number + 1} of {pairs}"
            note(f"throughput: {told}: {case}: {result['tokens_per_s']:.0f} tokens/s")
            if number >= 0:
                seen[case].append(result)
    report_pairs(report, seen, reference=DIRECT)
    per_event = [result["gateway_us"] for result in seen[PILOTLIGHT]]
    report.add(PILOTLIGHT, "gateway_cpu_us_per_event", "us", per_event)


def _measure(
    bench: Bench, engine: PlainEngine, road: tuple[int, str, str], streams: int, tokens: int
) -> dict[str, Any]:
    port, path, key = road
    if not engine.child.running:
        raise engine.child.error("has ended")
    module = "pilotlight.bench.harness.tokens"
    out = bench.run(
        "streams",
        python_module(module, port, path, MODEL, streams, tokens),
        env=environment(KEY=key),
        timeout_s=RUN_S,
    )
    result: dict[str, Any] = json.loads(out)
    return result


def report_pairs(
    report: Report, seen: Mapping[str, Sequence[Mapping[str, Any]]], *, reference: str, prefix: str = ""
) -> None:
    """Print what runs in pairs gave: rates, first tokens, and the ratio with its lower bound.

    Args:
        report: Takes the figures.
        seen: Results of the programs of `bench.harness`, in order, by case: the reference and ours.
        reference: The case to compare with.
        prefix: Of the figures' names.
    """
    for metric, unit in (("tokens_per_s", "1/s"), ("first_ms_p50", "ms")):
        theirs = report.add(
            reference, f"{prefix}{metric}", unit, [result[metric] for result in seen[reference]]
        )
        ours = [result[metric] for result in seen[PILOTLIGHT]]
        report.add(PILOTLIGHT, f"{prefix}{metric}", unit, ours, reference=theirs)
    ratios = [
        mine["tokens_per_s"] / other["tokens_per_s"]
        for mine, other in zip(seen[PILOTLIGHT], seen[reference], strict=True)
    ]
    mean, lower = mean_ratio(ratios)
    report.add(PILOTLIGHT, f"{prefix}ratio", "ratio", ratios, value=mean)
    report.add(PILOTLIGHT, f"{prefix}ratio_lower_95", "ratio", ratios, value=lower)


def mean_ratio(ratios: Sequence[float]) -> tuple[float, float]:
    """The geometric mean of ratios and the lower end of its 95 % confidence interval.

    In logarithms, because an arithmetic mean of noisy ratios flatters: of 1/2 and 2 it is 1.25, not 1.
    """
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(fmean(logarithms)), math.exp(lower_bound_95(logarithms))
