"""Operations on usage and starts: functions of a transaction, called by `store`."""

from __future__ import annotations

from collections.abc import Sequence

from pilotlight.domain.usage import StartRecord, UsageInterval
from pilotlight.stores import common, rows
from pilotlight.stores.sqlite.threads import Transaction


def add_usage(transaction: Transaction, intervals: Sequence[UsageInterval]) -> None:
    """Append intervals, skipping those already there."""
    transaction.executemany("insert_usage", [rows.usage_row(interval) for interval in intervals])


def usage(
    transaction: Transaction, endpoint_id: str | None, worker_id: str | None, since_ms: int
) -> list[UsageInterval]:
    """Intervals that end after a moment, by the narrowest index there is."""
    if worker_id is not None:
        found = transaction.execute("usage_of_worker", (since_ms, worker_id))
    elif endpoint_id is not None:
        found = transaction.execute("usage_of_endpoint", (since_ms, endpoint_id))
    else:
        found = transaction.execute("usage", (since_ms,))
    intervals = (rows.usage_of(row) for row in found)
    return [interval for interval in intervals if endpoint_id in {None, interval.endpoint_id}]


def put_start(transaction: Transaction, record: StartRecord) -> None:
    """Insert or replace one start, and drop what is far too old."""
    transaction.execute("put_start", rows.start_row(record))
    transaction.execute("prune_starts", (common.STARTS_KEPT,))


def starts(transaction: Transaction, endpoint_id: str | None, limit: int) -> list[StartRecord]:
    """The newest starts."""
    if endpoint_id is None:
        found = transaction.execute("starts", (max(0, limit),))
    else:
        found = transaction.execute("starts_of_endpoint", (endpoint_id, max(0, limit)))
    return [rows.start_of(row) for row in found]
