"""`pilotlight bench throughput` with the stand-in engine of `pilotlight.testing`."""

import json
import sys

from pilotlight.bench.engine import MODEL, PlainEngine
from pilotlight.bench.figures import Report
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench, free_port
from pilotlight.bench.throughput import measure_pairs

WORDS = 5
"""Of each stream's question, which the stand-in repeats."""


def test_pairs_give_a_ratio_and_what_the_gateway_uses_per_event(capsys):
    with Bench() as bench:
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "pilotlight.testing.fake_engine",
            "--port",
            str(port),
            "--model",
            MODEL,
        ]
        child = bench.start("engine", command)
        child.wait_port(port)
        engine = PlainEngine(child, port, "", 0.0)
        report = Report("throughput", as_json=True)
        measure_pairs(bench, Installation(bench), engine, 2, 4, WORDS, report)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures = {(line["case"], line["metric"]): line for line in lines}
    ours = figures["pilotlight", "tokens_per_s"]
    assert (ours["reference"], ours["n"]) == ("vllm-direct", 2)
    assert figures["pilotlight", "ratio_lower_95"]["value"] <= figures["pilotlight", "ratio"]["value"]
    assert figures["pilotlight", "gateway_cpu_us_per_event"]["value"] > 0
