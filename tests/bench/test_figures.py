"""Figures: what a line says, and the arithmetic behind it."""

import json
import math

import pytest

from pilotlight.bench.figures import Report, figure, lower_bound_95, quantile, t_975

KEYS = ["bench", "case", "metric", "value", "unit", "reference", "ratio", "n", "spread"]


def test_a_figure_is_the_median_with_its_spread():
    made = figure("gateway", "nginx", "cpu_us_per_request", "us", [17.0, 15.0, 16.0])
    assert (made.value, made.n, made.spread) == (16.0, 3, (15.0, 17.0))
    assert made.reference is made.ratio is None


def test_the_ratio_is_value_by_the_value_of_the_reference():
    nginx = figure("gateway", "nginx", "cpu_us_per_request", "us", [16.0])
    ours = figure("gateway", "pilotlight", "cpu_us_per_request", "us", [24.0, 40.0], reference=nginx)
    assert (ours.reference, ours.ratio) == ("nginx", 2.0)


def test_there_is_no_ratio_to_nothing():
    nginx = figure("gateway", "nginx", "failed_events", "count", [0])
    assert figure("gateway", "pilotlight", "failed_events", "count", [0], reference=nginx).ratio is None


def test_a_line_has_the_documented_keys_in_order(capsys):
    report = Report("gateway", as_json=True)
    nginx = report.add("nginx", "latency_ms_p50", "ms", [1.23456789])
    report.add("pilotlight", "latency_ms_p50", "ms", [2, 4], reference=nginx)
    report.close()
    captured = capsys.readouterr()
    first, second = map(json.loads, captured.out.splitlines())
    assert list(first) == list(second) == KEYS
    assert first["value"] == 1.23457
    assert second["spread"] == [2, 4]
    assert captured.err == ""


def test_people_also_get_a_table_and_it_is_not_on_standard_output(capsys):
    report = Report("gateway", as_json=False)
    report.add("nginx", "latency_ms_p50", "ms", [1.0])
    report.close()
    captured = capsys.readouterr()
    assert [json.loads(line)["value"] for line in captured.out.splitlines()] == [1.0]
    assert "latency_ms_p50" in captured.err


def test_what_does_not_exist_is_still_json(capsys):
    Report("throughput", as_json=True).add("pilotlight", "ratio_lower_95", "ratio", [1.0], value=-math.inf)
    assert json.loads(capsys.readouterr().out)["value"] < -1e300


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 51), (0.95, 96), (0.99, 100), (1.0, 100)])
def test_quantiles_are_samples_and_need_no_order(share, expected):
    assert quantile(reversed(range(1, 101)), share) == expected


@pytest.mark.parametrize(
    # Tables of Student's t, two-sided 95 %.
    ("freedom", "expected"),
    [
        (1, 12.7062),
        (9, 2.2622),
        (19, 2.0930),
        (30, 2.0423),
        (31, 2.0395),
        (40, 2.0211),
        (60, 2.0003),
        (120, 1.9799),
    ],
)
def test_quantiles_of_t(freedom, expected):
    assert t_975(freedom) == pytest.approx(expected, abs=1.5e-4)


def test_the_lower_bound_of_a_mean():
    samples = [0.95, 0.97, 0.96, 0.98, 0.94]
    # mean 0.96, standard deviation 0.0158, t(4) 2.776
    assert lower_bound_95(samples) == pytest.approx(0.96 - 2.7764 * 0.0158114 / 5**0.5, abs=1e-6)
    assert lower_bound_95([0.96, 0.96]) == 0.96
    assert lower_bound_95([0.96]) == -math.inf
