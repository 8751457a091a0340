"""The long crash campaigns: `make soak` runs them; `test_crash.py` and `test_job_crash.py` have the short ones.

`PILOTLIGHT_SOAK_PERCENT` is a share of the usual numbers in percent, for a shorter or longer night.
"""

from __future__ import annotations

import os
import random

import pytest

PERCENT = int(os.environ.get("PILOTLIGHT_SOAK_PERCENT", "100"))
SEED = int(os.environ.get("PILOTLIGHT_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)

pytestmark = pytest.mark.soak


def share(kills: int) -> int:
    return max(1, kills * PERCENT // 100)


def test_a_hundred_crashes_with_an_engine(crash_campaign):
    crash_campaign(kills=share(120), seed=SEED)


def test_five_hundred_crashes_of_the_queue_on_sqlite(job_campaign):
    job_campaign(kills=share(500), seed=SEED)


def test_a_hundred_crashes_of_gateway_and_server_on_postgresql(job_campaign):
    job_campaign(kills=share(130), server_kills=share(30), seed=SEED, on_postgresql=True)
