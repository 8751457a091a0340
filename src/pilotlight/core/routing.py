"""Which worker serves a request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ready worker.

    Attributes:
        worker_id: Who.
        occupied: Slots in use.
        capacity: Slots in all.
    """

    worker_id: str
    occupied: int
    capacity: int


def pick_worker(candidates: Iterable[Candidate]) -> str | None:
    """The worker with the smallest share of its slots in use; the first of equals; None when all are full.

    Equal shares go to the earlier candidate (the older worker), so that load gathers on few workers
    and the others can become idle and end.
    """
    best: str | None = None
    best_share = 1.0
    for candidate in candidates:
        if candidate.occupied >= candidate.capacity:
            continue
        share = candidate.occupied / candidate.capacity
        if best is None or share < best_share:
            best, best_share = candidate.worker_id, share
    return best
