"""`pilotlight up` with a certificate: clients by TLS, workers and the command line without."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from ..certificates import Pair  # noqa: TID252
from .conftest import PROGRAM, WAIT_S, start_with_tls

PILOTLIGHT = PROGRAM[0]


@pytest.fixture
def secured(make_installation, tmp_path):
    """An installation with TLS, whose test client trusts it."""
    return start_with_tls(make_installation, Pair(tmp_path))


def test_clients_speak_tls_and_workers_and_the_command_line_reach_the_gateway_all_the_same(secured):
    assert secured.url.startswith("https://127.0.0.1:")
    local = json.loads((secured.home / "server.json").read_text())["url"]
    assert local.startswith("http://127.0.0.1:")
    endpoint = secured.deploy()
    # The worker has said that it is ready, takes jobs, and posts their results.
    with endpoint.stream("hello") as events:
        assert list(events)[-1] == "[DONE]"
    assert endpoint.result(endpoint.run("hello"))["status"] == "COMPLETED"
    listed = subprocess.run(
        [PILOTLIGHT, "ls", "--json"], env=secured.environment, capture_output=True, text=True, check=True
    )
    (found,) = json.loads(listed.stdout)
    assert found["id"] == endpoint.id
    shown = secured.api.get(f"/pilotlight/v1/endpoints/{endpoint.id}").json()
    assert secured.url in json.dumps(shown)
    assert local not in json.dumps(shown)


def test_a_start_with_a_bad_certificate_ends_with_the_reason(make_installation, tmp_path):
    pair = Pair(tmp_path)
    Path(pair.key).write_text("nothing")
    installation = make_installation(
        PILOTLIGHT_SERVER__TLS_CERT=str(pair.certificate), PILOTLIGHT_SERVER__TLS_KEY=str(pair.key)
    )
    process = installation.spawn()
    assert process.wait(WAIT_S) != 0
    assert process.stdout is not None
    process.stdout.close()
    log = installation.log.read_text()
    assert f"server.tls_key {pair.key} holds no private key in PEM form" in log
    assert "Traceback" not in log
