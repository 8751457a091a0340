"""`pilotlight bench routing`: all of it with tiny numbers."""

import json

import pytest

from pilotlight.bench.figures import Report
from pilotlight.bench.routing import METRICS, Load, policies_of, run
from pilotlight.cli.root import UsageError
from pilotlight.domain.endpoint import Routing


def test_policies_by_name():
    assert policies_of(["prefix", "auto"]) == (Routing.PREFIX, Routing.AUTO)
    with pytest.raises(UsageError, match="'luck'; there are auto, least_loaded, session, prefix"):
        policies_of(["auto", "luck"])
    with pytest.raises(UsageError):
        policies_of([])


def test_a_cache_holds_more_than_half_of_all_beginnings_and_not_all():
    load = Load(groups=24)
    assert 24 * 20 / 2 < load.cache_blocks < 24 * 20


@pytest.mark.soak
def test_routers_are_compared_on_the_same_two_engines(capsys):
    """Two real workers; installs vllm-router where it is not yet there."""
    load = Load(rounds=1, groups=6, per_group=2, concurrency=2, policies=(Routing.AUTO, Routing.SESSION))
    run(load, Report("routing", as_json=True))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures = {(line["case"], line["metric"]): line["value"] for line in lines}
    cases = {"vllm-router-round_robin", "vllm-router-cache_aware", "pilotlight", "pilotlight-session"}
    assert {case for case, _ in figures} == cases
    for case in cases:
        assert METRICS.keys() <= {metric for name, metric in figures if name == case}
        assert 0 <= figures[case, "prefix_cache_hit_rate"] < 1
        assert 0.5 <= figures[case, "busiest_engine_share"] <= 1
