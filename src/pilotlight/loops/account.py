"""Usage intervals on their way to the store, kept until written: a full disk leaves no gap."""

from __future__ import annotations

import structlog

from pilotlight.domain.usage import UsageInterval
from pilotlight.domain.worker import Worker
from pilotlight.errors import StoreError
from pilotlight.loops.living import Living
from pilotlight.ports.store import UsageStore

_log = structlog.get_logger()


class UsageAccount:
    """Collects closed intervals and writes them; a failed write is repeated with the next one.

    Writing twice is harmless: the store knows an interval by worker and sequence. What is kept is bounded
    by the number of state changes while the store cannot write, plus one interval a minute and worker.

    Args:
        store: Where intervals go.
    """

    def __init__(self, store: UsageStore) -> None:
        self._store = store
        self._pending: list[UsageInterval] = []

    def close_interval(self, worker: Worker, sequence: int, start_ms: int, end_ms: int) -> None:
        """Note that the worker was in its present state from `start_ms` to `end_ms`."""
        self._pending.append(
            UsageInterval(
                worker_id=worker.id,
                sequence=sequence,
                endpoint_id=worker.endpoint_id,
                version=worker.version,
                state=worker.state,
                devices=len(worker.devices),
                start_ms=start_ms,
                end_ms=end_ms,
            )
        )

    def close(self, live: Living, now_ms: int) -> bool:
        """Close the running interval of a living worker; whether there was anything to close."""
        if now_ms <= live.metered_ms:
            return False
        live.usage_sequence += 1
        self.close_interval(live.worker, live.usage_sequence, live.metered_ms, now_ms)
        live.metered_ms = now_ms
        return True

    async def flush(self) -> None:
        """Write what is pending; what cannot be written stays pending."""
        batch = list(self._pending)
        if not batch:
            return
        try:
            await self._store.add_usage(batch)
        except StoreError as error:
            _log.warning("usage_not_written", intervals=len(batch), error=str(error))
            return
        self._pending = [interval for interval in self._pending if interval not in batch]
