"""What the answers of a load-balancing worker to its health checks mean (serverless-api.md §3)."""

from __future__ import annotations

import pytest

from pilotlight.core.health_check import HealthHistory, HealthVerdict, health_path, note_check

ROUTABLE, INITIALIZING, UNHEALTHY = HealthVerdict


def fold(checks, *, busy=False, patience_ms=1000):
    """The verdicts after each of these checks: a status, None for a refusal, "silent" for no answer."""
    history, verdicts = HealthHistory(), []
    for number, check in enumerate(checks):
        status, silent = (None, True) if check == "silent" else (check, False)
        history = note_check(history, status, number, silent=silent, busy=busy, patience_ms=patience_ms)
        verdicts.append(history.verdict)
    return verdicts, history


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (200, ROUTABLE),
        (204, INITIALIZING),
        (503, UNHEALTHY),
        (404, UNHEALTHY),
        (302, UNHEALTHY),
        (None, UNHEALTHY),
    ],
)
def test_what_an_answer_means(status, verdict):
    assert fold([200, status])[0] == [ROUTABLE, verdict]


def test_a_routable_worker_may_be_silent_for_two_checks():
    assert fold([200, "silent", "silent", "silent"])[0] == [ROUTABLE, ROUTABLE, ROUTABLE, UNHEALTHY]
    assert fold([200, "silent", "silent", 200, "silent", "silent"])[0][-1] is ROUTABLE


def test_a_busy_worker_may_be_silent_as_long_as_a_request_may_take():
    assert fold([200, *["silent"] * 50], busy=True)[0][-1] is ROUTABLE
    verdicts, history = fold([200, *["silent"] * 12], busy=True, patience_ms=10)
    assert verdicts[10:] == [ROUTABLE, UNHEALTHY, UNHEALTHY]
    assert history.unhealthy_ms == 11
    assert fold([200, *["silent"] * 8, 200, *["silent"] * 8], busy=True, patience_ms=10)[0][-1] is ROUTABLE


def test_a_worker_that_never_answered_is_not_routable():
    assert fold(["silent"])[0] == [UNHEALTHY]


def test_times_count_from_the_first_check_of_a_kind():
    assert fold([200, 500, 500, None])[1].unhealthy_ms == 1
    assert fold([500, 200, 500])[1].unhealthy_ms == 2
    history = fold([204, 204, 204])[1]
    assert (history.not_routable_ms, history.unhealthy_ms) == (0, None)
    history = fold([200, 204, 503, 204, 503, 204])[1]
    assert history.not_routable_ms == 1, "only a 200 ends it"
    assert fold([204, 200])[1].not_routable_ms is None


def test_the_path_is_ping_unless_the_endpoint_names_another():
    assert health_path({}) == "/ping"
    assert health_path({"HEALTH_CHECK_PATH": "/up"}) == "/up"
