"""What the answers of a load-balancing worker to its health checks mean (serverless-api.md §3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

HEALTH_PATH_VARIABLE = "HEALTH_CHECK_PATH"
HEALTH_PATH_DEFAULT = "/ping"

PORT_VARIABLE = "PORT"
HEALTH_PORT_VARIABLE = "PORT_HEALTH"


class HealthVerdict(StrEnum):
    """What a worker's last check says."""

    ROUTABLE = "routable"
    INITIALIZING = "initializing"
    UNHEALTHY = "unhealthy"


def health_path(env: Mapping[str, str]) -> str:
    """The path that is polled, as the endpoint's environment names it."""
    return env.get(HEALTH_PATH_VARIABLE) or HEALTH_PATH_DEFAULT


def decide_health(status: int | None) -> HealthVerdict:
    """What an answer means; None is a refused connection, silence, or something that is not HTTP."""
    if status == 200:
        return HealthVerdict.ROUTABLE
    return HealthVerdict.INITIALIZING if status == 204 else HealthVerdict.UNHEALTHY


SILENCES_MAX = 3
"""Checks in a row that may go unanswered: a server of one thread answers nothing while it works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthHistory:
    """What the checks of one worker have shown so far.

    Attributes:
        verdict: As it counts now; None before the first check.
        silences: Checks in a row that nobody answered although the port is open, without work in hand.
        silent_ms: Since when nobody answers although the port is open; None while somebody does.
        unhealthy_ms: Since when it is unhealthy; None while it is not.
        not_routable_ms: Since when it was not routable, whatever it said meanwhile; None while it is.
    """

    verdict: HealthVerdict | None = None
    silences: int = 0
    silent_ms: int | None = None
    unhealthy_ms: int | None = None
    not_routable_ms: int | None = None


def note_check(
    history: HealthHistory, status: int | None, now_ms: int, *, silent: bool, busy: bool, patience_ms: int
) -> HealthHistory:
    """The history with one check more.

    A routable worker stays so while checks go unanswered: with requests in hand for as long as the longest of
    them may take, and for less than `SILENCES_MAX` checks without any. Every other answer counts at once.

    Args:
        history: Until now.
        status: HTTP status of the answer; None for none.
        now_ms: When the check ended.
        silent: Whether the port was open but nothing came in time.
        busy: Whether the worker has requests in hand.
        patience_ms: Longest silence of a worker with requests in hand.
    """
    verdict = decide_health(status)
    silences = history.silences + 1 if silent and not busy else 0
    silent_ms = _since(history.silent_ms, now_ms) if silent else None
    patient = silent_ms is not None and silences < SILENCES_MAX and now_ms - silent_ms < patience_ms
    if patient and history.verdict is HealthVerdict.ROUTABLE:
        return replace(history, silences=silences, silent_ms=silent_ms)
    routable, unhealthy = verdict is HealthVerdict.ROUTABLE, verdict is HealthVerdict.UNHEALTHY
    return HealthHistory(
        verdict=verdict,
        silences=silences,
        silent_ms=silent_ms,
        unhealthy_ms=_since(history.unhealthy_ms, now_ms) if unhealthy else None,
        not_routable_ms=None if routable else _since(history.not_routable_ms, now_ms),
    )


def _since(before_ms: int | None, now_ms: int) -> int:
    return now_ms if before_ms is None else before_ms
