"""Operations on usage, requests and starts: functions of a transaction, called by `store`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pilotlight.domain.usage import Outcome, RequestRecord, Road, StartRecord, UsageInterval
from pilotlight.domain.worker import WorkerState
from pilotlight.stores import common
from pilotlight.stores.sqlite.threads import Transaction


def add_usage(transaction: Transaction, intervals: Sequence[UsageInterval]) -> None:
    """Append intervals, skipping those already there."""
    transaction.executemany(
        "insert_usage",
        [
            (
                interval.worker_id,
                interval.sequence,
                interval.endpoint_id,
                interval.version,
                interval.state.value,
                interval.devices,
                interval.start_ms,
                interval.end_ms,
            )
            for interval in intervals
        ],
    )


def usage(
    transaction: Transaction, endpoint_id: str | None, worker_id: str | None, since_ms: int
) -> list[UsageInterval]:
    """Intervals that end after a moment, by the narrowest index there is."""
    if worker_id is not None:
        rows = transaction.execute("usage_of_worker", (since_ms, worker_id))
    elif endpoint_id is not None:
        rows = transaction.execute("usage_of_endpoint", (since_ms, endpoint_id))
    else:
        rows = transaction.execute("usage", (since_ms,))
    return [
        UsageInterval(
            worker_id=row[0],
            sequence=row[1],
            endpoint_id=row[2],
            version=row[3],
            state=WorkerState(row[4]),
            devices=row[5],
            start_ms=row[6],
            end_ms=row[7],
        )
        for row in rows
        if endpoint_id in {None, row[2]}
    ]


def add_requests(transaction: Transaction, records: Sequence[RequestRecord]) -> None:
    """Append requests, skipping those already there."""
    transaction.executemany(
        "insert_request",
        [
            (
                record.id,
                record.road.value,
                record.endpoint_id,
                record.key_id,
                record.worker_id,
                record.route,
                record.status,
                record.outcome.value,
                record.arrival_ms,
                record.wait_ms,
                record.first_token_ms,
                record.duration_ms,
                record.tokens_in,
                record.tokens_out,
                record.estimated,
            )
            for record in records
        ],
    )


def requests(transaction: Transaction, endpoint_id: str | None, limit: int) -> list[RequestRecord]:
    """The newest requests."""
    if endpoint_id is None:
        rows = transaction.execute("requests", (max(0, limit),))
    else:
        rows = transaction.execute("requests_of_endpoint", (endpoint_id, max(0, limit)))
    return [
        RequestRecord(
            id=row[0],
            road=Road(row[1]),
            endpoint_id=row[2],
            key_id=row[3],
            worker_id=row[4],
            route=row[5],
            status=row[6],
            outcome=Outcome(row[7]),
            arrival_ms=row[8],
            wait_ms=row[9],
            first_token_ms=row[10],
            duration_ms=row[11],
            tokens_in=row[12],
            tokens_out=row[13],
            estimated=bool(row[14]),
        )
        for row in rows
    ]


def prune_requests(transaction: Transaction, keep: int) -> int:
    """Forget all but the newest requests."""
    return transaction.execute("prune_requests", (max(0, keep),)).rowcount


def put_start(transaction: Transaction, record: StartRecord) -> None:
    """Insert or replace one start, and drop what is far too old."""
    decided_ms = record.stages[0][1] if record.stages else 0
    transaction.execute(
        "put_start",
        (
            record.worker_id,
            record.endpoint_id,
            record.version,
            record.rung,
            msgspec.json.encode(record.stages).decode(),
            record.outcome,
            decided_ms,
        ),
    )
    transaction.execute("prune_starts", (common.STARTS_KEPT,))


def starts(transaction: Transaction, endpoint_id: str | None, limit: int) -> list[StartRecord]:
    """The newest starts."""
    if endpoint_id is None:
        rows = transaction.execute("starts", (max(0, limit),))
    else:
        rows = transaction.execute("starts_of_endpoint", (endpoint_id, max(0, limit)))
    return [
        StartRecord(
            worker_id=row[0],
            endpoint_id=row[1],
            version=row[2],
            rung=row[3],
            stages=msgspec.json.decode(row[4], type=tuple[tuple[str, int], ...]),
            outcome=row[5],
        )
        for row in rows
    ]
