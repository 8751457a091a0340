"""The commands as a user runs them, without the engine."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from pilotlight.bench.figures import Report
from pilotlight.bench.gateway import CROWD_METRICS, DIRECT_METRICS, FAST_METRICS, METRICS, run
from pilotlight.bench.gateway_loads import Crowd, Load
from pilotlight.bench.gateway_proxies import PEERS

COMMAND = [sys.executable, "-c", "from pilotlight.cli import main; main()", "bench"]
NEEDED = [name for name in ("nginx", "wrk") if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
TINY = Load(
    seconds=1,
    rounds=1,
    peers=("nginx",),
    connections=4,
    burst_streams=4,
    burst_repeats=2,
    burst_events=20,
    paced_streams=4,
    first_tokens=30,
    rate=50,
    crowds=(Crowd(40, 20, seconds=2, ramp_s=0.1),),
    many=10,
    settle_s=0.1,
)


def test_the_help_names_every_benchmark_and_starts_nothing():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=30, check=True)
    names = ("gateway", "queue", "coldstart", "throughput", "routing", "fairness", "worker")
    assert all(name in done.stdout for name in names)


def test_missing_programs_are_named_with_the_command_that_installs_them(tmp_path):
    program = (
        "import pilotlight.bench.tools as tools; tools._ADMIN_FOLDERS = ()\n"
        "from pilotlight.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "bench", "gateway", "--json"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "apt-get install nginx wrk" in json.loads(done.stderr)["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["gateway", "--rounds", "0"],
        ["gateway", "--peers", "nginx,envoy"],
        ["routing", "--policies", "auto,luck"],
        ["fairness", "--engine", "sglang"],
    ],
)
def test_wrong_usage_ends_with_2(arguments):
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=30, check=False)
    assert done.returncode == 2


@pytest.mark.skipif(bool(NEEDED) and not os.environ.get("CI"), reason=f"not installed: {', '.join(NEEDED)}")
@pytest.mark.timeout(300)
def test_gateway_prints_every_figure_and_loses_no_event(capsys):
    """The whole benchmark with tiny numbers: nginx, a gateway, both engines, every load."""
    run(TINY, Report("gateway", as_json=True))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures = {(line["case"], line["metric"]): line for line in lines}
    assert len(figures) == len(lines)
    of_crowds = {f"streams_40_{metric}" for metric in CROWD_METRICS}
    for case in ("nginx", "pilotlight"):
        shown = {metric for name, metric in figures if name == case}
        assert {*METRICS, *FAST_METRICS, *of_crowds} <= shown
        for metric in ("failed_events", "failed_requests", "streams_40_failed_events"):
            assert figures[case, metric]["value"] == 0
        assert figures[case, "streams_40_open"]["value"] == 40
    assert DIRECT_METRICS.keys() <= {metric for name, metric in figures if name == "direct"}
    ours, nginx = (figures[case, "cpu_us_per_request"] for case in ("pilotlight", "nginx"))
    assert ours["value"] > 0
    assert ours["reference"] == "nginx"
    assert ours["ratio"] == pytest.approx(ours["value"] / nginx["value"], rel=1e-3)
    assert figures["pilotlight", "rss_mb_idle"]["value"] > 10
    assert figures["pilotlight", "many_requests"]["value"] >= 10
    assert figures["pilotlight", "many_failed_requests"]["value"] == 0


@pytest.mark.soak
def test_every_proxy_is_measured_beside_ours(capsys):
    """Installs vllm-router and LiteLLM where they are not yet there, which takes minutes."""
    run(replace(TINY, peers=PEERS, crowds=(), many=0), Report("gateway", as_json=True))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures = {(line["case"], line["metric"]): line["value"] for line in lines}
    for case in (*PEERS, "pilotlight"):
        assert METRICS.keys() <= {metric for name, metric in figures if name == case}
        assert figures[case, "failed_requests"] == figures[case, "failed_events"] == 0
    assert ("vllm-router", "cpu_us_per_request_varied") in figures
    assert ("litellm", "cpu_us_per_request_varied") not in figures
