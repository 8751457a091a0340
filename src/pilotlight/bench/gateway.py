"""`pilotlight bench gateway`: what the gateway costs per request and per event, beside other proxies.

An engine that answers at once stands behind all of them; wrk and our own load generators stand before them.
All cases of a round follow each other, and the order turns with the round, so that what else the machine does
hits all of them. CPU time is that of the proxy's own processes, read after the work that it puts off (the
request log) is done. The loads are in `bench.gateway_loads`, the proxies in `bench.gateway_proxies`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from pilotlight.bench.figures import Figure, Report
from pilotlight.bench.gateway_loads import (
    Load,
    measure_burst,
    measure_crowd,
    measure_first_tokens,
    measure_many,
    measure_paced,
    measure_rate,
    measure_requests,
    measure_varied,
)
from pilotlight.bench.gateway_proxies import NGINX, PILOTLIGHT, Proxy, our_proxy, start_proxies
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench, python_module, rss_mb
from pilotlight.bench.tools import find_tools
from pilotlight.cli.output import note

DIRECT = "direct"

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

FAST_METRICS = {
    "cpu_us_per_request_varied": "us",
    "ttft_added_ms_p50": "ms",
    "ttft_added_ms_p99": "ms",
    "ttft_added_ms_paired_p50": "ms",
    "latency_added_ms_p50": "ms",
    "latency_added_ms_p99": "ms",
}
"""What is measured of every proxy that can carry the load."""

DIRECT_METRICS = {
    "ttft_ms_p50": "ms",
    "ttft_ms_p99": "ms",
    "rate_latency_ms_p50": "ms",
    "rate_latency_ms_p99": "ms",
}
"""What the added times are added to."""

CROWD_METRICS = {
    "open": "count",
    "events_per_s": "1/s",
    "cpu_us_per_event": "us",
    "event_late_ms_p50": "ms",
    "event_late_ms_p99": "ms",
    "rss_mb": "MB",
    "failed_events": "count",
}
"""What is measured of many streams, after their number; of nginx, of Pilotlight, and without a proxy."""

_SUMMED = ("failed_requests", "failed_events")
"""Endings of the metrics of which every single one counts."""


def run(load: Load, report: Report) -> None:
    """Measure and print.

    Raises:
        UsageError: wrk, or nginx where it is asked for, is not installed, or a peer is not known.
        BenchError: Something that was started failed.
    """
    tools = find_tools(*[name for name in (NGINX, "wrk") if name in {*load.peers, "wrk"}])
    with Bench() as bench, contextlib.closing(report):
        engine_port = _start_engine(bench)
        peers = start_proxies(bench, engine_port, load.peers)
        ours = our_proxy(Installation(bench), engine_port)
        direct = Proxy(DIRECT, [], engine_port)
        idle_mb = rss_mb(ours.pids[0])
        for number in range(load.rounds):
            told = f"gateway: round {number + 1} of {load.rounds}"
            _measure_round(bench, tools["wrk"], [*peers, ours], direct, load, told, turned=number % 2 == 1)
        _print(report, [*peers, ours], direct, load)
        report.add(PILOTLIGHT, "rss_mb_idle", "MB", [idle_mb])
        report.add(PILOTLIGHT, "rss_mb_after", "MB", [rss_mb(ours.pids[0])])
        if load.many:
            _print_many(report, measure_many(bench, tools["wrk"], ours, load))


def _start_engine(bench: Bench) -> int:
    child = bench.start("engine", python_module("pilotlight.bench.harness.upstream", 0), stdout=True)
    return int(child.read_line())


def _measure_round(
    bench: Bench, wrk: str, proxies: Sequence[Proxy], direct: Proxy, load: Load, told: str, *, turned: bool
) -> None:
    order = list(reversed(proxies)) if turned else list(proxies)
    for proxy in order:
        note(f"{told}: {proxy.name}")
        own = load.of(proxy)
        measure_requests(bench, wrk, proxy, own)
        if not proxy.slow:
            measure_varied(bench, proxy, own)
        measure_burst(bench, proxy, own)
        measure_paced(bench, proxy, own)
    fast = [proxy for proxy in order if not proxy.slow]
    key = next(proxy.key for proxy in fast if proxy.name == PILOTLIGHT)
    # The others ignore the key; with it, all requests are alike.
    note(f"{told}: time to first token")
    measure_first_tokens(bench, direct, fast, load, key=key)
    note(f"{told}: {load.rate} requests/s")
    measure_rate(bench, direct, fast, load, key=key)
    for crowd in load.crowds:
        for proxy in [direct, *(proxy for proxy in fast if proxy.name in {NGINX, PILOTLIGHT})]:
            note(f"{told}: {crowd.streams} streams: {proxy.name}")
            measure_crowd(bench, proxy, load, crowd)


def _print(report: Report, proxies: Sequence[Proxy], direct: Proxy, load: Load) -> None:
    _print_metrics(report, METRICS, proxies)
    _print_metrics(report, DIRECT_METRICS, [direct])
    _print_metrics(report, FAST_METRICS, proxies)
    for crowd in load.crowds:
        named = {f"{crowd.name}_{metric}": unit for metric, unit in CROWD_METRICS.items()}
        # What the machine does without a proxy is nobody's reference.
        _print_metrics(report, named, [direct])
        _print_metrics(report, named, proxies)


def _print_metrics(report: Report, metrics: Mapping[str, str], proxies: Sequence[Proxy]) -> None:
    for metric, unit in metrics.items():
        reference: Figure | None = None
        for proxy in proxies:
            samples = proxy.samples.get(metric)
            if samples is None:
                continue
            # The first one is the reference, so each ratio is known when its line is printed.
            value = sum(samples) if metric.endswith(_SUMMED) else None
            made = report.add(proxy.name, metric, unit, samples, value=value, reference=reference)
            reference = reference or made


def _print_many(report: Report, seen: Mapping[str, float]) -> None:
    for metric, value in seen.items():
        report.add(PILOTLIGHT, metric, "MB" if "_mb_" in metric else "count", [value])
    growth = seen["many_rss_mb_after"] - seen["many_rss_mb_before"]
    report.add(PILOTLIGHT, "many_rss_mb_growth", "MB", [growth])
