"""How long a start takes, learned from earlier ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.estimates import STARTS_KEPT, estimate_start_ms, remaining_ms


def test_nothing_is_known_before_the_first_start():
    assert estimate_start_ms([]) is None
    assert estimate_start_ms([1400]) == 1400


def test_an_odd_start_changes_little():
    """One waited ten minutes for a download."""
    assert estimate_start_ms([1400, 1500, 600_000, 1450, 1350]) == 1450


def test_only_the_last_starts_count():
    assert estimate_start_ms([25_000] * 100 + [1400] * STARTS_KEPT) == 1400


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=50))
def test_an_estimate_is_one_of_the_durations_seen_lately(durations):
    recent = durations[-STARTS_KEPT:]
    estimate = estimate_start_ms(durations)
    assert estimate in recent
    assert sum(each <= estimate for each in recent) * 2 >= len(recent)
    assert sum(each >= estimate for each in recent) * 2 >= len(recent)


@pytest.mark.parametrize(
    ("estimate_ms", "elapsed_ms", "remains_ms"),
    [(None, 0, None), (8000, 0, 8000), (8000, 1200, 6800), (8000, 8000, None), (8000, -5, 8000)],
)
def test_what_remains_is_unknown_once_the_estimate_is_refuted(estimate_ms, elapsed_ms, remains_ms):
    assert remaining_ms(estimate_ms, elapsed_ms) == remains_ms
