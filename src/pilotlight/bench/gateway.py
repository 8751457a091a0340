"""`pilotlight bench gateway`: what the gateway costs per request and per event, beside nginx.

An engine that answers at once stands behind both; wrk and our own load generators stand before them. All
cases of a round follow each other, and the order turns with the round, so that what else the machine does
hits all of them. CPU time is that of the proxy's own processes, read after the work that it puts off (the
request log) is done.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from pilotlight.bench.errors import BenchError
from pilotlight.bench.figures import Figure, Report, quantile
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import (
    Bench,
    cpu_s,
    environment,
    python_module,
    rss_mb,
    settled_cpu_s,
)
from pilotlight.bench.tools import HARNESS, Nginx, find_tools
from pilotlight.cli.output import note

PILOTLIGHT = "pilotlight"
NGINX = "nginx"
DIRECT = "direct"
ROUTE = "/v1/chat/completions"
CONCURRENCY = 1000
"""Slots of the endpoints; more than any load here needs, so that nothing waits."""

_MICRO = 1e6


@dataclass(frozen=True, slots=True)
class Load:
    """How much is measured.

    Attributes:
        seconds: Of wrk, and of a paced stream.
        rounds: How often everything is repeated.
        connections: Of wrk.
        burst_streams: At the same time, each repeated `burst_repeats` times.
        burst_repeats: Streams one after the other on each connection.
        burst_events: Per stream.
        paced_streams: At the same time.
        paced_pause_s: Between two events of a paced stream.
        first_tokens: Requests per road and round, one at a time.
        warm_up_s: Of wrk, not counted.
        settle_s: Quiet time after which work that was put off counts as done; rows of the request log are
            written once a second.
    """

    seconds: int = 5
    rounds: int = 3
    connections: int = 32
    burst_streams: int = 64
    burst_repeats: int = 5
    burst_events: int = 200
    paced_streams: int = 300
    paced_pause_s: float = 0.05
    first_tokens: int = 1000
    warm_up_s: int = 1
    settle_s: float = 1.25

    @property
    def paced_events(self) -> int:
        """Events per paced stream."""
        return max(1, round(self.seconds / self.paced_pause_s))


@dataclass(slots=True)
class Proxy:
    """One case: where the load goes.

    Attributes:
        name: Of the case.
        pids: Processes whose CPU time counts.
        key: API key to send.
        roads: Port and path by kind of engine behind it: `burst`, `paced`, `short`.
        samples: One value per round, by metric.
    """

    name: str
    pids: list[int]
    key: str = "none"
    roads: dict[str, tuple[int, str]] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def note(self, **values: float) -> None:
        """Add one round's values."""
        for metric, value in values.items():
            self.samples.setdefault(metric, []).append(value)


METRICS = {
    "cpu_us_per_request": "us",
    "requests_per_s": "1/s",
    "latency_ms_p50": "ms",
    "latency_ms_p99": "ms",
    "failed_requests": "count",
    "cpu_us_per_event_burst": "us",
    "events_per_s_burst": "1/s",
    "cpu_us_per_event_paced": "us",
    "event_late_ms_p99": "ms",
    "failed_events": "count",
}
"""What is measured of every proxy, with units, in the order of the output."""

TTFT_METRICS = ("ttft_added_ms_p50", "ttft_added_ms_p99", "ttft_added_ms_paired_p50")


