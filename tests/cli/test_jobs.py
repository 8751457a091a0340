"""All jobs of an endpoint: `purge` and `jobs`."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    "arguments",
    [
        ["purge", "alpha"],
        ["jobs", "alpha", "--status", "DONE"],
        ["jobs", "alpha", "--limit", "0"],
    ],
)
def test_wrong_usage_ends_with_2(cli, gateway, arguments):
    gateway.add("alpha")
    assert cli(*arguments).exit_code == 2
    assert not [one for one in gateway.requests if one.method == "POST"]


def test_purge(cli, gateway):
    endpoint = gateway.add("alpha")
    assert json.loads(cli("purge", "alpha", "--yes", "--json").stdout) == {
        "removed": 3,
        "status": "completed",
    }
    assert cli("purge", "alpha", "-y").stderr == "removed 3 queued jobs of alpha\n"
    assert len(gateway.sent("POST", f"/v2/{endpoint['id']}/purge-queue")) == 2


def row(number):
    return {
        "id": f"{number:04d}-u1", "status": "COMPLETED", "createdAt": "2026-08-20T10:00:00.000Z",
        "delayTime": 812, "executionTime": 3391, "workerId": "w1", "retries": 0,
    }  # fmt: skip


def test_jobs_reads_as_many_pages_as_it_takes(cli, gateway):
    """serverless-api.md §2.15: at most 100 on a page."""
    endpoint = gateway.add("alpha")
    gateway.job_rows = [row(number) for number in range(250)]
    shown = json.loads(cli("jobs", "alpha", "--limit", "230", "--json").stdout)
    assert shown == gateway.job_rows[:230]
    pages = gateway.sent("GET", f"/v2/{endpoint['id']}/requests")
    assert [page.query["limit"] for page in pages] == ["100", "100", "30"]
    assert len(json.loads(cli("jobs", "alpha", "--limit", "1000", "--json").stdout)) == 250


def test_jobs_as_a_table(cli, gateway):
    endpoint = gateway.add("alpha")
    gateway.job_rows = [row(1)]
    out = cli("jobs", "alpha", "--status", "completed").stdout
    assert out.splitlines()[0].split() == [
        "JOB", "STATUS", "CREATED", "DELAY", "EXECUTION", "WORKER", "RETRIES",
    ]  # fmt: skip
    assert "812 ms" in out
    (page,) = gateway.sent("GET", f"/v2/{endpoint['id']}/requests")
    assert page.query["status"] == "COMPLETED"
    gateway.job_rows = []
    assert cli("jobs", "alpha").stderr == "this endpoint has no jobs\n"
