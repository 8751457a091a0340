"""Fills the queue of an endpoint of an installation that is not running, by its own store.

`python -m pilotlight.bench.harness.fill HOME ENDPOINT COUNT`. Nothing is durable until the end, which makes
it several times as fast; the database is the same. By HTTP it would take minutes.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from pilotlight.bench.harness.job_clients import payload
from pilotlight.domain.ids import job_id
from pilotlight.domain.job import Job
from pilotlight.stores.sqlite import open_sqlite_store

_GROUP = 2000
_TTL_MS = 86_400_000


async def main(home: Path, endpoint_id: str, count: int) -> None:
    """Return when there are so many more jobs in the queue."""
    job_input = payload().removeprefix(b'{"input":').removesuffix(b"}")
    store = await open_sqlite_store(home, synchronous="NORMAL")
    try:
        for done in range(0, count, _GROUP):
            now_ms = time.time_ns() // 1_000_000
            jobs = [
                Job(
                    id=job_id(os.urandom(16), sync=False, created_ms=now_ms),
                    endpoint_id=endpoint_id,
                    key_id="bench",
                    input=job_input,
                    input_bytes=len(job_input),
                    created_ms=now_ms,
                    queued_ms=now_ms,
                    expires_ms=now_ms + _TTL_MS,
                    execution_timeout_ms=600_000,
                    retention_ms=1_800_000,
                )
                for _ in range(min(_GROUP, count - done))
            ]
            await asyncio.gather(*map(store.submit, jobs))
    finally:
        await store.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
