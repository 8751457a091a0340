"""What the benchmarks read from other programs: wrk's report, /proc, the gateway's records."""

import os
import subprocess
import sys

import psutil
import pytest

from pilotlight.bench.coldstart import Plan, arrival_to_spawn_ms, interleaved, pause_s, spans_of
from pilotlight.bench.costs import cost_of, session_of
from pilotlight.bench.engine import _has_text
from pilotlight.bench.errors import BenchError
from pilotlight.bench.processes import cpu_s, rss_mb, watched_rss_mb
from pilotlight.bench.routing import parse_prefix_counters
from pilotlight.bench.throughput import mean_ratio
from pilotlight.bench.tools import parse_wrk

WRK = """Running 5s test @ http://127.0.0.1:9105/v1/chat/completions
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     2.40ms    3.21ms  41.20ms   92.00%
    Req/Sec    11.74k     2.10k   15.99k    70.00%
  Latency Distribution
     50%  812.00us
     75%    2.20ms
     90%   16.75ms
     99%    1.20s 
  58424 requests in 5.00s, 31.76MB read
Requests/sec:  11685.80
Transfer/sec:      6.35MB
"""  # noqa: W291 - wrk ends that line with a blank


def test_wrk():
    seen = parse_wrk(WRK)
    assert (seen.requests, seen.requests_per_s, seen.failed) == (58424, 11685.8, 0)
    assert (seen.latency_ms_p50, seen.latency_ms_p99) == (0.812, 1200.0)


def test_wrk_counts_bad_answers_and_broken_connections_as_failed():
    text = WRK + "  Socket errors: connect 0, read 3, write 0, timeout 2\n  Non-2xx or 3xx responses: 17\n"
    assert parse_wrk(text).failed == 22


def test_something_else_than_wrk_is_an_error():
    with pytest.raises(BenchError, match="unable to connect"):
        parse_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_cpu_time_grows_with_work_and_is_that_of_the_named_process():
    before = cpu_s([os.getpid()])
    while cpu_s([os.getpid()]) - before < 0.05:
        sum(range(100_000))
    assert rss_mb(os.getpid()) > 5


def test_cpu_time_of_a_dead_process_is_an_error():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(BenchError, match=str(child.pid)):
        cpu_s([child.pid])


def test_memory_is_watched_while_something_runs():
    with watched_rss_mb([os.getpid()], every_s=0.001) as samples:
        while len(samples) < 3:
            pass
        block = bytearray(b"x" * 50_000_000)
        seen = len(samples)
        while len(samples) < seen + 2:
            pass
    assert max(samples) - samples[0] > 40
    del block


METRICS = b"""# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="pilotlight/ember"} 16384.0
vllm:prefix_cache_queries_created{engine="0",model_name="pilotlight/ember"} 1.79e+09
vllm:prefix_cache_hits_total{engine="0",model_name="pilotlight/ember"} 1.2288e+04
vllm:external_prefix_cache_hits_total{engine="0",model_name="pilotlight/ember"} 7.0
"""


def test_prefix_counters_of_vllm():
    assert parse_prefix_counters(METRICS) == (16384, 12288)


def test_metrics_without_prefix_counters_are_an_error():
    with pytest.raises(BenchError, match="no prefix_cache_queries_total"):
        parse_prefix_counters(b"vllm:num_requests_running 0.0\n")


def start(*stages: tuple[str, int], outcome: str = "ready"):
    return {
        "worker_id": "w",
        "version": 1,
        "rung": "cold",
        "outcome": outcome,
        "stages": [{"stage": name, "at_ms": at, "after_ms": 0} for name, at in stages],
    }


def test_stages_of_a_start_add_up_to_the_wait():
    spans = spans_of(
        start(
            ("decision", 1002), ("spawned", 1010), ("importing", 1500), ("ready", 9000), ("draining", 20_000)
        ),
        started_ms=1000.0,
        answered_ms=9100.0,
    )
    assert spans == {"arrival": 0.002, "decision": 0.008, "spawned": 0.49, "importing": 7.5, "ready": 0.1}
    assert sum(spans.values()) == pytest.approx(8.1)


def test_a_failed_start_has_no_stages_to_report():
    with pytest.raises(BenchError, match="did not become ready: failed"):
        spans_of(start(("decision", 1), outcome="failed"), started_ms=0, answered_ms=2)


def test_kinds_of_starts_are_spread_over_the_whole_run():
    order = list(interleaved(Plan(starts=2, launches=4, thaws=8)))
    assert {case: order.count(case) for case in order} == {
        "plain-vllm": 2,
        "cold": 2,
        "launchable": 4,
        "frozen": 8,
    }
    half = order[: len(order) // 2]
    assert [half.count(case) for case in ("plain-vllm", "cold", "launchable", "frozen")] == [1, 1, 2, 4]


def test_pauses_are_short_mostly_six_seconds_at_times_and_a_hundred_once():
    pauses = [pause_s(number, 100) for number in range(1, 101)]
    assert (pauses.count(1.0), pauses.count(6.0), pauses.count(100.0)) == (90, 9, 1)
    assert max(pause_s(number, 10) for number in range(1, 11)) == 6.0


def test_a_session_costs_what_its_processes_cost():
    child = subprocess.Popen(
        ["/bin/sh", "-c", "sleep 60 & wait"], start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        # Until then it shares its pages with the shell.
        pids: list[int] = []
        while "sleep" not in [psutil.Process(pid).name() for pid in pids]:
            pids = session_of(child.pid)
        assert cost_of(pids).memory_mb > cost_of([child.pid]).memory_mb > 0
        assert cost_of([os.getpid()]).cpu_s > 0
    finally:
        os.killpg(child.pid, 9)
        child.wait()


def test_arrivals_are_matched_with_the_starts_they_caused():
    starts = [start(("decision", 5001), ("spawned", 5012)), start(("decision", 101), ("spawned", 107))]
    assert arrival_to_spawn_ms([100, 5000], starts) == [7.0, 12.0]


def test_arrivals_that_cannot_be_matched_are_an_error():
    with pytest.raises(BenchError, match="2 arrivals caused 1 starts"):
        arrival_to_spawn_ms([100, 5000], [start(("decision", 101), ("spawned", 107))])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n', False),
        (b'data: {"choices":[{"delta":{"content":"5"}}]}\n', True),
        (b'data: {"choices":[]}\n', False),
        (b"data: [DONE]\n", False),
        (b"\n", False),
    ],
)
def test_the_first_token_is_the_first_event_with_text(line, text):
    assert _has_text(line) is text


def test_the_mean_of_ratios_is_not_flattered_by_noise():
    mean, lower = mean_ratio([0.5, 2.0, 0.8, 1.25])
    assert mean == pytest.approx(1.0)
    assert lower < mean
    assert mean_ratio([0.95, 0.95, 0.95]) == pytest.approx((0.95, 0.95))
