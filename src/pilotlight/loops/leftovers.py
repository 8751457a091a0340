"""Ends and accounts for workers that an earlier life of ours left behind; called by the fleet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from pilotlight.domain.worker import Failure, Worker, WorkerState
from pilotlight.loops.account import UsageAccount
from pilotlight.ports.cluster import Cluster
from pilotlight.ports.store import UsageStore, WorkerStore


class _Store(WorkerStore, UsageStore, Protocol):
    """What it reads."""


async def end_leftovers(
    store: _Store,
    cluster: Cluster,
    account: UsageAccount,
    put: Callable[[Worker], Awaitable[None]],
    now_ms: Callable[[], int],
) -> int:
    """End every worker on record as living, and record its end; returns how many still ran.

    Args:
        store: Knows who was living.
        cluster: Ends processes.
        account: Takes the usage that was not yet written down.
        put: Records a worker.
        now_ms: The moment, asked when all have ended.
    """
    left = {worker.id: worker for worker in await store.workers()}
    swept = set(await cluster.sweep({worker.id: worker.process for worker in left.values()}))
    now = now_ms()
    for worker in left.values():
        known = await store.usage(worker_id=worker.id)
        # A resumed worker has intervals of its earlier life, before it was made anew.
        since = max((interval.end_ms for interval in known), default=0)
        since = max(since, worker.created_ms)
        # One that had ended by itself meanwhile is charged only for what is known of its life.
        until = now if worker.id in swept else max(since, min(now, worker.state_ms))
        ended = replace(
            worker,
            state=WorkerState.FAILED,
            failure=Failure(kind="orphaned", cause="the gateway ended without stopping this worker"),
            ended_ms=until,
            state_ms=until,
        )
        if until > since:
            sequence = max((interval.sequence for interval in known), default=0) + 1
            account.close_interval(worker, sequence, since, until)
        await put(ended)
    await account.flush()
    return len(swept)
