"""Operations on usage, requests and starts: functions of a transaction, called by `store`."""

from __future__ import annotations

from collections.abc import Sequence

from pilotlight.domain.usage import RequestRecord, StartRecord, UsageInterval
from pilotlight.stores import common, rows
from pilotlight.stores.postgresql.database import Transaction


async def add_usage(transaction: Transaction, intervals: Sequence[UsageInterval]) -> None:
    """Append intervals, skipping those already there."""
    if intervals:
        await transaction.run("insert_usage", *zip(*map(rows.usage_row, intervals), strict=True))


async def usage(
    transaction: Transaction, endpoint_id: str | None, worker_id: str | None, since_ms: int
) -> list[UsageInterval]:
    """Intervals that end after a moment, by the narrowest index there is."""
    if worker_id is not None:
        found = await transaction.rows("usage_of_worker", since_ms, worker_id)
    elif endpoint_id is not None:
        found = await transaction.rows("usage_of_endpoint", since_ms, endpoint_id)
    else:
        found = await transaction.rows("usage", since_ms)
    return [rows.usage_of(row) for row in found if endpoint_id in {None, row[2]}]


async def add_requests(transaction: Transaction, records: Sequence[RequestRecord]) -> None:
    """Append requests, skipping those already there."""
    if records:
        await transaction.run("insert_requests", *zip(*map(rows.request_row, records), strict=True))


async def requests(transaction: Transaction, endpoint_id: str | None, limit: int) -> list[RequestRecord]:
    """The newest requests."""
    if endpoint_id is None:
        found = await transaction.rows("requests", max(0, limit))
    else:
        found = await transaction.rows("requests_of_endpoint", endpoint_id, max(0, limit))
    return [rows.request_of(row) for row in found]


async def prune_requests(transaction: Transaction, keep: int) -> int:
    """Forget all but the newest requests."""
    return await transaction.run("prune_requests", max(0, keep))


async def put_start(transaction: Transaction, record: StartRecord) -> None:
    """Insert or replace one start, and drop what is far too old."""
    await transaction.run("put_start", *rows.start_row(record))
    await transaction.run("prune_starts", common.STARTS_KEPT)


async def starts(transaction: Transaction, endpoint_id: str | None, limit: int) -> list[StartRecord]:
    """The newest starts."""
    if endpoint_id is None:
        found = await transaction.rows("starts", max(0, limit))
    else:
        found = await transaction.rows("starts_of_endpoint", endpoint_id, max(0, limit))
    return [rows.start_of(row) for row in found]
