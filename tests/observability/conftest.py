"""Rows of requests, and time that stands still."""

from __future__ import annotations

import pytest

from pilotlight.domain.usage import Outcome, RequestRecord, Road


class StillClock:
    def __init__(self):
        self.now = 1_780_315_504_123

    def now_ms(self):
        return self.now

    def monotonic_ns(self):
        return self.now * 1_000_000


@pytest.fixture
def clock():
    return StillClock()


@pytest.fixture
def row(clock):
    """Makes rows; by default a streamed answer of worker `w1` of endpoint `ep`."""

    def make(**changes):
        values = {
            "id": "0123456789abcdef", "road": Road.DATA, "endpoint_id": "ep", "key_id": "k", "worker_id": "w1",
            "route": "/v1/chat/completions", "status": 200, "outcome": Outcome.OK, "arrival_ms": clock.now,
            "wait_ms": 2, "first_token_ms": 40, "duration_ms": 340, "tokens_in": 120, "tokens_out": 4,
            "streamed": True, **changes,
        }  # fmt: skip
        return RequestRecord(**values)

    return make