def run(load: Load, report: Report) -> None:
    """Measure and print.

    Raises:
        UsageError: nginx or wrk is not installed.
        BenchError: Something that was started failed.
    """
    tools = find_tools("nginx", "wrk")
    with Bench() as bench, contextlib.closing(report):
        engines = {
            "burst": _start_engine(bench, load.burst_events, 0.0),
            "paced": _start_engine(bench, load.paced_events, load.paced_pause_s),
            "short": _start_engine(bench, 8, 0.0),
        }
        installation = Installation(bench)
        proxies = [
            _nginx(bench, tools["nginx"], engines),
            _pilotlight(installation, engines),
        ]
        direct = Proxy(DIRECT, [], roads={kind: (port, ROUTE) for kind, port in engines.items()})
        idle_mb = rss_mb(installation.pid)
        for number in range(load.rounds):
            turned = number % 2
            for proxy in reversed(proxies) if turned else proxies:
                note(f"gateway: round {number + 1} of {load.rounds}: {proxy.name}")
                _measure_requests(bench, tools["wrk"], proxy, load)
                _measure_streams(bench, proxy, "burst", load)
                _measure_streams(bench, proxy, "paced", load)
            note(f"gateway: round {number + 1} of {load.rounds}: time to first token")
            _measure_first_tokens(bench, direct, proxies, load)
        _print(report, proxies, direct)
        report.add(PILOTLIGHT, "rss_mb_idle", "MB", [idle_mb])
        report.add(PILOTLIGHT, "rss_mb_after", "MB", [rss_mb(installation.pid)])


def _start_engine(bench: Bench, events: int, pause_s: float) -> int:
    module = "pilotlight.bench.harness.upstream"
    child = bench.start("engine", python_module(module, 0, events, pause_s), stdout=True)
    return int(child.read_line())


def _nginx(bench: Bench, program: str, engines: dict[str, int]) -> Proxy:
    fronts = {kind: Nginx(bench, program, port) for kind, port in engines.items()}
    return Proxy(
        NGINX,
        [pid for front in fronts.values() for pid in front.pids],
        roads={kind: (front.port, ROUTE) for kind, front in fronts.items()},
    )


def _pilotlight(installation: Installation, engines: dict[str, int]) -> Proxy:
    endpoints = {
        kind: installation.deploy(
            model="m", name=f"bench-{kind}", engine_url=f"http://127.0.0.1:{port}", concurrency=CONCURRENCY
        )
        for kind, port in engines.items()
    }
    return Proxy(
        PILOTLIGHT,
        [installation.pid],
        key=installation.run_key(*endpoints.values()),
        roads={
            kind: (installation.port, f"/v2/{endpoint_id}/openai{ROUTE}")
            for kind, endpoint_id in endpoints.items()
        },
    )


def _measure_requests(bench: Bench, wrk: str, proxy: Proxy, load: Load) -> None:
    port, path = proxy.roads["burst"]

    def command(seconds: int) -> list[str]:
        script = str(HARNESS / "unary.lua")
        url = f"http://127.0.0.1:{port}{path}"
        return [
            *(wrk, "-t1", f"-c{load.connections}", f"-d{seconds}s", "--latency", "-s", script, url),
        ]

    env = environment(KEY=proxy.key)
    bench.run("wrk", command(load.warm_up_s), env=env, timeout_s=load.warm_up_s + 30)
    before = settled_cpu_s(proxy.pids, quiet_s=load.settle_s)
    out = bench.run("wrk", command(load.seconds), env=env, timeout_s=load.seconds + 30)
    used = settled_cpu_s(proxy.pids, quiet_s=load.settle_s) - before
    seen = parse_wrk(out.decode())
    proxy.note(
        cpu_us_per_request=used * _MICRO / max(1, seen.requests),
        requests_per_s=seen.requests_per_s,
        latency_ms_p50=seen.latency_ms_p50,
        latency_ms_p99=seen.latency_ms_p99,
        failed_requests=seen.failed,
    )


def _measure_streams(bench: Bench, proxy: Proxy, kind: str, load: Load) -> None:
    paced = kind == "paced"
    streams = load.paced_streams if paced else load.burst_streams
    repeats = 1 if paced else load.burst_repeats
    events = load.paced_events if paced else load.burst_events
    port, path = proxy.roads[kind]
    module = "pilotlight.bench.harness.streams"
    before = cpu_s(proxy.pids)
    out = bench.run(
        f"{kind} streams",
        python_module(module, port, streams, repeats, events, path),
        env=environment(KEY=proxy.key),
        timeout_s=60 + 10 * load.seconds,
    )
    used = settled_cpu_s(proxy.pids, quiet_s=load.settle_s) - before
    seen: dict[str, Any] = json.loads(out)
    if seen["failures"]:
        note(f"gateway: {proxy.name}, {kind} streams: {'; '.join(seen['failures'])}")
    per_event = used * _MICRO / max(1, seen["events"])
    if paced:
        proxy.note(cpu_us_per_event_paced=per_event, event_late_ms_p99=seen["late_ms_p99"])
        proxy.samples["failed_events"][-1] += seen["failed"]
    else:
        proxy.note(
            cpu_us_per_event_burst=per_event,
            events_per_s_burst=seen["events"] / seen["seconds"],
            failed_events=seen["failed"],
        )


