"""Which worker serves a request: policies as functions of what is known of the workers.

Candidates come oldest first, have a free slot each, and are anything with the attributes of `Candidate`. The
gateway holds what the policies look at from request to request (`gateway.router`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from pilotlight.core.prefix_index import BOUNDARIES, Look

SAMPLE_FROM = 16
"""With so many workers or more, two drawn at random are compared instead of all (Mitzenmacher, The Power of
Two Choices in Randomized Load Balancing, 2001): nearly as even, at a price that does not grow."""

SESSION_FACTOR = 1.25
"""A session's worker may have so many times the mean load (Mirrokni, Thorup and Zadimoghaddam, Consistent
Hashing with Bounded Loads, 2016)."""

SLACK = 8
"""Few requests are no load: differences of so many do not count for much, or a session would move at the
second request."""

LOAD_WEIGHT = 0.8
FRESH_WEIGHT, FRESH_MAX = 8.0, 0.5
RECENT_WEIGHT = 0.25
ADAPTER_WEIGHT = 0.25
"""What counts beside the part of a prompt that a worker has to read, which is 0 to 1; `pick_by_prefix` says
how. Found by simulating two and four engines that keep half of all prompts or more (groups with a beginning
of their own, conversations, one beginning for all; 4 to 24 requests at a time): as many hits as with one home
per group whatever the load, and more where beginnings nest, with a quarter of the unevenness."""


class Candidate(Protocol):
    """A ready worker with a free slot."""

    @property
    def worker_id(self) -> str:
        """Who."""
        ...

    @property
    def occupied(self) -> int:
        """Slots in use."""
        ...

    @property
    def capacity(self) -> int:
        """Slots in all."""
        ...


C = TypeVar("C", bound=Candidate)


def pick_least_loaded(candidates: Sequence[C], draw: float | None = None) -> C:
    """The worker with the smallest share of its slots in use, or the better of two where there are many.

    Equal shares go to the older worker, so that load gathers on few workers and the others can become idle
    and end.

    Args:
        candidates: At least one.
        draw: A random number, 0 <= draw < 1, looked at only with `SAMPLE_FROM` candidates or more; with None
            all are compared.
    """
    count = len(candidates)
    if draw is not None and count >= SAMPLE_FROM:
        first, second = divmod(int(draw * count * (count - 1)), count - 1)
        second += second >= first
        candidates = [candidates[min(first, second)], candidates[max(first, second)]]
    return min(candidates, key=_share)


def pick_by_session(candidates: Sequence[C], session: str) -> C:
    """The worker that a session is at home with, or its next choice while that is far busier than others.

    Rendezvous hashing: every session ranks all workers in an order of its own, so a worker that comes or
    goes moves only the sessions that it gets or had.

    Args:
        candidates: At least one.
        session: What its requests have in common.
    """
    least = min(candidate.occupied for candidate in candidates) + SLACK
    total = sum(candidate.occupied for candidate in candidates) + 1
    share = SESSION_FACTOR * total / sum(candidate.capacity for candidate in candidates)
    within = [one for one in candidates if one.occupied < least or one.occupied < share * one.capacity]
    return max(within, key=lambda candidate: _rank(candidate.worker_id, session))


def pick_by_prefix(candidates: Sequence[C], looks: Sequence[Look], blocks: int, *, gather: bool) -> C:
    """The worker for which a prompt is cheapest.

    That is, the sum of

    * the share of the prompt that it has to read, as it does not know it;
    * how much busier it is than the mean: what one worker knows and others do not goes there although that
      has more to do, until it has about twice the mean;
    * for what it has to read, how much more than the others it got to read lately, so that the caches of all
      workers add up to one;
    * a bonus for the one that had the same beginning last, so that small differences in load do not copy it;
    * an extra for an adapter that would have to be loaded.

    Args:
        candidates: At least one.
        looks: What is known of each.
        blocks: How many blocks the prompt has; two at least, as the first is its model.
        gather: Whether idle workers should stay idle, so that they can end: while all are idle only what they
            know counts.
    """
    gather = gather and not any(candidate.occupied for candidate in candidates)
    count, length = len(candidates), BOUNDARIES[blocks - 1]
    shares = [_share(candidate) for candidate in candidates]
    mean = sum(shares) / count
    slack = SLACK * count / sum(candidate.capacity for candidate in candidates)
    fresh = sum(look.fresh for look in looks) or 1
    recent = max(range(count), key=lambda number: looks[number][:2])
    best, lowest = 0, math.inf
    for number, (share, look) in enumerate(zip(shares, looks, strict=True)):
        known = BOUNDARIES[look.known - 1] if look.known else 0
        cost = unknown = 1 - known / length
        if not gather:
            uneven = FRESH_WEIGHT * (look.fresh / fresh - 1 / count)
            cost += unknown * max(-FRESH_MAX, min(uneven, FRESH_MAX))
            cost += LOAD_WEIGHT * (share - mean) / (mean + slack)
            if number == recent and known:
                cost -= RECENT_WEIGHT
            # One that was sent nothing has no adapter, but is no worse than others: it would never get any.
            if not look.known and not look.empty:
                cost += ADAPTER_WEIGHT
        if cost < lowest:
            best, lowest = number, cost
    return candidates[best]


def _share(candidate: Candidate) -> float:
    return candidate.occupied / candidate.capacity


def _rank(worker_id: str, session: str) -> bytes:
    return hashlib.blake2b(f"{worker_id}\0{session}".encode("utf-8", "replace"), digest_size=8).digest()
