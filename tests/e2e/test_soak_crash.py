"""The long crash campaign: `make soak` runs it; `test_crash.py` has the short version."""

from __future__ import annotations

import os
import random

import pytest

KILLS = int(os.environ.get("PILOTLIGHT_SOAK_KILLS", "120"))


@pytest.mark.soak
def test_a_hundred_crashes(crash_campaign):
    seed = int(os.environ.get("PILOTLIGHT_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)
    crash_campaign(kills=KILLS, seed=seed)