def _measure_first_tokens(bench: Bench, direct: Proxy, proxies: Sequence[Proxy], load: Load) -> None:
    roads = [direct, *proxies]
    key = next(proxy.key for proxy in proxies if proxy.name == PILOTLIGHT)
    out = bench.run(
        "first token",
        python_module(
            "pilotlight.bench.harness.first_token",
            load.first_tokens,
            *("{}={}:{}".format(road.name, *road.roads["short"]) for road in roads),
        ),
        # nginx and the engine ignore the key; with it, all requests are alike.
        env=environment(KEY=key),
        timeout_s=60 + load.first_tokens,
    )
    measured: dict[str, list[float]] = json.loads(out)
    base = measured[DIRECT]
    direct.note(ttft_ms_p50=quantile(base, 0.5), ttft_ms_p99=quantile(base, 0.99))
    for proxy in proxies:
        took = measured[proxy.name]
        proxy.note(
            ttft_added_ms_p50=quantile(took, 0.5) - quantile(base, 0.5),
            ttft_added_ms_p99=quantile(took, 0.99) - quantile(base, 0.99),
            ttft_added_ms_paired_p50=median(a - b for a, b in zip(took, base, strict=True)),
        )


def _print(report: Report, proxies: Sequence[Proxy], direct: Proxy) -> None:
    # The reference comes first, so that each ratio is known when its line is printed.
    for metric, unit in METRICS.items():
        reference: Figure | None = None
        for proxy in proxies:
            samples = proxy.samples[metric]
            value = sum(samples) if unit == "count" else None
            made = report.add(proxy.name, metric, unit, samples, value=value, reference=reference)
            reference = reference or made
    for metric, samples in direct.samples.items():
        report.add(direct.name, metric, "ms", samples)
    for metric in TTFT_METRICS:
        reference = None
        for proxy in proxies:
            made = report.add(proxy.name, metric, "ms", proxy.samples[metric], reference=reference)
            reference = reference or made


@dataclass(frozen=True, slots=True)
class WrkResult:
    """What wrk saw.

    Attributes:
        requests: Answered requests.
        requests_per_s: Per second.
        latency_ms_p50: Median latency, at as many connections as there were.
        latency_ms_p99: 99th percentile.
        failed: Answers with another status than 2xx or 3xx, and socket errors.
    """

    requests: int
    requests_per_s: float
    latency_ms_p50: float
    latency_ms_p99: float
    failed: int


_WRK_UNITS_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


def parse_wrk(text: str) -> WrkResult:
    """The figures of wrk's report with `--latency`.

    Raises:
        BenchError: It is not such a report.
    """

    def find(pattern: str) -> re.Match[str]:
        match = re.search(pattern, text, re.MULTILINE)
        if match is None:
            raise BenchError(f"wrk printed no {pattern!r}:\n{text}")
        return match

    def latency(percent: int) -> float:
        match = find(rf"^\s+{percent}%\s+([\d.]+)(us|ms|s|m)\s*$")
        return float(match[1]) * _WRK_UNITS_MS[match[2]]

    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    return WrkResult(
        requests=int(find(r"^\s*(\d+) requests in")[1]),
        requests_per_s=float(find(r"^Requests/sec:\s+([\d.]+)")[1]),
        latency_ms_p50=latency(50),
        latency_ms_p99=latency(99),
        failed=(int(bad[1]) if bad else 0) + (sum(map(int, errors.groups())) if errors else 0),
    )
