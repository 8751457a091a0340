"""The commands as a user runs them, without the engine."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pilotlight.bench.figures import Report
from pilotlight.bench.gateway import METRICS, TTFT_METRICS, Load, run

COMMAND = [sys.executable, "-c", "from pilotlight.cli import main; main()", "bench"]
NEEDED = [name for name in ("nginx", "wrk") if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
TINY = Load(
    seconds=1,
    rounds=1,
    connections=4,
    burst_streams=4,
    burst_repeats=2,
    burst_events=20,
    paced_streams=4,
    first_tokens=30,
    settle_s=0.1,
)


def test_the_help_names_every_benchmark_and_starts_nothing():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=30, check=True)
    assert all(name in done.stdout for name in ("gateway", "coldstart", "throughput"))


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


@pytest.mark.parametrize("option", [["--rounds", "0"], ["--seconds", "x"], ["--nonsense"]])
def test_wrong_usage_ends_with_2(option):
    done = subprocess.run([*COMMAND, "gateway", *option], capture_output=True, timeout=30, check=False)
    assert done.returncode == 2


@pytest.mark.skipif(bool(NEEDED) and not os.environ.get("CI"), reason=f"not installed: {', '.join(NEEDED)}")
def test_gateway_prints_every_figure_and_loses_no_event(capsys):
    """The whole benchmark with tiny numbers: nginx, a gateway, both engines, every load."""
    run(TINY, Report("gateway", as_json=True))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures = {(line["case"], line["metric"]): line for line in lines}
    assert len(figures) == len(lines)
    for case in ("nginx", "pilotlight"):
        assert {*METRICS, *TTFT_METRICS} <= {metric for name, metric in figures if name == case}
        for metric in ("failed_events", "failed_requests"):
            assert figures[case, metric]["value"] == 0
    ours, nginx = (figures[case, "cpu_us_per_request"] for case in ("pilotlight", "nginx"))
    assert ours["value"] > 0
    assert ours["reference"] == "nginx"
    assert ours["ratio"] == pytest.approx(ours["value"] / nginx["value"], rel=1e-3)
    assert figures["pilotlight", "rss_mb_idle"]["value"] > 10
