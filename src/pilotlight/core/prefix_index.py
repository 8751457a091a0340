"""Which worker probably still has the beginning of a prompt in its prefix cache.

An approximation from what was sent where: no worker is asked. A prompt is known here by hashes of its
beginnings (`BOUNDARIES`), each of which stands for everything before it, so that two prompts share a
beginning exactly as far as their hashes agree; a tree of prompts becomes a set of hashes. The gateway makes
the hashes (`gateway.prefix`), `core.routing` decides by what is known.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

_EVEN, _DOUBLINGS = 2048, 5

BOUNDARIES: tuple[int, ...] = (
    *range(0, _EVEN + 1, 256),
    *(
        start + start * quarter // 4
        for start in (_EVEN << doubling for doubling in range(_DOUBLINGS))
        for quarter in (1, 2, 3, 4)
    ),
)
"""Lengths in bytes of the beginnings that are hashed: every 256 bytes at first, then four times per doubling,
up to 64 KiB. The deeper two prompts agree, the less it matters where exactly they part. The first, of no
bytes, stands for the model alone: a LoRA adapter has blocks of its own."""

WORKER_BLOCKS_MAX = 8192
"""Hashes remembered per worker, the least recently used forgotten first: some 2 MiB of text, or half a
million tokens, in 1.5 MB of memory. What an engine keeps is of that order; it is not asked."""


LATELY = 256
"""Blocks per worker over which it is counted who got new ones lately: 9 to 130 prompts. The fewer, the sooner
what one got more is made up for."""

_HEAD_START = 128
"""So many blocks fewer than the others a new worker has got: a reason to give it work, and soon made up."""


class Look(NamedTuple):
    """What is known of a prompt and a worker.

    Attributes:
        known: How many of the prompt's blocks, from the first on, the worker was sent before.
        turn: When the last of these was sent, as a number that grows with every prompt; 0 for never.
        fresh: Blocks new to it that it was sent lately.
        empty: Whether it was sent nothing yet.
    """

    known: int
    turn: int
    fresh: int
    empty: bool


class PrefixIndex:
    """What was sent to the workers of one endpoint lately.

    A block is never remembered longer than the block before it, so how far a prompt is known can be found
    by halving.

    Args:
        blocks_max: Bound per worker.
    """

    __slots__ = ("_blocks_max", "_fresh", "_turn", "_workers")

    def __init__(self, blocks_max: int = WORKER_BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._turn = 0
        self._workers: dict[str, OrderedDict[int, int]] = {}
        self._fresh: dict[str, int] = {}

    def look(self, worker_id: str, blocks: Sequence[int]) -> Look:
        """What is known of a prompt and a worker.

        Args:
            worker_id: Whom.
            blocks: The prompt's hashes.
        """
        held = self._workers.get(worker_id)
        if held is None:
            return Look(0, 0, self._fresh_of_new(), empty=True)
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high + 1) // 2
            if blocks[middle - 1] in held:
                low = middle
            else:
                high = middle - 1
        return Look(low, held[blocks[low - 1]] if low else 0, self._fresh[worker_id], empty=False)

    def note(self, worker_id: str, blocks: Sequence[int]) -> None:
        """A prompt is sent to a worker."""
        held = self._workers.get(worker_id)
        if held is None:
            self._fresh[worker_id] = self._fresh_of_new()
            held = self._workers[worker_id] = OrderedDict()
        self._turn += 1
        before = len(held)
        # The last block first, so that a block is always older than the one before it.
        for block in reversed(blocks):
            held[block] = self._turn
            held.move_to_end(block)
        self._fresh[worker_id] += len(held) - before
        if sum(self._fresh.values()) > LATELY * len(self._fresh):
            self._fresh = {worker: count // 2 for worker, count in self._fresh.items()}
        while len(held) > self._blocks_max:
            held.popitem(last=False)

    def forget(self, worker_id: str) -> None:
        """A worker ended, or lost its cache."""
        self._workers.pop(worker_id, None)
        self._fresh.pop(worker_id, None)

    def _fresh_of_new(self) -> int:
        return max(0, min(self._fresh.values(), default=0) - _HEAD_START)
