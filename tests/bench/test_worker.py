"""`pilotlight bench worker`: both measurements with tiny numbers and the stand-in engine."""

import asyncio
import json
import sys

import pytest

from pilotlight.bench.errors import BenchError
from pilotlight.bench.figures import Report
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench
from pilotlight.bench.worker import measure_program, measure_streams

STAND_IN = json.dumps([sys.executable, "-m", "pilotlight.testing.fake_engine"])
WORDS = 5
"""Of each stream's question, which the stand-in repeats."""


def figures(capsys):
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {(line["case"], line["metric"]): line for line in lines}


def test_starts_jobs_and_memory_of_the_program_are_measured_beside_the_engine_alone(capsys):
    with Bench() as bench:
        asyncio.run(measure_program(bench, starts=1, jobs=10, report=Report("worker", as_json=True)))
    seen = figures(capsys)
    for metric in ("start_ms", "job_ms_p50", "job_ms_p99"):
        ours, engine = seen["pilotlight", metric], seen["stand-in-engine", metric]
        assert ours["ratio"] == pytest.approx(ours["value"] / engine["value"], rel=1e-3)
    assert seen["pilotlight", "job_added_ms_paired_p50"]["n"] == 10
    assert seen["pilotlight", "rss_mb"]["value"] > 10
    assert ("pilotlight", "start_added_ms") in seen


def test_native_streams_are_compared_with_the_data_path(capsys):
    with Bench() as bench:
        installation = Installation(bench, PILOTLIGHT_ENGINE__COMMAND=STAND_IN)
        measure_streams(bench, installation, 2, 4, WORDS, Report("worker", as_json=True))
    seen = figures(capsys)
    ratios = seen["pilotlight", "stream_ratio"]
    assert (ratios["n"], len(seen)) == (2, 6)
    assert seen["pilotlight", "stream_tokens_per_s"]["reference"] == "data-path"


def test_a_stream_that_is_not_whole_ends_the_benchmark():
    with Bench() as bench:
        installation = Installation(bench, PILOTLIGHT_ENGINE__COMMAND=STAND_IN)
        with pytest.raises(BenchError, match=f"expected {WORDS + 1} tokens"):
            measure_streams(bench, installation, 2, 2, WORDS + 1, Report("worker", as_json=True))
