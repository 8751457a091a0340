"""The proxies that `pilotlight bench gateway` compares, each in front of the same engine that needs no time.

`start_proxies` starts those that are asked for. What is missing on this machine is left out, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pilotlight.bench.environments import peer_python
from pilotlight.bench.errors import BenchError
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench
from pilotlight.bench.tools import LiteLlm, Nginx, VllmRouter, find_tools
from pilotlight.cli.output import note
from pilotlight.cli.root import UsageError

PILOTLIGHT = "pilotlight"
NGINX = "nginx"
VLLM_ROUTER = "vllm-router"
LITELLM = "litellm"
PEERS = (NGINX, VLLM_ROUTER, LITELLM)
"""What can be compared with; the first one that is there is the reference of the others."""

ROUTE = "/v1/chat/completions"
MODEL = "m"
CONCURRENCY = 1000
"""Slots of an endpoint: as many as one may have. More streams than that take several endpoints."""

ENDPOINTS = 3


@dataclass(slots=True)
class Proxy:
    """One case: where the load goes.

    Attributes:
        name: Of the case.
        pids: Processes whose CPU time and memory count.
        port: Where it listens.
        path: Of a chat completion.
        paths: Several such paths for more streams than one of them takes.
        key: API key to send.
        slow: Whether it gets a lighter load, and only the loads that it can carry.
        samples: One value per round, by metric.
    """

    name: str
    pids: list[int]
    port: int
    path: str = ROUTE
    paths: tuple[str, ...] = (ROUTE,)
    key: str = "none"
    slow: bool = False
    samples: dict[str, list[float]] = field(default_factory=dict)

    def note(self, **values: float) -> None:
        """Add one round's values."""
        for metric, value in values.items():
            self.samples.setdefault(metric, []).append(value)


def start_proxies(bench: Bench, engine_port: int, names: Sequence[str]) -> list[Proxy]:
    """The peers of these names that run on this machine, in the order of `PEERS`.

    Raises:
        UsageError: A name is not among `PEERS`, or nginx is asked for and not installed.
        BenchError: nginx did not start.
    """
    unknown = sorted(set(names) - set(PEERS))
    if unknown:
        raise UsageError(f"unknown peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    proxies = []
    if NGINX in names:
        nginx = Nginx(bench, find_tools("nginx")["nginx"], f"127.0.0.1:{engine_port}")
        proxies.append(Proxy(NGINX, nginx.pids, nginx.port))
    for name, make in _MAKERS.items():
        if name in names:
            try:
                proxies.append(make(bench, peer_python(name.replace("-", "_")), engine_port))
            except BenchError as error:
                note(f"gateway: {error}; left out: {name}")
    return proxies


def our_proxy(installation: Installation, engine_port: int) -> Proxy:
    """Our gateway, with endpoints in front of the engine."""
    url = f"http://127.0.0.1:{engine_port}"
    endpoints = [
        installation.deploy(model=MODEL, name=f"bench-{number}", engine_url=url, concurrency=CONCURRENCY)
        for number in range(ENDPOINTS)
    ]
    paths = tuple(f"/v2/{endpoint_id}/openai{ROUTE}" for endpoint_id in endpoints)
    key = installation.run_key(*endpoints)
    return Proxy(PILOTLIGHT, [installation.pid], installation.port, paths[0], paths, key)


def _vllm_router(bench: Bench, python: Path, engine_port: int) -> Proxy:
    # With one engine there is nothing to choose; this is the policy that costs it least.
    router = VllmRouter(bench, python, [engine_port], "round_robin")
    return Proxy(VLLM_ROUTER, router.pids, router.port)


def _litellm(bench: Bench, python: Path, engine_port: int) -> Proxy:
    litellm = LiteLlm(bench, python, engine_port, MODEL)
    return Proxy(LITELLM, litellm.pids, litellm.port, key=litellm.key, slow=True)


_MAKERS: dict[str, Callable[[Bench, Path, int], Proxy]] = {VLLM_ROUTER: _vllm_router, LITELLM: _litellm}
