"""One job: `run` with its options, `status --timeline` and `retry`."""

from __future__ import annotations

import json

import pytest

JOB = "0b9b1c2d-u1"


def test_run_options_become_the_body_and_a_header(cli, gateway):
    """serverless-api.md §2.3; options win over what the body says."""
    endpoint = gateway.add("alpha")
    result = cli(
        "run", "alpha", '{"input": 1, "policy": {"ttl": 20000, "lowPriority": false}}',
        "--webhook", "https://example.com/hook", "--idempotency-key", "order-17",
        "--low-priority", "--execution-timeout", "5000",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (sent,) = gateway.sent("POST", f"/v2/{endpoint['id']}/run")
    assert sent.body == {
        "input": 1,
        "webhook": "https://example.com/hook",
        "policy": {"ttl": 20000, "lowPriority": True, "executionTimeout": 5000},
    }
    assert sent.headers["idempotency-key"] == "order-17"


def test_run_without_options_sends_nothing_of_them(cli, gateway):
    endpoint = gateway.add("alpha")
    cli("run", "alpha", "{}")
    (sent,) = gateway.sent("POST", f"/v2/{endpoint['id']}/run")
    assert sent.body == {"input": {}}
    assert "idempotency-key" not in sent.headers


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "alpha", "{}", "--ttl", "9999"],
        ["run", "alpha", "{}", "--execution-timeout", "1"],
        ["run", "alpha", '{"input": 1, "policy": 3}', "--low-priority"],
    ],
)
def test_wrong_usage_ends_with_2(cli, gateway, arguments):
    gateway.add("alpha")
    assert cli(*arguments).exit_code == 2
    assert not [one for one in gateway.requests if one.method == "POST"]


STORY = {
    "id": JOB,
    "status": "IN_QUEUE",
    "retries": 1,
    "timeline": [
        {"event": "queued", "at": "2026-08-20T10:00:00.000Z"},
        {"event": "leased", "at": "2026-08-20T10:00:01.500Z", "attempt": 1, "workerId": "w1"},
        {
            "event": "requeued", "at": "2026-08-20T10:00:03.000Z", "attempt": 1, "workerId": "w1",
            "reason": "exit status 139",
        },
    ],
    "waiting": {"reason": "busy", "detail": "all 4 slots of 1 worker are in use", "ahead": 0},
}  # fmt: skip


def test_status_draws_the_timeline(cli, gateway):
    endpoint = gateway.add("alpha")
    gateway.jobs[JOB] = [STORY]
    result = cli("status", "alpha", JOB, "--timeline")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    (waits,) = [line for line in lines if line.startswith("waits")]
    assert waits.endswith("all 4 slots of 1 worker are in use")
    drawn = {line.split()[0]: line for line in lines if line.startswith(("queued", "leased", "requeued"))}
    assert "+0 ms" in drawn["queued"]
    assert drawn["queued"].count("█") == 16
    assert "+1.5 s" in drawn["leased"]
    assert "w1" in drawn["leased"]
    assert "exit status 139" in drawn["requeued"]
    assert "█" not in drawn["requeued"]
    (asked,) = [one for one in gateway.sent("GET", f"/v2/{endpoint['id']}/status/{JOB}") if one.query]
    assert asked.query == {"timeline": "true"}


def test_status_shows_what_went_wrong_in_one_line(cli, gateway):
    """serverless-api.md §4.5: the library's error is a document; a person wants its message."""
    gateway.add("alpha")
    error = json.dumps(
        {"error_type": "<class 'ValueError'>", "error_message": 'bad "seed"', "trace": "x" * 500}
    )
    gateway.jobs[JOB] = [{"id": JOB, "status": "FAILED", "error": error}]
    (line,) = [text for text in cli("status", "alpha", JOB).stdout.splitlines() if text.startswith("error")]
    assert line.split(None, 1)[1] == 'bad \\"seed\\"'
    gateway.jobs[JOB] = [{"id": JOB, "status": "FAILED", "error": "long " * 100}]
    (line,) = [text for text in cli("status", "alpha", JOB).stdout.splitlines() if text.startswith("error")]
    assert line.endswith("…")


def test_status_timeline_as_json_is_what_the_gateway_says(cli, gateway):
    gateway.add("alpha")
    gateway.jobs[JOB] = [STORY]
    assert json.loads(cli("status", "alpha", JOB, "--timeline", "--json").stdout) == STORY


def test_gateway_without_timelines_is_named(cli, gateway):
    gateway.add("alpha")
    gateway.jobs[JOB] = [{"id": JOB, "status": "IN_QUEUE"}]
    result = cli("status", "alpha", JOB, "--timeline")
    assert result.exit_code == 1
    assert "without a list `timeline`" in result.stderr


def test_retry(cli, gateway):
    gateway.add("alpha")
    gateway.jobs[JOB] = [{"id": JOB, "status": "FAILED"}]
    assert cli("retry", "alpha", JOB).stdout == f"{JOB}  IN_QUEUE\n"
    assert json.loads(cli("retry", "alpha", JOB, "--json").stdout) == {"id": JOB, "status": "IN_QUEUE"}
    refused = cli("retry", "alpha", "done", "--json")
    assert json.loads(refused.stderr) == {"error": "job cannot be retried in status COMPLETED"}
