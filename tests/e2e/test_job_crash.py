"""The job queue under kill -9, the short version of the campaigns in test_soak_crash.py."""

from __future__ import annotations

import os
import random

import pytest

# Seconds on a quiet machine; every wait inside has a bound of its own.
pytestmark = pytest.mark.timeout(240)

SEED = int(os.environ.get("PILOTLIGHT_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)


def test_gateway_killed_on_sqlite(job_campaign) -> None:
    job_campaign(kills=8, seed=SEED)


def test_gateway_and_server_killed_on_postgresql(job_campaign) -> None:
    job_campaign(kills=3, server_kills=1, seed=SEED, on_postgresql=True)
