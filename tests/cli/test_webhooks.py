"""`pilotlight webhooks`: secrets, and what could not be delivered."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def dead(gateway):
    endpoint = gateway.add("alpha")
    letter = {
        "id": "job1.1",
        "job_id": "job1",
        "endpoint_id": endpoint["id"],
        "url": "https://example.com/hook",
        "tries": 3,
        "last_status": None,
        "last_error": "no answer\x1b[31m within 10 s",
        "created_at": "2026-06-01T12:00:00Z",
    }
    gateway.dead_webhooks += [letter, letter | {"id": "job2.1", "endpoint_id": "other"}]
    return letter


def test_secret_prints_the_secret_alone(cli, gateway):
    endpoint = gateway.add("alpha")
    assert cli("webhooks", "secret", "alpha").stdout == "whsec_0f\n"
    answer = json.loads(cli("webhooks", "secret", endpoint["id"], "--json").stdout)
    assert answer == {"endpoint_id": endpoint["id"], "secret": "whsec_0f"}
    assert cli("webhooks", "secret", "beta").exit_code == 1


def test_dead_lists_all_or_one_endpoints(cli, dead):
    assert [one["id"] for one in json.loads(cli("webhooks", "dead", "--json").stdout)] == ["job1.1", "job2.1"]
    assert json.loads(cli("webhooks", "dead", "alpha", "--json").stdout) == [dead]
    assert len(json.loads(cli("webhooks", "dead", "--limit", "1", "--json").stdout)) == 1
    table = cli("webhooks", "dead", "alpha").stdout
    assert "https://example.com/hook" in table
    assert "\x1b" not in table
    assert cli("webhooks", "dead", "--limit", "0").exit_code == 2


def test_resend_and_rm(cli, gateway, dead):
    assert json.loads(cli("webhooks", "resend", "job1.1", "--json").stdout)["tries"] == 0
    assert json.loads(cli("webhooks", "rm", "job2.1", "--json").stdout) == {"id": "job2.1", "deleted": True}
    assert gateway.dead_webhooks == []
    for verb in ("resend", "rm"):
        result = cli("webhooks", verb, "job1.1")
        assert result.exit_code == 1
        assert "webhook job1.1 does not exist" in result.output


def test_they_say_what_they_did(cli, dead):
    assert "sending job1.1 to https://example.com/hook" in cli("webhooks", "resend", "job1.1").stderr
    assert "forgot job2.1" in cli("webhooks", "rm", "job2.1").stderr
