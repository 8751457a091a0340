"""The soak of the data path (`make soak`): a quarter of an hour; test_mixed_load.py has the short version.

`PILOTLIGHT_SOAK_SECONDS` says how long; without it `PILOTLIGHT_SOAK_PERCENT` is a share of the usual in percent.
One line of JSON tells what happened.
"""

from __future__ import annotations

import os

import pytest

PERCENT = int(os.environ.get("PILOTLIGHT_SOAK_PERCENT", "100"))
SECONDS = float(os.environ.get("PILOTLIGHT_SOAK_SECONDS", 900 * PERCENT / 100))

pytestmark = pytest.mark.soak


def test_a_quarter_of_an_hour_of_mixed_load(mixed_load):
    mixed_load(seconds=SECONDS)
