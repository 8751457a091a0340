"""Limits of one key: buckets that drain evenly, and what is said when one is full."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.key_limits import (
    Bucket,
    KeyUse,
    LimitReason,
    decide_limits,
    duration,
    end_request,
    use_at,
)
from pilotlight.domain.key import ApiKey, Scope

S = 1_000_000_000
KEY = ApiKey(id="k", name="", scope=Scope.ADMIN, hash="h")


def key(**limits):
    return replace(KEY, **limits)


def ask_often(limited, times, *, tokens=1, every_ns=0, use=None):
    """Reasons of so many requests, which all end at once."""
    use, reasons = use or KeyUse(), []
    for number in range(times):
        decision = decide_limits(use, limited, tokens, number * every_ns)
        reasons.append(decision.reason)
        admitted = decision.reason is LimitReason.WITHIN
        use = end_request(decision.use, expected=tokens, tokens=None) if admitted else decision.use
    return reasons, use


def test_a_key_without_limits():
    assert not KEY.limited
    assert [
        key(**{name: 1}).limited for name in ("requests_per_minute", "tokens_per_minute", "concurrent_max")
    ]
    reasons, use = ask_often(KEY, 100)
    assert set(reasons) == {LimitReason.WITHIN}
    assert use == KeyUse()


def test_a_minutes_worth_of_requests_may_come_at_once_and_then_a_sixtieth_every_second():
    limited = key(requests_per_minute=60)
    reasons, use = ask_often(limited, 62)
    assert reasons == [LimitReason.WITHIN] * 60 + [LimitReason.REQUESTS] * 2
    refused = decide_limits(use, limited, 1, 0)
    assert (refused.retry_after_s, refused.use.requests.remaining) == (1, 0)
    assert refused.use.requests.reset_ns == 60 * S
    assert decide_limits(use, limited, 1, S - 1).reason is LimitReason.REQUESTS
    admitted = decide_limits(use, limited, 1, S)
    assert (admitted.reason, admitted.retry_after_s) == (LimitReason.WITHIN, 0)
    assert use_at(use, limited, 30 * S).requests.remaining == 30
    assert use_at(use, limited, 61 * S).requests.reset_ns == 0


def test_tokens_are_expected_first_and_put_right_at_the_end():
    limited = key(tokens_per_minute=600)
    use = decide_limits(KeyUse(), limited, 400, 0).use
    refused = decide_limits(use, limited, 300, 0)
    assert (refused.reason, refused.retry_after_s) == (LimitReason.TOKENS, 10)
    for cost, remaining in ((100, 500), (None, 200), (5000, 0)):
        ended = end_request(use, expected=400, tokens=cost)
        assert (ended.tokens.remaining, ended.under_way) == (remaining, 0)
    # Five thousand tokens were served already; they are paid off at ten a second.
    assert decide_limits(ended, limited, 100, 0).retry_after_s == 450


def test_a_request_that_needs_more_than_the_limit_gets_an_empty_bucket():
    limited = key(tokens_per_minute=600)
    assert decide_limits(KeyUse(), limited, 10_000, 0).reason is LimitReason.WITHIN
    use = KeyUse(tokens=Bucket(600).add(1))
    assert decide_limits(use, limited, 10_000, 0).retry_after_s == 1
    assert decide_limits(use, limited, 10_000, S).reason is LimitReason.WITHIN


def test_requests_at_once():
    limited = key(concurrent_max=1, requests_per_minute=5)
    first = decide_limits(KeyUse(), limited, 1, 0)
    second = decide_limits(first.use, limited, 1, 0)
    assert (second.reason, second.retry_after_s) == (LimitReason.CONCURRENT, 1)
    assert second.use == first.use
    ended = end_request(second.use, expected=1, tokens=1)
    assert decide_limits(ended, limited, 1, 0).reason is LimitReason.WITHIN


def test_the_limit_that_holds_for_longest_is_the_reason():
    limited = key(requests_per_minute=60, tokens_per_minute=60)
    use = KeyUse(requests=Bucket(60).add(60), tokens=Bucket(60).add(60))
    assert decide_limits(use, limited, 30, 0).reason is LimitReason.TOKENS


def test_a_changed_limit_keeps_its_bucket_as_full_as_it_was():
    use = KeyUse(requests=Bucket(60).add(30), tokens=Bucket(60).add(30))
    use = use_at(use, key(requests_per_minute=6000), 0)
    assert (use.requests.remaining, use.tokens) == (3000, None)


def test_a_clock_that_stands_still_or_goes_back_gives_nothing():
    use = KeyUse(requests=Bucket(60, as_of_ns=9 * S).add(60))
    assert use_at(use, key(requests_per_minute=60), 5 * S).requests.remaining == 0


@given(st.integers(1, 100), st.lists(st.tuples(st.integers(0, 5 * S), st.integers(1, 50)), max_size=60))
def test_never_more_than_a_minutes_worth_and_what_has_drained(limit, script):
    limited, use, now, served = key(tokens_per_minute=limit), KeyUse(), 0, 0
    for pause, tokens in script:
        now += pause
        decision = decide_limits(use, limited, tokens, now)
        use = decision.use
        if decision.reason is LimitReason.WITHIN:
            served += tokens
        else:
            later = now + decision.retry_after_s * S
            assert decide_limits(use, limited, tokens, later).reason is LimitReason.WITHIN
        # One request that needs more than the limit may be under way beyond it.
        assert served <= max(limit, 50) + limit * now / (60 * S)
        assert 0 <= use.tokens.remaining <= limit


@pytest.mark.parametrize(
    ("nanoseconds", "words"),
    [
        (0, "0s"),
        (1, "1ms"),
        (17_000_000, "17ms"),
        (S, "1s"),
        (1_200_000_000, "1.2s"),
        (60 * S, "1m0s"),
        (90_500_000_000, "1m30.5s"),
        (3600 * S, "60m0s"),
    ],
)
def test_durations_as_openai_spells_them(nanoseconds, words):
    assert duration(nanoseconds) == words
