"""Zero → one → zero → one workers with the real engine: held, served, idle, gone, served again."""

from __future__ import annotations

import itertools
import time

import pytest

from pilotlight.clusters.processes import find_processes

from .waking import ANSWER, QUESTION, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

IDLE_S = 2


def test_zero_one_zero_one(live):
    endpoint = live.deploy("pilotlight/ember", "ember", idle_timeout_s=IDLE_S, flashboot=False)
    path = f"/v2/serverless/{endpoint['id']}/workers"

    def summary():
        return live.api.get(path).json()["summary"]

    served = []
    for _ in range(2):
        assert summary()["total"] == 0
        answer = live.api.post(f"/v2/{endpoint['id']}/openai/v1/chat/completions", json=QUESTION)
        answered = time.monotonic()
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == ANSWER
        (worker,) = live.api.get(path).json()["workers"]
        served.append(worker["id"])
        running = find_processes({worker["id"]: None})[worker["id"]]
        assert len(running) >= 3, "worker program, API server, engine core"
        until(lambda name=worker["id"]: not find_processes({name: None}).get(name), timeout_s=120)
        assert time.monotonic() - answered >= IDLE_S
        _check_account(live, endpoint["id"], worker["id"])
    assert served[0] != served[1]


def _check_account(installation, endpoint_id, worker_id):
    """Usage touches and covers the worker's life, from the decision to start it to its last process."""

    def intervals():
        usage = installation.api.get(f"/pilotlight/v1/usage?endpoint={endpoint_id}").json()["intervals"]
        return [interval for interval in usage if interval["worker_id"] == worker_id]

    until(lambda: intervals()[-1]["state"] == "stopping", timeout_s=120)
    mine = intervals()
    assert mine[0]["state"] == "starting"
    assert all(a["end_ms"] == b["start_ms"] for a, b in itertools.pairwise(mine))
    starts = installation.api.get(f"/pilotlight/v1/endpoints/{endpoint_id}/starts").json()["starts"]
    (start,) = [start for start in starts if start["worker_id"] == worker_id]
    assert start["outcome"] == "ready"
    assert start["stages"][0]["at_ms"] == mine[0]["start_ms"]
    life_ms = mine[-1]["end_ms"] - mine[0]["start_ms"]
    assert sum(each["duration_ms"] for each in mine) == life_ms
    ready = sum(each["duration_ms"] for each in mine if each["state"] == "ready")
    assert ready >= IDLE_S * 1000
