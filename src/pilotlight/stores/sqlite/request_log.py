"""Operations on the request log: functions of a transaction, called by `store`.

Requests end by the thousands a second, are looked at rarely, and are forgotten oldest first. So they are kept
in segments: all requests of one endpoint that are written at a time, as one JSON text. Measured, a request
costs 1.2 µs of the processor so, and 5.4 as a row with indexes of its own; a million of them are forgotten in
a second. SQL sees single requests through the view `requests`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from operator import itemgetter
from typing import Any

import msgspec

from pilotlight.domain.usage import RequestRecord
from pilotlight.stores import rows
from pilotlight.stores.sqlite.threads import Transaction

_decode = msgspec.json.Decoder(list[list[Any]]).decode

_arrival_ms = itemgetter(RequestRecord.__struct_fields__.index("arrival_ms"))


def add_requests(
    transaction: Transaction, records: Sequence[RequestRecord], last: Collection[RequestRecord] = ()
) -> None:
    """Append requests, in one segment for each endpoint.

    Args:
        transaction: The transaction.
        records: The requests.
        last: What was to be appended last and may have been; nothing of it is appended twice.
    """
    if last:
        written = _written(transaction, last)
        records = [record for record in records if record.id not in written]
    by_endpoint: defaultdict[str, list[rows.Row]] = defaultdict(list)
    for record in records:
        by_endpoint[record.endpoint_id].append(rows.request_row(record))
    for endpoint_id, requests in by_endpoint.items():
        transaction.execute("insert_request_segment", (endpoint_id, *_segment(requests)))


def _written(transaction: Transaction, last: Collection[RequestRecord]) -> set[str]:
    """The ids of those that have been appended, and nothing after them."""
    newest = transaction.execute("newest_request_segments", (len(last),))
    return {record.id for record in last} & {row[0] for (data,) in newest for row in _decode(data)}


def requests(transaction: Transaction, endpoint_id: str | None, limit: int) -> list[RequestRecord]:
    """The newest requests."""
    if limit <= 0:
        return []
    if endpoint_id is None:
        segments = transaction.execute("request_segments")
    else:
        segments = transaction.execute("request_segments_of_endpoint", (endpoint_id,))
    newest: list[Sequence[Any]] = []
    for last_ms, data in segments:
        if len(newest) >= limit and _arrival_ms(newest[-1]) > last_ms:
            break
        # The later ones of a segment first, and those of later segments before: sorting keeps that order.
        newest += reversed(_decode(data))
        newest.sort(key=_arrival_ms, reverse=True)
        del newest[limit:]
    return [rows.request_of(row) for row in newest]


def prune_requests(transaction: Transaction, keep: int) -> int:
    """Forget all but the newest requests, going by segments, and in the last of them by arrival."""
    excess: int = max(0, transaction.execute("count_requests").fetchone()[0] - max(0, keep))
    forgotten = 0
    doomed: list[tuple[int]] = []
    for seq, count in transaction.execute("oldest_request_segments"):
        if forgotten + count > excess:
            break
        forgotten += count
        doomed.append((seq,))
    transaction.executemany("delete_request_segment", doomed)
    if forgotten < excess:
        _shorten_oldest(transaction, excess - forgotten)
    return excess


def _shorten_oldest(transaction: Transaction, count: int) -> None:
    """Forget the oldest requests of the oldest segment."""
    seq, _ = transaction.execute("oldest_request_segments").fetchone()
    (data,) = transaction.execute("request_segment", (seq,)).fetchone()
    kept = sorted(_decode(data), key=_arrival_ms)[count:]
    transaction.execute("change_request_segment", (*_segment(kept), seq))


def _segment(requests: Sequence[Sequence[Any]]) -> tuple[int, int, str]:
    """Last arrival, number and text of a segment of these."""
    return max(map(_arrival_ms, requests)), len(requests), msgspec.json.encode(requests).decode()
