"""An engine that runs few requests at a time gets few: the others wait at the gateway, and all are answered."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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
    with ThreadPoolExecutor(2 * REQUESTS) as threads:
        answers = [threads.submit(served.call, "/v1/completions", LONG) for _ in range(REQUESTS)]
        until(lambda: slots()["capacity"] <= AT_A_TIME + 3)
        # What it had when it said so stays there; these come when there is room.
        answers += [threads.submit(served.call, "/v1/completions", LONG) for _ in range(AT_A_TIME)]
        until(lambda: 0 < slots()["occupied"] <= AT_A_TIME + 3)
        statuses = [answer.result().status_code for answer in answers]
    assert statuses == [200] * (REQUESTS + AT_A_TIME)
