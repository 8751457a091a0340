"""How long a start will take, learned from earlier ones on the same rung of the warm ladder."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_high

STARTS_KEPT = 20
"""Starts that an estimate looks back on: enough to shrug off an odd one, few enough to follow a change."""


def estimate_start_ms(durations: Sequence[int]) -> int | None:
    """How long a start probably takes, in ms; None when there is nothing to learn from.

    The median of the last starts: one that waited for a download, or was slow on a busy host, does not count
    for more than it is worth.

    Args:
        durations: How long starts of one rung took from decision to ready, in ms, oldest first.
    """
    recent = durations[-STARTS_KEPT:]
    return median_high(recent) if recent else None


def remaining_ms(estimate_ms: int | None, elapsed_ms: int) -> int | None:
    """How long a start under way probably still takes, in ms; None when that is not known.

    Args:
        estimate_ms: How long such a start takes; None when nobody knows.
        elapsed_ms: Since when it is under way. One that has taken as long as the estimate has refuted it:
            how much longer it takes is not known.
    """
    if estimate_ms is None or elapsed_ms >= estimate_ms:
        return None
    return estimate_ms - max(0, elapsed_ms)
