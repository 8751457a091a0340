"""What is counted of ended requests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotlight.core.request_totals import ErrorClass, Histogram, Totals, error_class
from pilotlight.domain.usage import Outcome, RequestRecord, Road

CHAT = "/v1/chat/completions"


def row(**changes):
    values = {
        "id": "r", "road": Road.DATA, "endpoint_id": "ep", "key_id": "k", "worker_id": "w1", "route": CHAT,
        "status": 200, "outcome": Outcome.OK, "arrival_ms": 0, **changes,
    }  # fmt: skip
    return RequestRecord(**values)


@pytest.mark.parametrize(
    ("outcome", "status", "more", "expected"),
    [
        (Outcome.OK, 200, {}, None),
        (Outcome.REJECTED, 400, {}, ErrorClass.INVALID),
        (Outcome.REJECTED, 405, {}, ErrorClass.INVALID),
        (Outcome.REJECTED, 401, {}, ErrorClass.UNAUTHORIZED),
        (Outcome.REJECTED, 403, {}, ErrorClass.DENIED),
        (Outcome.REJECTED, 404, {}, ErrorClass.NOT_FOUND),
        (Outcome.REJECTED, 413, {}, ErrorClass.TOO_LARGE),
        (Outcome.REJECTED, 429, {}, ErrorClass.RATE_LIMITED),
        (Outcome.SHED, 429, {}, ErrorClass.QUEUE_FULL),
        (Outcome.SHED, 503, {}, ErrorClass.BACKING_OFF),
        (Outcome.EXPIRED, 408, {}, ErrorClass.BODY_LATE),
        (Outcome.EXPIRED, 503, {}, ErrorClass.NO_WORKER),
        (Outcome.FAILED, 502, {}, ErrorClass.WORKER_FAILED),
        (Outcome.FAILED, 503, {"worker_id": ""}, ErrorClass.START_FAILED),
        (Outcome.FAILED, 500, {"worker_id": ""}, ErrorClass.INTERNAL),
        (Outcome.FAILED, 500, {}, ErrorClass.ENGINE_ERROR),
        (Outcome.FAILED, 200, {"streamed": True}, ErrorClass.STREAM_CUT),
        (Outcome.FAILED, 200, {}, ErrorClass.WORKER_FAILED),
        (Outcome.FAILED, 200, {"road": Road.JOB}, ErrorClass.JOB_FAILED),
        (Outcome.DISCONNECTED, 0, {}, ErrorClass.DISCONNECTED),
        (Outcome.CANCELLED, 200, {"road": Road.JOB}, ErrorClass.CANCELLED),
        (Outcome.TIMED_OUT, 504, {}, ErrorClass.TIMED_OUT),
    ],
)
def test_the_class_of_an_error(outcome, status, more, expected):
    assert error_class(row(outcome=outcome, status=status, **more)) is expected


def test_every_outcome_but_ok_has_a_class_whatever_its_status():
    for outcome in set(Outcome) - {Outcome.OK}:
        for status in (0, 200, 404, 429, 500, 503):
            for road in Road:
                assert error_class(row(outcome=outcome, status=status, road=road)) is not None


def test_bounds_of_buckets_are_inclusive():
    histogram = Histogram((10, 20))
    for value in (0, 10, 11, 20, 21, 1000):
        histogram.note(value)
    assert (histogram.counts, histogram.total) == ([2, 2, 2], 1062)


def test_a_stream_tells_when_it_began_and_how_fast_it_went_on():
    totals = Totals()
    totals.note(row(streamed=True, first_token_ms=100, duration_ms=400, tokens_out=4, wait_ms=30))
    assert totals.first_token.total == 100_000
    assert totals.between_tokens.total == 100_000
    assert totals.wait.total == 30_000
    assert totals.duration.total == 400_000


@pytest.mark.parametrize(
    "more",
    [
        {"first_token_ms": 399, "duration_ms": 400, "tokens_out": 4},
        {"streamed": True, "duration_ms": 400, "tokens_out": 4},
        {"streamed": True, "first_token_ms": 5, "duration_ms": 9, "tokens_out": 1},
        {"streamed": True, "first_token_ms": 5, "duration_ms": 9},
    ],
    ids=["in one piece", "no first event", "one token", "tokens unknown"],
)
def test_what_has_no_time_between_tokens(more):
    totals = Totals()
    totals.note(row(**more))
    assert sum(totals.between_tokens.counts) == 0


def test_a_request_that_no_worker_had_has_no_times():
    totals = Totals()
    totals.note(row(worker_id="", status=400, outcome=Outcome.REJECTED, duration_ms=3))
    assert sum(totals.duration.counts) == sum(totals.wait.counts) == 0
    assert totals.requests == {(CHAT, Outcome.REJECTED, 4): 1}
    assert totals.errors == {ErrorClass.INVALID: 1}


def test_routes_that_callers_invent_are_one():
    totals = Totals()
    for number in range(5):
        totals.note(row(route=f"/v1/{number}", status=404, outcome=Outcome.REJECTED))
    assert totals.requests == {("other", Outcome.REJECTED, 4): 5}


ROWS = st.lists(
    st.builds(
        row,
        route=st.sampled_from([CHAT, "/run", "/x"]),
        outcome=st.sampled_from(Outcome),
        status=st.sampled_from([0, 200, 400, 429, 500, 502]),
        worker_id=st.sampled_from(["", "w1"]),
        wait_ms=st.integers(0, 10**7),
        first_token_ms=st.none() | st.integers(0, 10**7),
        duration_ms=st.integers(0, 10**7),
        tokens_in=st.none() | st.integers(0, 10**6),
        tokens_out=st.none() | st.integers(0, 10**6),
        streamed=st.booleans(),
        continued=st.integers(0, 3),
    ),
    max_size=20,
)


def values(totals):
    histograms = (totals.duration, totals.wait, totals.first_token, totals.between_tokens)
    return (
        totals.requests, totals.errors, totals.tokens_in, totals.tokens_out, totals.continued,
        [(histogram.counts, histogram.total) for histogram in histograms],
    )  # fmt: skip


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(ROWS, ROWS)
def test_sums_are_exact_and_lose_nobody(first, second):
    parts, whole = (Totals(), Totals()), Totals()
    for totals, rows in zip(parts, (first, second), strict=True):
        for each in rows:
            totals.note(each)
            whole.note(each)
    total = Totals()
    total.add(parts[0])
    total.add(parts[1])
    assert values(total) == values(whole)
    assert sum(whole.requests.values()) == len(first) + len(second)
    assert sum(whole.errors.values()) == sum(each.outcome is not Outcome.OK for each in first + second)
