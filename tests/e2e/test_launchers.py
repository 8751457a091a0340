"""Launchers of a whole installation: they come with the gateway and go with it, however it goes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = str(Path(sys.executable).with_name("pilotlight"))


@pytest.fixture
def launching(make_installation, engine_home, tmp_path):
    """An installation whose engine's Python runs the real launcher, with something that waits for vLLM."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --target signal:pause\n')
    python.chmod(0o755)
    (tmp_path / "pilotlight-engine.json").symlink_to(engine_home / "pilotlight-engine.json")
    return make_installation(
        PILOTLIGHT_ENGINE__HOME=str(tmp_path),
        PILOTLIGHT_ENGINE__COMMAND="[]",
        PILOTLIGHT_WORKERS__MEMORY_DEFAULT_BYTES="1",
    ).start()


def ready(installation):
    found = installation.api.get("/pilotlight/v1/launchers").json()["launchers"]
    return found if [each["state"] for each in found] == ["ready"] else None


def test_a_launcher_lives_as_long_as_the_gateway_and_an_endpoint_that_can_use_it(launching, tools):
    """1. With the first endpoint comes a launcher, though no worker runs. 2. It ends when the gateway is killed;
    the next gateway has one of its own. 3. It ends with the last endpoint. 4. Ctrl-C leaves none.
    """
    assert launching.api.get("/pilotlight/v1/launchers").json() == {"launchers": []}
    endpoint, second = launching.deploy(), launching.deploy()
    (launcher,) = tools.until(lambda: ready(launching), "a launcher is ready")
    assert set(launcher["endpoints"]) == {endpoint.id, second.id}
    assert launcher["memory_bytes"] > 0
    assert launcher["pid"] in launching.processes()
    listed = subprocess.run(
        [PROGRAM, "launchers", "--json"], env=launching.environment, capture_output=True, check=True
    )
    assert [each["fingerprint"] for each in json.loads(listed.stdout)] == [launcher["fingerprint"]]

    launching.crash()
    tools.until(lambda: launcher["pid"] not in launching.processes(), "the launcher ended with its gateway")
    launching.start()
    (again,) = tools.until(lambda: ready(launching), "a launcher is ready again")
    assert again["fingerprint"] == launcher["fingerprint"]

    for each in (endpoint, second):
        launching.api.delete(f"/v2/serverless/{each.id}").raise_for_status()
    tools.until(lambda: again["pid"] not in launching.processes(), "nobody wants it any more")
    launching.deploy()
    (last,) = tools.until(lambda: ready(launching), "an endpoint wants it again")
    launching.signal(last["pid"], signal.SIGSTOP)
    assert launching.interrupt() == 0
    assert list(launching.sockets.iterdir()) == []
