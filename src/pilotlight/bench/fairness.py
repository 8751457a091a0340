"""`pilotlight bench fairness`: what one greedy key costs nine light ones at the same endpoint.

The engine's slots are few, so requests queue in the gateway. In turn, the light keys are alone, and the
greedy one keeps many requests under way beside them. A stand-in engine writes a token every so many
milliseconds in each slot, so a slot's time for one request is known; `--engine vllm` asks a real one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pilotlight.bench.engine import MODEL, ONE_THREAD, start_plain_engine, wait_first_token
from pilotlight.bench.errors import BenchError
from pilotlight.bench.figures import Figure, Report, quantile
from pilotlight.bench.harness.fair_share import Shape
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench, environment, python_module
from pilotlight.cli.output import note

ALONE = "alone"
PILOTLIGHT = "pilotlight"
ROUTE = "/v1/chat/completions"
LIGHT_KEYS = 9
_MARGIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Load:
    """How much is measured.

    Attributes:
        real: vLLM answers instead of the stand-in.
        seconds: Length of each measurement.
        rounds: How often all of it is repeated.
        slots: Requests that the engine serves at a time.
        greedy: Requests that the greedy key has under way.
        greedy_tokens: Tokens of each of its answers.
        light_tokens: Tokens of the light keys' answers.
        think_s: Mean pause of a light key between an answer and its next request.
        token_s: Time of one token of the stand-in engine.
    """

    real: bool = False
    seconds: int = 10
    rounds: int = 3
    slots: int = 4
    greedy: int = 64
    greedy_tokens: int = 100
    light_tokens: int = 20
    think_s: float = 1.0
    token_s: float = 0.005

    def shape(self, number: int, *, greedy: bool) -> Shape:
        """What is asked in one round."""
        return Shape(
            seconds=self.seconds,
            greedy=self.greedy if greedy else 0,
            greedy_tokens=self.greedy_tokens,
            light_tokens=self.light_tokens,
            think_s=self.think_s,
            token_s=0.0 if self.real else self.token_s,
            model=MODEL,
            seed=number,
        )


def run(load: Load, report: Report) -> None:
    """Measure and print.

    Raises:
        BenchError: Something that was started failed, or a request did.
        EngineEnvironmentError: The real engine is asked for and not installed.
    """
    with Bench() as bench, contextlib.closing(report):
        installation = Installation(bench)
        url = _start_engine(bench, installation, load)
        endpoint_id = installation.deploy(model=MODEL, name="bench", engine_url=url, concurrency=load.slots)
        keys = [installation.run_key(endpoint_id) for _ in range(1 + LIGHT_KEYS)]
        path = f"/v2/{endpoint_id}/openai{ROUTE}"
        seen: dict[str, list[dict[str, Any]]] = {ALONE: [], PILOTLIGHT: []}
        for number in range(load.rounds):
            for case in list(seen)[:: -1 if number % 2 else 1]:
                note(f"fairness: round {number + 1} of {load.rounds}: {case}")
                shape = load.shape(number, greedy=case == PILOTLIGHT)
                seen[case].append(_measure(bench, installation.port, path, shape, keys))
        _print(report, load, seen)


def _start_engine(bench: Bench, installation: Installation, load: Load) -> str:
    if not load.real:
        child = bench.start("engine", python_module("pilotlight.bench.harness.upstream", 0), stdout=True)
        return f"http://127.0.0.1:{int(child.read_line())}"
    # Only to learn which environment a deployment on this machine gets; it never starts a worker.
    env = installation.client.endpoint(installation.deploy(model=MODEL, name="settings", max=0))["env"]
    note("fairness: starting vLLM")
    engine = start_plain_engine(bench, env | ONE_THREAD, key="")
    wait_first_token(engine)
    return engine.url


def _measure(bench: Bench, port: int, path: str, shape: Shape, keys: list[str]) -> dict[str, Any]:
    command = python_module("pilotlight.bench.harness.fair_share", port, path, shape.as_argument())
    timeout_s = shape.seconds + _MARGIN_S
    seen: dict[str, Any] = json.loads(
        bench.run("clients", command, env=environment(KEYS=",".join(keys)), timeout_s=timeout_s)
    )
    if seen["failed"]:
        raise BenchError(f"{seen['failed']} requests failed: {'; '.join(seen['failures'])}")
    if not seen["first_ms"]:
        raise BenchError(f"no light key had an answer within {shape.seconds} s")
    return seen


def _print(report: Report, load: Load, seen: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    if load.real:
        service_ms = [quantile(one["service_ms"], 0.5) for one in seen[PILOTLIGHT]]
    else:
        service_ms = [load.greedy_tokens * load.token_s * 1000]
    service = report.add(PILOTLIGHT, "slot_service_ms", "ms", service_ms)
    # A real engine does not say when a request arrived in it.
    times = {"ttft": "first_ms"} if load.real else {"queue_wait": "wait_ms", "ttft": "first_ms"}
    for name, key in times.items():
        _print_times(report, f"{name}_ms_p50", seen, key, 0.5)
        alone, ours = _print_times(report, f"{name}_ms_p95", seen, key, 0.95)
        over = (ours.value - alone.value) / service.value
        report.add(PILOTLIGHT, f"{name}_p95_over_alone_slots", "ratio", [over])
    for case, who in ((ALONE, "light"), (PILOTLIGHT, "light"), (PILOTLIGHT, "greedy")):
        rates = [one["tokens"][who] / one["seconds"] for one in seen[case]]
        report.add(case, f"{who}_tokens_per_s", "1/s", rates)


def _print_times(
    report: Report, metric: str, seen: Mapping[str, Sequence[Mapping[str, Any]]], times: str, share: float
) -> tuple[Figure, Figure]:
    """The figures of both cases: a quantile of the light keys' times of each round."""
    samples = {case: [quantile(one[times], share) for one in rounds] for case, rounds in seen.items()}
    alone = report.add(ALONE, metric, "ms", samples[ALONE])
    return alone, report.add(PILOTLIGHT, metric, "ms", samples[PILOTLIGHT], reference=alone)
