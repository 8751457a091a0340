"""The in-memory twin of the stores: the same contract in plain dictionaries, nothing on disk.

Used by tests, by the simulator, and as the readable statement of what the SQL of the others must do.
No method awaits anything, so each is atomic on the event loop and cannot be cancelled half-way. The
counters of the queue are counted from the jobs themselves, as a check on stores that keep them. `queue`
holds jobs and batches, `webhooks` their deliveries, `records` everything else.
"""

from __future__ import annotations

from collections.abc import Callable

from pilotlight.ports.store import StoreListener
from pilotlight.stores.memory.queue import MemoryQueue

__all__ = ["MemoryStore"]


class MemoryStore(MemoryQueue):
    """A `Store` that forgets everything with the process."""

    def listen(self, listener: StoreListener) -> None:
        """See `Store.listen`: there are no others who could change anything."""

    async def lead(self, lost: Callable[[], None]) -> bool:  # noqa: ARG002 - nobody takes it away
        """See `Store.lead`."""
        self._check_open()
        return True
