"""The header of worker affinity (serverless-api.md §3)."""

from __future__ import annotations

import pytest

from pilotlight.core.affinity import Affinity, Pin, parse_affinity


@pytest.mark.parametrize(
    ("value", "affinity"),
    [
        ("", None),
        ("   ", None),
        ("abc", Affinity("abc", Pin.PREFER)),
        ("strict abc", Affinity("abc", Pin.STRICT)),
        ("STRICT  abc", Affinity("abc", Pin.STRICT)),
        ("strict-resume abc", Affinity("abc", Pin.STRICT_RESUME)),
        ("strict", Affinity("strict", Pin.PREFER)),
        ("loose abc", None),
        ("a/b", None),
        ("x" * 65, None),
    ],
)
def test_the_header_is_read(value, affinity):
    assert parse_affinity(value) == affinity
