"""All that a data path may meet, for a moment; test_soak_mixed_load.py goes on for a quarter of an hour."""

from __future__ import annotations

import pytest


@pytest.mark.timeout(240)
def test_mixed_load_for_a_moment(mixed_load):
    mixed_load(seconds=15, clients=16)
