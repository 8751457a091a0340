"""`pilotlight bench fairness`: all of it with tiny numbers and the stand-in engine."""

import json

from pilotlight.bench.fairness import Load, run
from pilotlight.bench.figures import Report


def test_waits_of_light_keys_are_compared_with_those_alone(capsys):
    load = Load(seconds=1, rounds=1, slots=2, greedy=6, greedy_tokens=20, light_tokens=2, think_s=0.1)
    run(load, Report("fairness", as_json=True))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures = {(line["case"], line["metric"]): line for line in lines}
    assert len(figures) == len(lines)
    waits = [figures[case, "queue_wait_ms_p95"] for case in ("alone", "pilotlight")]
    assert waits[1]["reference"] == "alone"
    assert figures["pilotlight", "slot_service_ms"]["value"] == 100
    over = figures["pilotlight", "queue_wait_p95_over_alone_slots"]["value"]
    assert abs(over - (waits[1]["value"] - waits[0]["value"]) / 100) < 1e-3
    assert {metric for case, metric in figures if case == "alone"} == {
        "queue_wait_ms_p50", "queue_wait_ms_p95", "ttft_ms_p50", "ttft_ms_p95", "light_tokens_per_s",
    }  # fmt: skip
    assert ("pilotlight", "ttft_p95_over_alone_slots") in figures
    assert figures["pilotlight", "greedy_tokens_per_s"]["value"] > 0
