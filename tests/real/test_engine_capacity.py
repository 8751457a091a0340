"""An engine that runs few requests at a time gets few: the others wait at the gateway, and all are answered."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from .waking import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

AT_A_TIME = 4
REQUESTS = 16
LONG = {"prompt": "one two", "max_tokens": 500, "ignore_eos": True}


def test_an_engine_is_given_about_as_much_as_it_runs(serve):
    """It says that it runs 4 and that 12 wait, of 30 that it was promised for."""
    served = serve("pilotlight/ember", "few-at-a-time", MAX_NUM_SEQS=str(AT_A_TIME))

    def slots():
        (worker,) = served.api.get(f"/v2/serverless/{served.endpoint['id']}/workers").json()["workers"]
        return worker

    assert slots()["capacity"] == 30
    seen = Event()

    def keep_asking():
        statuses = []
        while not seen.is_set():
            statuses.append(served.call("/v1/completions", LONG).status_code)
        return statuses

    with ThreadPoolExecutor(REQUESTS) as threads:
        asking = [threads.submit(keep_asking) for _ in range(REQUESTS)]
        try:
            until(lambda: slots()["capacity"] <= AT_A_TIME + 3, timeout_s=200)
            # What it had when it said so stays there until it ends.
            until(lambda: 0 < slots()["occupied"] <= AT_A_TIME + 3, timeout_s=200)
        finally:
            seen.set()
        statuses = {status for each in asking for status in each.result()}
    assert statuses == {200}
