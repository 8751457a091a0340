"""`pilotlight launchers`, and what `pilotlight doctor` says of launchers."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def launcher(gateway):
    """A ready launcher of one endpoint, which the test may change."""
    endpoint = gateway.add("alpha")
    gateway.launchers.append(
        {
            "fingerprint": "0123456789ab",
            "engine_version": "0.32.0",
            "state": "ready",
            "problem": "",
            "pid": 4711,
            "memory_bytes": 550_000_000,
            "ready_s": 9.5,
            "launches": 3,
            "engines": 1,
            "endpoints": [endpoint["id"], "deleted0000000"],
            "log": "launcher-0123456789ab",
        }
    )
    return gateway.launchers[0]


def check(cli, **environment):
    report = json.loads(cli("doctor", "--json", **environment).stdout)
    return next(each for each in report["checks"] if each["name"] == "launchers")


def test_launchers_are_listed_with_the_names_of_their_endpoints(cli, launcher):
    assert json.loads(cli("launchers", "--json").stdout) == [launcher]
    text = cli("launchers").stdout
    assert "0123456789ab" in text
    assert "alpha, deleted0000000" in text


def test_without_launchers_the_doctor_is_named(cli):
    assert "pilotlight doctor" in cli("launchers").stderr
    assert json.loads(cli("launchers", "--json").stdout) == []


def test_the_doctor_shows_launchers(cli, launcher):
    found = check(cli)
    assert (found["status"], found["advice"]) == ("ok", "")
    assert found["detail"] == "0123456789ab (vLLM 0.32.0): ready, 3 launches"


def test_a_launcher_that_failed_is_a_warning_with_its_log(cli, launcher):
    launcher |= {"state": "failed", "problem": "exited with status 1", "pid": None, "memory_bytes": None}
    found = check(cli)
    assert found["status"] == "warn"
    assert "exited with status 1" in found["detail"]
    assert "logs/launcher-0123456789ab.log" in found["advice"]
    result = cli("launchers")
    assert "exited with status 1" in result.stderr


@pytest.mark.parametrize(
    ("variables", "status", "said"),
    [
        ({}, "ok", "no endpoint can use one"),
        ({"PILOTLIGHT_LAUNCHERS__ENABLED": "false"}, "ok", "launchers.enabled is false"),
        ({"PILOTLIGHT_ENGINE__COMMAND": '["llama-server"]'}, "ok", "engine.command"),
        ({"PILOTLIGHT_URL": "http://127.0.0.1:9"}, "ok", "with the gateway"),
        (
            {
                "PILOTLIGHT_URL": "http://127.0.0.1:9",
                "PILOTLIGHT_WORKERS__MEMORY_RESERVE_BYTES": str(1 << 50),
            },
            "warn",
            "too little memory",
        ),
    ],
)
def test_the_doctor_says_why_there_is_none(cli, variables, status, said):
    found = check(cli, **{"PILOTLIGHT_WORKERS__MEMORY_DEFAULT_BYTES": "1", **variables})
    assert found["status"] == status
    assert said in found["detail"]
