"""What is counted of ended requests: totals to which rows of the request log are added. Pure.

`gateway.metrics` has one `Totals` per worker and adds every row to one of them; sums of totals are exact, so
that an endpoint's are those of its workers, living and gone. Times are whole microseconds, because a sum of
floats drifts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from enum import StrEnum

from pilotlight.core.openai_routes import ROUTES
from pilotlight.domain.usage import Outcome, RequestRecord, Road


class ErrorClass(StrEnum):
    """Why a request did not end well, as far as its row tells."""

    INVALID = "invalid_request"
    UNAUTHORIZED = "unauthorized"
    DENIED = "access_denied"
    NOT_FOUND = "not_found"
    TOO_LARGE = "too_large"
    RATE_LIMITED = "rate_limited"
    QUEUE_FULL = "queue_full"
    BACKING_OFF = "backing_off"
    BODY_LATE = "body_late"
    NO_WORKER = "no_worker"
    START_FAILED = "start_failed"
    WORKER_FAILED = "worker_failed"
    ENGINE_ERROR = "engine_error"
    STREAM_CUT = "stream_cut"
    JOB_FAILED = "job_failed"
    INTERNAL = "internal"
    TIMED_OUT = "timed_out"
    DISCONNECTED = "disconnected"
    CANCELLED = "cancelled"


_BY_STATUS = {
    401: ErrorClass.UNAUTHORIZED,
    403: ErrorClass.DENIED,
    404: ErrorClass.NOT_FOUND,
    413: ErrorClass.TOO_LARGE,
    429: ErrorClass.RATE_LIMITED,
}
_BY_OUTCOME = {
    Outcome.TIMED_OUT: ErrorClass.TIMED_OUT,
    Outcome.DISCONNECTED: ErrorClass.DISCONNECTED,
    Outcome.CANCELLED: ErrorClass.CANCELLED,
}


def error_class(row: RequestRecord) -> ErrorClass | None:
    """Why a request did not end well; None for one that did.

    What a worker answers with 500 and above is its engine's error, and so is an error of ours that happens
    while the worker has the request: the row does not tell them apart.
    """
    match row.outcome:
        case Outcome.OK:
            return None
        case Outcome.REJECTED:
            return _BY_STATUS.get(row.status, ErrorClass.INVALID)
        case Outcome.SHED:
            return ErrorClass.QUEUE_FULL if row.status == 429 else ErrorClass.BACKING_OFF
        case Outcome.EXPIRED:
            return ErrorClass.BODY_LATE if row.status == 408 else ErrorClass.NO_WORKER
        case Outcome.FAILED:
            return _failure(row)
    return _BY_OUTCOME[row.outcome]


def _failure(row: RequestRecord) -> ErrorClass:
    if row.road is Road.JOB:
        return ErrorClass.JOB_FAILED
    if row.status == 502:
        return ErrorClass.WORKER_FAILED
    if row.worker_id:
        if row.status >= 500:
            return ErrorClass.ENGINE_ERROR
        return ErrorClass.STREAM_CUT if row.streamed else ErrorClass.WORKER_FAILED
    return ErrorClass.START_FAILED if row.status == 503 else ErrorClass.INTERNAL


OTHER_ROUTE = "other"
"""Stands for all routes that are not in the tables: callers may invent any number of them."""

_ROUTES = frozenset(ROUTES) | {"/run", "/runsync"}


def known_route(route: str) -> str:
    """A route that is in the tables as it is, any other one as `OTHER_ROUTE`."""
    return route if route in _ROUTES else OTHER_ROUTE


_MS = 1000

DURATION_BOUNDS_US: tuple[int, ...] = tuple(
    ms * _MS
    for ms in (10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 120_000, 300_000, 600_000)
)
WAIT_BOUNDS_US: tuple[int, ...] = tuple(
    ms * _MS
    for ms in (1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 120_000, 300_000)
)
BETWEEN_BOUNDS_US: tuple[int, ...] = tuple(
    ms * _MS for ms in (1, 2, 4, 6, 8, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2500)
)


class Histogram:
    """How many values lie below each of some bounds, and their sum.

    Args:
        bounds: Upper bounds, inclusive, ascending.

    Attributes:
        counts: Values per bucket, not cumulative; one more bucket than bounds, for what lies above all.
        total: Sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0

    def note(self, value: int) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: Histogram) -> None:
        """Count all values of another one with the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


class Totals:
    """Everything that is counted of some requests.

    Attributes:
        requests: By (route, outcome, first digit of the HTTP status); of a row without a status that is 0.
        errors: By class.
        tokens_in: Prompt tokens, as far as they are known.
        tokens_out: Completion tokens, as far as they are known.
        continued: How often a stream went on with another worker.
        duration: From arrival to end, of requests that a worker had, in µs.
        wait: For a worker, of the same, in µs.
        first_token: From arrival to the first event, of streams, in µs.
        between_tokens: Mean of each stream, in µs: from the first event to the end, per further token.
    """

    __slots__ = (
        "between_tokens", "continued", "duration", "errors", "first_token", "requests", "tokens_in",
        "tokens_out", "wait",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests: dict[tuple[str, Outcome, int], int] = {}
        self.errors: dict[ErrorClass, int] = {}
        self.tokens_in = 0
        self.tokens_out = 0
        self.continued = 0
        self.duration = Histogram(DURATION_BOUNDS_US)
        self.wait = Histogram(WAIT_BOUNDS_US)
        self.first_token = Histogram(WAIT_BOUNDS_US)
        self.between_tokens = Histogram(BETWEEN_BOUNDS_US)

    def note(self, row: RequestRecord) -> None:
        """Count one request."""
        key = (known_route(row.route), row.outcome, row.status // 100)
        self.requests[key] = self.requests.get(key, 0) + 1
        if row.outcome is not Outcome.OK:
            error = error_class(row)
            assert error is not None
            self.errors[error] = self.errors.get(error, 0) + 1
        self.tokens_in += row.tokens_in or 0
        self.tokens_out += row.tokens_out or 0
        self.continued += row.continued
        if not row.worker_id:
            return
        self.duration.note(row.duration_ms * _MS)
        self.wait.note(row.wait_ms * _MS)
        if row.streamed and row.first_token_ms is not None:
            self.first_token.note(row.first_token_ms * _MS)
            if row.tokens_out is not None and row.tokens_out > 1:
                after_us = (row.duration_ms - row.first_token_ms) * _MS
                self.between_tokens.note(max(0, after_us) // (row.tokens_out - 1))

    def add(self, other: Totals) -> None:
        """Count everything that another one has counted."""
        for key, count in other.requests.items():
            self.requests[key] = self.requests.get(key, 0) + count
        for error, count in other.errors.items():
            self.errors[error] = self.errors.get(error, 0) + count
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.continued += other.continued
        self.duration.add(other.duration)
        self.wait.add(other.wait)
        self.first_token.add(other.first_token)
        self.between_tokens.add(other.between_tokens)
