"""`pilotlight bench routing`: which router finds the engine that has read a prompt's beginning already.

Two vLLM workers of one endpoint, with prefix caching on and a cache that holds two thirds of all beginnings.
In turn, the same kind of requests comes by our data path, under each routing policy, and by vLLM's own router
with its policies, in front of the very same engines; their prefix caches are emptied before each turn. vLLM's
own counters tell how many tokens of prompts were found in the cache.

Our engines listen on Unix sockets with a key of their own, which vLLM's router cannot use: nginx stands
before each engine for it, and the engine's address and key are read from the worker's processes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from pilotlight.bench.costs import worker_processes
from pilotlight.bench.engine import MODEL, ONE_THREAD
from pilotlight.bench.environments import peer_python
from pilotlight.bench.errors import BenchError
from pilotlight.bench.figures import Figure, Report, quantile
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench, environment, python_module
from pilotlight.bench.tools import Nginx, VllmRouter, find_tools
from pilotlight.cli.output import note
from pilotlight.cli.root import UsageError
from pilotlight.domain.endpoint import Routing
from pilotlight.engines.launching import KEY_VARIABLE

PILOTLIGHT = "pilotlight"
ROUND_ROBIN = "vllm-router-round_robin"
CACHE_AWARE = "vllm-router-cache_aware"
ROUTE = "/v1/chat/completions"
WORKERS = 2

BLOCK_TOKENS = 32
PREFIX_BLOCKS = 20
"""Whole blocks of the beginning that a group shares (`bench.harness.shared_prefix`)."""

_FOLDER_VARIABLE = "PILOTLIGHT_WORKER_RUN_DIR"
_READY_S = 600.0
_TURN_S = 600.0
_QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "What is 2 plus 3?"}]}
_COUNTER = re.compile(rb"^vllm:prefix_cache_(queries|hits)_total\{[^}]*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Load:
    """How much is measured.

    Attributes:
        rounds: How often all of it is repeated.
        groups: Beginnings.
        per_group: Requests with each.
        concurrency: Requests at a time.
        policies: Of our endpoint; the first one is the case `pilotlight`.
    """

    rounds: int = 3
    groups: int = 24
    per_group: int = 10
    concurrency: int = 8
    policies: tuple[Routing, ...] = (Routing.AUTO, Routing.PREFIX, Routing.SESSION, Routing.LEAST_LOADED)

    @property
    def cache_blocks(self) -> int:
        """Size of an engine's cache: two thirds of all beginnings, more than half of them."""
        return self.groups * PREFIX_BLOCKS * 2 // 3


@dataclass(slots=True)
class Case:
    """One router.

    Attributes:
        name: Of the case.
        port: Where it listens.
        path: Of a chat completion.
        key: API key to send.
        routing: What our endpoint is set to for it; None for other routers.
        samples: One value per round, by metric.
    """

    name: str
    port: int
    path: str = ROUTE
    key: str = "none"
    routing: Routing | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)


METRICS = {
    "prefix_cache_hit_rate": "ratio",
    "ttft_ms_p50": "ms",
    "ttft_ms_p95": "ms",
    "requests_per_s": "1/s",
    "busiest_engine_share": "ratio",
}
"""What is measured of every router, with units, in the order of the output."""


def policies_of(names: Sequence[str]) -> tuple[Routing, ...]:
    """Routing policies by name.

    Raises:
        UsageError: A name is not one of them, or there is none.
    """
    known = [policy.value for policy in Routing]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(f"unknown routing policy {(unknown or [''])[0]!r}; there are {', '.join(known)}")
    return tuple(map(Routing, names))


def run(load: Load, report: Report) -> None:
    """Measure and print.

    Raises:
        UsageError: nginx is not installed.
        BenchError: Something that was started failed, vLLM's router cannot be installed, or an answer was not
            whole.
        EngineEnvironmentError: No engine is installed.
    """
    nginx = find_tools("nginx")["nginx"]
    python = peer_python("vllm_router")
    with Bench() as bench, contextlib.closing(report):
        # The engines are started, not forked: only then are address and key in what /proc shows of them.
        installation = Installation(bench, PILOTLIGHT_LAUNCHERS__ENABLED="false")
        endpoint_id = _deploy(installation, load)
        engines = [
            Nginx(bench, nginx, f"unix:{socket}", key=key).port
            for socket, key in map(engine_address, installation.worker_ids(endpoint_id))
        ]
        for port in engines:
            _ask_engine(port, "POST", "/v1/chat/completions/render", _QUESTION)
        others = [
            Case(f"vllm-router-{policy}", VllmRouter(bench, python, engines, policy).port)
            for policy in ("round_robin", "cache_aware")
        ]
        key, path = installation.run_key(endpoint_id), f"/v2/{endpoint_id}/openai{ROUTE}"
        ours = [
            Case(f"{PILOTLIGHT}-{policy}" if number else PILOTLIGHT, installation.port, path, key, policy)
            for number, policy in enumerate(load.policies)
        ]
        cases, turn = [*others, *ours], 0
        for number in range(load.rounds):
            for case in cases[:: -1 if number % 2 else 1]:
                note(f"routing: round {number + 1} of {load.rounds}: {case.name}")
                if case.routing is not None:
                    installation.client.revise_endpoint(endpoint_id, {"routing": case.routing.value})
                turn += 1
                _measure(bench, case, engines, load, turn)
        _print(report, cases)


