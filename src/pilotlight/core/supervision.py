"""Whether an endpoint whose workers keep failing may start another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CRASH_WINDOW_MS = 600_000
CRASHES_MAX = 5
"""Five crashes in ten minutes pause an endpoint (serverless-api.md §5.4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackoffSettings:
    """When to pause, and for how long.

    Attributes:
        start_failures_max: Consecutive failed starts that are tolerated without a pause.
        backoff_ms: First pause.
        backoff_max_ms: Longest pause.
    """

    start_failures_max: int
    backoff_ms: int
    backoff_max_ms: int


def decide_retry_at(
    start_failures: int, crashes_ms: Sequence[int], last_failure_ms: int, settings: BackoffSettings
) -> int | None:
    """Until when no worker may be started, or None when one may be started now.

    The pause begins with the failure that fills the measure and doubles with each further one.

    Args:
        start_failures: Consecutive starts that failed, none having become ready since.
        crashes_ms: Moments at which ready workers of the endpoint died by themselves, ascending.
        last_failure_ms: Moment of the last failure of either kind.
        settings: Measures and pauses.
    """
    recent = sum(moment > last_failure_ms - CRASH_WINDOW_MS for moment in crashes_ms)
    excess = max(start_failures - settings.start_failures_max, recent - CRASHES_MAX)
    if excess < 0:
        return None
    pause = min(settings.backoff_ms << min(excess, 32), settings.backoff_max_ms)
    return last_failure_ms + pause
