"""Which launchers there shall be, when one comes again, and where there is no room."""

from __future__ import annotations

import pytest

from pilotlight.core.launchers import PAUSES_S, choose_launchers, decide_pause, explain_no_room


@pytest.mark.parametrize(
    ("wanted", "most", "chosen"),
    [
        ({}, 2, set()),
        ({"a": 1}, 2, {"a"}),
        ({"a": 1, "b": 7, "c": 3}, 2, {"b", "c"}),
        ({"a": 1, "b": 7, "c": 3}, 1, {"b"}),
    ],
)
def test_those_wanted_most_recently_are_chosen(wanted, most, chosen):
    assert choose_launchers(wanted, most) == chosen


def test_pauses_grow_and_then_it_is_given_up():
    pauses = [decide_pause(failures) for failures in range(1, len(PAUSES_S) + 2)]
    assert pauses == [*sorted(PAUSES_S), None]


def test_a_launcher_never_takes_the_place_of_a_worker():
    """0.6 GB for itself, 3 for a worker, 1 in reserve."""
    need = {"reserve_bytes": 10**9, "worker_bytes": 3 * 10**9}
    assert explain_no_room(4_600_000_000, **need) == ""
    assert "4.5 GB are available" in explain_no_room(4_500_000_000, **need)