def _deploy(installation: Installation, load: Load) -> str:
    """The id of an endpoint with two ready workers."""
    endpoint_id = installation.deploy(
        model=MODEL,
        name="bench",
        min=WORKERS,
        max=WORKERS,
        flashboot=False,
        env={
            "ENABLE_PREFIX_CACHING": "true",
            "BLOCK_SIZE": str(BLOCK_TOKENS),
            "NUM_GPU_BLOCKS_OVERRIDE": str(load.cache_blocks),
            "MAX_MODEL_LEN": "1024",
            **ONE_THREAD,
            # The route that empties the prefix cache; callers of the gateway cannot reach it.
            "VLLM_SERVER_DEV_MODE": "1",
            # vLLM's router has every engine turn prompts into tokens, and is lost where that is forbidden.
            "VLLM_EXTRA_ARGS": "--enable-scale-out",
        },
    )
    note(f"routing: starting {WORKERS} workers")
    installation.wait(
        f"{WORKERS} workers of endpoint {endpoint_id}",
        lambda: installation.client.endpoint(endpoint_id)["workers"].get("ready") == WORKERS,
        timeout_s=_READY_S,
    )
    return endpoint_id


def engine_address(worker_id: str) -> tuple[str, str]:
    """Path of the socket on which a worker's engine listens, and its key.

    Raises:
        BenchError: No process of the worker tells.
    """
    found: dict[str, str] = {}
    for pid in worker_processes([worker_id]):
        # A process that has just ended has nothing to tell.
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                name, _, value = entry.decode(errors="replace").partition("=")
                if value and name in {_FOLDER_VARIABLE, KEY_VARIABLE}:
                    found.setdefault(name, value)
    if found.keys() != {_FOLDER_VARIABLE, KEY_VARIABLE}:
        raise BenchError(f"the engine of worker {worker_id} was not found")
    return f"{found[_FOLDER_VARIABLE]}/engine.sock", found[KEY_VARIABLE]


def _measure(bench: Bench, case: Case, engines: Sequence[int], load: Load, turn: int) -> None:
    for port in engines:
        _ask_engine(port, "POST", "/reset_prefix_cache")
    before = [_prompt_tokens(port) for port in engines]
    command = python_module(
        "pilotlight.bench.harness.shared_prefix",
        *(case.port, case.path, MODEL, load.groups, load.per_group, load.concurrency, turn),
        int(case.routing is Routing.SESSION),
    )
    out = bench.run("chats", command, env=environment(KEY=case.key), timeout_s=_TURN_S)
    seen: dict[str, Any] = json.loads(out)
    asked, found = zip(
        *(
            (now[0] - then[0], now[1] - then[1])
            for now, then in zip(map(_prompt_tokens, engines), before, strict=True)
        ),
        strict=True,
    )
    values = {
        "prefix_cache_hit_rate": sum(found) / sum(asked),
        "ttft_ms_p50": quantile(seen["first_ms"], 0.5),
        "ttft_ms_p95": quantile(seen["first_ms"], 0.95),
        "requests_per_s": len(seen["first_ms"]) / seen["seconds"],
        "busiest_engine_share": max(asked) / sum(asked),
    }
    for metric, value in values.items():
        case.samples.setdefault(metric, []).append(value)


def _prompt_tokens(port: int) -> tuple[float, float]:
    """Tokens of prompts that an engine has looked for in its prefix cache so far, and found there."""
    return parse_prefix_counters(_ask_engine(port, "GET", "/metrics"))


def parse_prefix_counters(metrics: bytes) -> tuple[float, float]:
    """Tokens looked for and found, from what vLLM shows at `/metrics`.

    Raises:
        BenchError: The counters are not there.
    """
    found = {match[1]: float(match[2]) for match in _COUNTER.finditer(metrics)}
    if found.keys() != {b"queries", b"hits"}:
        raise BenchError("vLLM's metrics hold no prefix_cache_queries_total and prefix_cache_hits_total")
    return found[b"queries"], found[b"hits"]


def _ask_engine(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
    url = f"http://127.0.0.1:{port}{path}"
    answer = httpx.request(method, url, json=body, trust_env=False, timeout=30)
    if answer.status_code != 200:
        raise BenchError(f"an engine answered {answer.status_code} to {method} {path}: {answer.text[:300]}")
    return answer.content


def _print(report: Report, cases: Sequence[Case]) -> None:
    for metric, unit in METRICS.items():
        by_case: dict[str, Figure] = {}
        for case in cases:
            reference = by_case.get(ROUND_ROBIN)
            by_case[case.name] = report.add(
                case.name, metric, unit, case.samples[metric], reference=reference
            )
        if metric in {"prefix_cache_hit_rate", "ttft_ms_p50"}:
            ours, theirs = by_case[PILOTLIGHT], by_case[CACHE_AWARE]
            value = ours.value / theirs.value if theirs.value else 0.0
            report.add(PILOTLIGHT, f"{metric}_by_cache_aware", "ratio", [value])
