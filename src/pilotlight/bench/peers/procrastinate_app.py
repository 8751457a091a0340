"""procrastinate with PostgreSQL: `POSTGRESQL_URL=… python procrastinate_app.py SECONDS WINDOW` is the client.

It stores no results; what the client reads is the state of each job.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import deque
from typing import Any

from procrastinate import App, PsycopgConnector  # type: ignore[import-not-found]
from window import WARM_UP, report  # type: ignore[import-not-found]

app = App(connector=PsycopgConnector(conninfo=os.environ["POSTGRESQL_URL"], max_size=40))

_CLIENTS = 16
_AGAIN_S = 0.005


@app.task(name="noop")  # type: ignore[untyped-decorator]
async def noop(payload: dict[str, Any]) -> int:
    """Do nothing."""
    return int(payload["t"])


async def _submit() -> int:
    job_id: int = await noop.defer_async(payload={"t": 1, "pad": "x" * 60})
    return job_id


async def _read(job_id: int) -> None:
    while (status := await app.job_manager.get_job_status_async(job_id)).value in {"todo", "doing"}:  # noqa: ASYNC110 - another process changes it
        await asyncio.sleep(_AGAIN_S)
    if status.value != "succeeded":
        raise SystemExit(f"job {job_id} is {status.value}")


async def _client(until: float, window: int) -> int:
    pending: deque[int] = deque()
    jobs = 0
    while time.perf_counter() < until:
        if len(pending) < window:
            pending.append(await _submit())
        else:
            await _read(pending.popleft())
            jobs += time.perf_counter() < until
    for job_id in pending:
        await _read(job_id)
    return jobs


async def main(seconds: float, window: int) -> None:
    """Print how many jobs per second were submitted and seen to have succeeded."""
    async with app.open_async():
        for job_id in [await _submit() for _ in range(WARM_UP)]:
            await _read(job_id)
        until = time.perf_counter() + seconds
        clients = [_client(until, max(1, window // _CLIENTS)) for _ in range(_CLIENTS)]
        report(sum(await asyncio.gather(*clients)), seconds)


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), int(sys.argv[2])))
