"""How many pieces of a stream go into one item: the min-growth-max schedule of `vllm-worker.md` §2.1.

Pure. `outputs` feeds it one piece at a time; the sizes come from the request or from the environment (§2.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


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

    def add_piece(self) -> bool:
        """True when the piece just counted completes an item."""
        self._count += 1
        if self._count < self._size:
            return False
        self._count = 0
        if self._sizes.dynamic:
            self._size = min(self._size * self._sizes.growth, self._sizes.maximum)
        return True


def item_sizes(pieces: int, sizes: BatchSizes) -> Iterator[int]:
    """The sizes of the items that a stream of so many pieces is cut into, the last partial one included."""
    schedule = BatchSchedule(sizes)
    count = 0
    for _ in range(pieces):
        count += 1
        if schedule.add_piece():
            yield count
            count = 0
    if count:
        yield count
