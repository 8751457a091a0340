"""Which worker a request of a load-balancing endpoint asks for (serverless-api.md §3, worker affinity)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

HEADER = "x-runpod-worker-id"
"""Carries the worker's id in every answer, and a pin in a request."""

_WORKER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Pin(StrEnum):
    """How firmly a request asks for its worker."""

    PREFER = "prefer"
    STRICT = "strict"
    STRICT_RESUME = "strict-resume"


@dataclass(frozen=True, slots=True)
class Affinity:
    """A worker that is asked for.

    Attributes:
        worker_id: Its id; it need not exist.
        pin: What to do when it has no room or is gone.
    """

    worker_id: str
    pin: Pin


def parse_affinity(value: str) -> Affinity | None:
    """The worker that a header asks for; None for no preference, which is what an unreadable value is."""
    words = value.split()
    pin = Pin.PREFER
    if len(words) == 2 and words[0].lower() in {Pin.STRICT, Pin.STRICT_RESUME}:
        pin = Pin(words.pop(0).lower())
    if len(words) != 1 or _WORKER_ID.fullmatch(words[0]) is None:
        return None
    return Affinity(words[0], pin)
