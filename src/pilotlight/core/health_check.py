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
        silences: Checks in a row that nobody answered although the port is open.
        unhealthy_ms: Since when it is unhealthy; None while it is not.
        initializing_ms: Since when it says that it is initializing; None while it does not.
    """

    verdict: HealthVerdict | None = None
    silences: int = 0
    unhealthy_ms: int | None = None
    initializing_ms: int | None = None


def note_check(
    history: HealthHistory, status: int | None, now_ms: int, *, silent: bool, busy: bool
) -> HealthHistory:
    """The history with one check more.

    A routable worker stays so while a check goes unanswered, for as long as it has requests in hand, and for
    `SILENCES_MAX` checks without any; every other answer counts at once.

    Args:
        history: Until now.
        status: HTTP status of the answer; None for none.
        now_ms: When the check ended.
        silent: Whether the port was open but nothing came in time.
        busy: Whether the worker has requests in hand.
    """
    verdict = decide_health(status)
    silences = history.silences + 1 if silent and not busy else 0
    if silent and history.verdict is HealthVerdict.ROUTABLE and silences < SILENCES_MAX:
        return replace(history, silences=silences)
    unhealthy = verdict is HealthVerdict.UNHEALTHY
    initializing = verdict is HealthVerdict.INITIALIZING
    return HealthHistory(
        verdict=verdict,
        silences=silences,
        unhealthy_ms=(now_ms if history.unhealthy_ms is None else history.unhealthy_ms)
        if unhealthy
        else None,
        initializing_ms=(
            (now_ms if history.initializing_ms is None else history.initializing_ms) if initializing else None
        ),
    )
