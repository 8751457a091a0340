"""The loads of `pilotlight bench gateway`: each is put on one proxy and leaves one round's values with it.

CPU time is read after the work that a proxy puts off is done. wrk and the programs of `bench.harness` make
the load; they and the engine are never counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from pilotlight.bench.figures import quantile
from pilotlight.bench.gateway_proxies import PEERS, Proxy
from pilotlight.bench.processes import (
    Bench,
    cpu_s,
    environment,
    python_module,
    rss_mb,
    settled_cpu_s,
    watched_rss_mb,
)
from pilotlight.bench.tools import HARNESS, WrkResult, parse_wrk
from pilotlight.cli.output import note

_MICRO = 1e6
_MARGIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Crowd:
    """Many slow streams at once.

    Attributes:
        streams: At the same time.
        events_per_s: Of each stream.
        seconds: Length of each stream.
        ramp_s: Over which the streams are opened.
    """

    streams: int
    events_per_s: int
    seconds: int = 10
    ramp_s: float = 0.0

    @property
    def name(self) -> str:
        """Begins the names of its figures."""
        return f"streams_{self.streams}"


CROWDS = (Crowd(1000, 20, ramp_s=2.0), Crowd(2000, 5, ramp_s=4.0))


@dataclass(frozen=True, slots=True)
class Load:
    """How much is measured.

    Attributes:
        seconds: Of wrk, of the varied requests, of a paced stream, and at a fixed rate.
        rounds: How often everything is repeated.
        peers: What is measured beside Pilotlight.
        connections: Of wrk and of the varied requests.
        burst_streams: At the same time, each repeated `burst_repeats` times.
        burst_repeats: Streams one after the other on each connection.
        burst_events: Per stream.
        paced_streams: At the same time.
        paced_pause_s: Between two events of a paced stream.
        first_tokens: Requests per road and round, one at a time.
        rate: Requests a second at a fixed rate.
        crowds: Many streams at once.
        many: Requests after which memory is looked at again; 0: none.
        warm_up_s: Of wrk, not counted.
        settle_s: Quiet time after which work that was put off counts as done; rows of the request log are
            written once a second.
    """

    seconds: int = 5
    rounds: int = 3
    peers: tuple[str, ...] = PEERS
    connections: int = 32
    burst_streams: int = 64
    burst_repeats: int = 5
    burst_events: int = 200
    paced_streams: int = 300
    paced_pause_s: float = 0.05
    first_tokens: int = 1000
    rate: int = 500
    crowds: tuple[Crowd, ...] = CROWDS
    many: int = 1_000_000
    warm_up_s: int = 1
    settle_s: float = 1.25

    @property
    def paced_events(self) -> int:
        """Events per paced stream."""
        return max(1, round(self.seconds / self.paced_pause_s))

    def of(self, proxy: Proxy) -> Load:
        """What this proxy gets: a tenth of the connections and streams where it is slow."""
        if not proxy.slow:
            return self
        return replace(
            self,
            connections=_tenth(self.connections),
            burst_streams=_tenth(self.burst_streams),
            burst_repeats=1,
            paced_streams=_tenth(self.paced_streams),
        )


def measure_requests(bench: Bench, wrk: str, proxy: Proxy, load: Load) -> None:
    """Small requests as fast as answers come."""
    ask_wrk(bench, wrk, proxy, load, load.warm_up_s)
    before = settled_cpu_s(proxy.pids, quiet_s=load.settle_s)
    seen = ask_wrk(bench, wrk, proxy, load, load.seconds)
    used = settled_cpu_s(proxy.pids, quiet_s=load.settle_s) - before
    proxy.note(
        cpu_us_per_request=used * _MICRO / max(1, seen.requests),
        requests_per_s=seen.requests_per_s,
        latency_ms_p50=seen.latency_ms_p50,
        latency_ms_p99=seen.latency_ms_p99,
        failed_requests=seen.failed,
    )


def measure_varied(bench: Bench, proxy: Proxy, load: Load) -> None:
    """Requests no two of which are alike, each in two writes; failed ones count with those of wrk."""
    before = cpu_s(proxy.pids)
    arguments = (proxy.port, proxy.path, load.connections, load.seconds)
    seen = _ask(bench, "varied", *arguments, key=proxy.key, timeout_s=load.seconds + _MARGIN_S)
    used = settled_cpu_s(proxy.pids, quiet_s=load.settle_s) - before
    _tell_failures(proxy.name, "varied requests", seen)
    proxy.note(cpu_us_per_request_varied=used * _MICRO / max(1, seen["requests"]))
    proxy.samples["failed_requests"][-1] += seen["failed"]


def measure_burst(bench: Bench, proxy: Proxy, load: Load) -> None:
    """Streams whose events come as fast as they go."""
    shape = (load.burst_streams, load.burst_repeats, load.burst_events, 0.0, 0.0)
    used_s, seen = _measure_streams(bench, proxy, load, shape, "burst streams", paths=[proxy.path])
    proxy.note(
        cpu_us_per_event_burst=used_s * _MICRO / max(1, seen["events"]),
        events_per_s_burst=seen["events"] / seen["seconds"],
        failed_events=seen["failed"],
    )


def measure_paced(bench: Bench, proxy: Proxy, load: Load) -> None:
    """Streams with an event now and then."""
    shape = (load.paced_streams, 1, load.paced_events, load.paced_pause_s, load.paced_pause_s)
    used_s, seen = _measure_streams(bench, proxy, load, shape, "paced streams", paths=[proxy.path])
    proxy.note(
        cpu_us_per_event_paced=used_s * _MICRO / max(1, seen["events"]),
        event_late_ms_p99=seen["late_ms_p99"],
    )
    proxy.samples["failed_events"][-1] += seen["failed"]


def measure_crowd(bench: Bench, proxy: Proxy, load: Load, crowd: Crowd) -> None:
    """Many streams at once, and what they take of memory."""
    shape = (crowd.streams, 1, crowd.seconds * crowd.events_per_s, 1 / crowd.events_per_s, crowd.ramp_s)
    with watched_rss_mb(proxy.pids) as samples:
        what = f"{crowd.streams} streams"
        used_s, seen = _measure_streams(bench, proxy, load, shape, what, paths=proxy.paths)
    values = {
        "open": float(seen["open_max"]),
        "events_per_s": seen["events"] / seen["seconds"],
        "event_late_ms_p50": seen["late_ms_p50"],
        "event_late_ms_p99": seen["late_ms_p99"],
        "failed_events": seen["failed"],
    }
    if proxy.pids:
        values["cpu_us_per_event"] = used_s * _MICRO / max(1, seen["events"])
        values["rss_mb"] = max(samples)
    proxy.note(**{f"{crowd.name}_{name}": value for name, value in values.items()})


def measure_first_tokens(
    bench: Bench, direct: Proxy, proxies: Sequence[Proxy], load: Load, *, key: str
) -> None:
    """One streaming request at a time, by every road in turn, and its first event."""
    arguments = (load.first_tokens, *map(_road, [direct, *proxies]))
    seen = _ask(bench, "first_token", *arguments, key=key, timeout_s=_MARGIN_S + load.first_tokens)
    base: list[float] = seen[direct.name]
    direct.note(ttft_ms_p50=quantile(base, 0.5), ttft_ms_p99=quantile(base, 0.99))
    for proxy in proxies:
        took: list[float] = seen[proxy.name]
        proxy.note(
            ttft_added_ms_p50=quantile(took, 0.5) - quantile(base, 0.5),
            ttft_added_ms_p99=quantile(took, 0.99) - quantile(base, 0.99),
            ttft_added_ms_paired_p50=median(a - b for a, b in zip(took, base, strict=True)),
        )


def measure_rate(bench: Bench, direct: Proxy, proxies: Sequence[Proxy], load: Load, *, key: str) -> None:
    """Requests on a fixed schedule, by every road in turn, and their latencies."""
    roads = [direct, *proxies]
    arguments = (load.rate, load.seconds, *map(_road, roads))
    timeout_s = _MARGIN_S + 10 * load.seconds * len(roads)
    seen = _ask(bench, "rate", *arguments, key=key, timeout_s=timeout_s)
    note(f"gateway: at {load.rate} requests/s the schedule slipped by {seen['slipped_ms']:.1f} ms at worst")
    base: list[float] = seen["roads"][direct.name]["took_ms"]
    direct.note(rate_latency_ms_p50=quantile(base, 0.5), rate_latency_ms_p99=quantile(base, 0.99))
    for proxy in proxies:
        answers = seen["roads"][proxy.name]
        _tell_failures(proxy.name, f"{load.rate} requests/s", answers)
        took: list[float] = answers["took_ms"]
        proxy.note(
            latency_added_ms_p50=quantile(took, 0.5) - quantile(base, 0.5),
            latency_added_ms_p99=quantile(took, 0.99) - quantile(base, 0.99),
        )
        proxy.samples["failed_requests"][-1] += answers["failed"]


def measure_many(bench: Bench, wrk: str, proxy: Proxy, load: Load) -> dict[str, float]:
    """Resident memory before and after many requests, in pieces of `load.seconds`; how many failed.

    The first piece is not part of it: pools and caches fill in it.
    """
    seen = ask_wrk(bench, wrk, proxy, load, load.seconds)
    before = rss_mb(proxy.pids[0])
    requests = failed = 0
    while requests < load.many:
        seen = ask_wrk(bench, wrk, proxy, load, load.seconds)
        requests, failed = requests + seen.requests, failed + seen.failed
        note(f"gateway: {requests} of {load.many} requests, {rss_mb(proxy.pids[0]):.1f} MB resident")
    settled_cpu_s(proxy.pids, quiet_s=load.settle_s)
    after = rss_mb(proxy.pids[0])
    return {
        "many_requests": float(requests),
        "many_failed_requests": float(failed),
        "many_rss_mb_before": before,
        "many_rss_mb_after": after,
    }


def ask_wrk(bench: Bench, wrk: str, proxy: Proxy, load: Load, seconds: int) -> WrkResult:
    """What wrk sees with small chat completions, not streamed."""
    script = str(HARNESS / "unary.lua")
    url = f"http://127.0.0.1:{proxy.port}{proxy.path}"
    out = bench.run(
        "wrk",
        [wrk, "-t1", f"-c{load.connections}", f"-d{seconds}s", "--latency", "-s", script, url],
        env=environment(KEY=proxy.key),
        timeout_s=seconds + _MARGIN_S,
    )
    return parse_wrk(out.decode())


def _measure_streams(
    bench: Bench,
    proxy: Proxy,
    load: Load,
    shape: tuple[int, int, int, float, float],
    what: str,
    *,
    paths: Sequence[str],
) -> tuple[float, dict[str, Any]]:
    """CPU seconds that the proxy used, and what the streams saw."""
    _, rounds, events, pause_s, ramp_s = shape
    before = cpu_s(proxy.pids)
    timeout_s = _MARGIN_S + ramp_s + 10 * (load.seconds + rounds * events * pause_s)
    seen = _ask(bench, "streams", proxy.port, ",".join(paths), *shape, key=proxy.key, timeout_s=timeout_s)
    used = settled_cpu_s(proxy.pids, quiet_s=load.settle_s) - before
    _tell_failures(proxy.name, what, seen)
    return used, seen


def _ask(bench: Bench, program: str, *arguments: object, key: str, timeout_s: float) -> dict[str, Any]:
    command = python_module(f"pilotlight.bench.harness.{program}", *arguments)
    out = bench.run(program, command, env=environment(KEY=key), timeout_s=timeout_s)
    result: dict[str, Any] = json.loads(out)
    return result


def _road(proxy: Proxy) -> str:
    return f"{proxy.name}={proxy.port}:{proxy.path}"


def _tell_failures(name: str, what: str, seen: dict[str, Any]) -> None:
    if seen["failures"]:
        note(f"gateway: {name}, {what}: {'; '.join(seen['failures'])}")


def _tenth(count: int) -> int:
    return max(1, count // 10)
