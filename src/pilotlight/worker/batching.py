"""How many pieces of a stream go into one item: the min-growth-max schedule of `vllm-worker.md` §2.1.

Pure. `outputs` feeds it one piece at a time; the sizes come from the request or from the environment (§2.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pilotlight.worker.fields import read_number

_REQUEST_KEYS: Final = ("max_batch_size", "batch_size", "min_batch_size", "batch_size_growth_factor")


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The three numbers of the schedule, in pieces.

    Attributes:
        maximum: Largest item.
        minimum: First item.
        growth: Factor from one item to the next; ≤ 1 means that every item has the maximum size.
    """

    maximum: int = 50
    minimum: int = 1
    growth: float = 3.0

    @property
    def dynamic(self) -> bool:
        """Whether items grow at all."""
        return self.growth > 1 and self.minimum >= 1 and self.maximum > self.minimum


EVERY_EVENT = BatchSizes(1, 1, 1.0)
"""One piece per item, for streams that are forwarded live."""


class BatchSchedule:
    """Counts the pieces of one request and says after which of them an item is due.

    The size may become fractional; comparing with `>=` makes it an effective ceiling (§2.1).
    """

    __slots__ = ("_count", "_size", "_sizes")

    def __init__(self, sizes: BatchSizes) -> None:
        self._sizes = sizes
        self._size: float = sizes.minimum if sizes.dynamic else sizes.maximum
        self._count = 0

    @property
    def pending(self) -> int:
        """Pieces counted since the last item."""
        return self._count

    def cut(self) -> None:
        """Ends an item early, which leaves the size of the next one as it was to be."""
        self._count = 0

    def add_piece(self) -> bool:
        """True when the piece just counted completes an item."""
        self._count += 1
        if self._count < self._size:
            return False
        self._count = 0
        if self._sizes.dynamic:
            self._size = min(self._size * self._sizes.growth, self._sizes.maximum)
        return True


def batch_sizes(job_input: Mapping[str, Any], default: BatchSizes) -> BatchSizes:
    """The sizes a job asks for; where it names none, or zero, the worker's (§1.2, §2.3).

    Raises:
        InputError: A size is negative or no number.
    """
    maximum = read_number(job_input, "max_batch_size") or read_number(job_input, "batch_size")
    minimum = read_number(job_input, "min_batch_size")
    growth = read_number(job_input, "batch_size_growth_factor")
    return BatchSizes(
        max(1, int(maximum)) if maximum else default.maximum,
        max(1, int(minimum)) if minimum else default.minimum,
        growth or default.growth,
    )


def names_batch_sizes(job_input: Mapping[str, Any]) -> bool:
    """Whether a job asks for sizes of its own at all."""
    return any(job_input.get(key) for key in _REQUEST_KEYS)
