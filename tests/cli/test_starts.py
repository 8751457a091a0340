"""`pilotlight starts`: the waterfall of a start, for every width of a terminal."""

from __future__ import annotations

import json

import pytest

from pilotlight.cli.waterfall import draw_bar, draw_starts

WORKER = "abcdefgh123456"

WHOLE = (
    ("decision", 0), ("placement", 10), ("spawned", 20), ("importing", 120), ("loading_weights", 4_120),
    ("ready", 4_950), ("first_token", 5_000),
)  # fmt: skip


def start(*stages, **changes):
    moments = dict(stages)
    return {
        "worker_id": WORKER,
        "version": 2,
        "rung": "cold",
        "outcome": "ready",
        "started_at": "2026-06-01T12:05:00Z",
        "ready_after_ms": moments.get("ready"),
        "first_token_after_ms": moments.get("first_token"),
        "memory_bytes": None,
        "note": "",
        "stages": [{"stage": stage, "at_ms": 10**12 + at, "after_ms": at} for stage, at in stages],
        "failure": None,
        **changes,
    }


def drawn(starts, width):
    return ["".join(text for text, _ in line) for line in draw_starts(starts, width)]


def test_starts_draws_what_the_gateway_tells_and_hands_all_of_it_on(cli, gateway):
    endpoint = gateway.add("alpha")
    failure = {"kind": "disk_full", "cause": "No space left on device", "advice": "Free disk space."}
    failed = start(("decision", 0), ("failed", 900), outcome="failed", failure=failure)
    gateway.starts[endpoint["id"]] = [start(*WHOLE, memory_bytes=412_345_678, note="no launcher"), failed]
    shown = cli("starts", "alpha").stdout.splitlines()
    head = "revision 2  cold  ready  ready in 5.0 s  first token in 5.0 s  412.3 MB"
    assert shown[0] == f"{WORKER}  {head}"
    assert "  note: no launcher" in shown
    assert f"{WORKER}  revision 2  cold  failed  after 900 ms" in shown
    assert shown[-1] == "  failed: No space left on device. Free disk space. [disk_full]"
    assert json.loads(cli("starts", "alpha", "--json").stdout) == gateway.starts[endpoint["id"]]


def test_an_endpoint_that_never_started_anything_says_so(cli, gateway):
    gateway.add("alpha")
    result = cli("starts", "alpha")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no worker of this endpoint has started yet" in result.stderr


def test_bars_begin_where_the_stage_did_and_have_one_scale():
    lines = drawn([start(*WHOLE), start(("decision", 0), ("ready", 2_500), rung="frozen")], 60)
    bars = {line.split("  ")[1].strip(): line[29:] for line in lines if "█" in line}
    assert len(bars["loading weights"].strip()) == pytest.approx(
        len(bars["importing"].strip()) * 0.83 / 4, abs=1
    )
    importing_ends = len(bars["importing"])
    assert abs(len(bars["loading weights"]) - len(bars["loading weights"].lstrip()) - importing_ends) <= 1
    assert len(bars["decision"].strip()) == pytest.approx(importing_ends * 2_500 / 4_120, abs=1)


@pytest.mark.parametrize("width", [20, 30, 44, 60, 80, 200])
def test_nothing_is_wider_than_the_terminal(width):
    """Worker ids alone may be: they are copied. Where bars have no room, there are none."""
    long = start(*WHOLE, memory_bytes=10**9, note="the launcher was started with another HF_HOME " * 3)
    lines = drawn([long, start(("decision", 0), ("ready", 1))], width)
    assert max(map(len, lines)) <= max(width, 30)
    assert any("█" in line for line in lines) == (width >= 44)
    for said in ("4.0 s", "loading weights", "1.0 GB", "first token in 5.0 s"):
        assert any(said in line for line in lines), said


@pytest.mark.parametrize(
    ("begin", "end", "bar"),
    [(0, 0, "▏"), (0, 2.5, "██▌"), (1.6, 2.6, "  █"), (3.2, 3.7, "   ▌"), (0, 0.99, "█")],
)
def test_a_bar_is_right_to_an_eighth(begin, end, bar):
    assert draw_bar(begin, end) == bar


def test_what_is_not_known_is_not_made_up():
    assert drawn([start(rung="", outcome="stopped")], 80) == [f"{WORKER}  revision 2  unknown rung  stopped"]
