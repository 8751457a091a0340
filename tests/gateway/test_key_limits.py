"""Limits of keys, as the roads of the gateway see them."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from pilotlight.domain.key import ApiKey, Scope
from pilotlight.gateway.key_limits import KeyLimits

KEY = ApiKey(id="k", name="", scope=Scope.ADMIN, hash="h")


class StillClock:
    def __init__(self) -> None:
        self.now_s = 0

    def now_ms(self) -> int:
        return self.now_s * 1000

    def monotonic_ns(self) -> int:
        return self.now_s * 1_000_000_000


def test_a_key_without_limits_is_not_looked_at():
    limits = KeyLimits(StillClock())
    taken = limits.take(KEY, 10)
    limits.give_back(KEY, taken, 10)
    assert (taken.refused, taken.headers, len(limits)) == (None, (), 0)


def test_headers_say_what_is_left_and_a_refusal_when_to_come_again():
    clock = StillClock()
    limits, key = KeyLimits(clock), replace(KEY, requests_per_minute=2, tokens_per_minute=1000)
    first = limits.take(key, 100)
    assert first.headers == [
        (b"x-ratelimit-limit-requests", b"2"),
        (b"x-ratelimit-remaining-requests", b"1"),
        (b"x-ratelimit-reset-requests", b"30s"),
        (b"x-ratelimit-limit-tokens", b"1000"),
        (b"x-ratelimit-remaining-tokens", b"900"),
        (b"x-ratelimit-reset-tokens", b"6s"),
    ]
    limits.give_back(key, first, 50)
    second = limits.take(key, 100)
    assert dict(second.headers)[b"x-ratelimit-remaining-tokens"] == b"850"
    refused = limits.take(key, 100).refused
    assert refused.status == 429
    error = msgspec.json.decode(refused.body())["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert error["message"] == "rate limit reached for key k: 2 requests per minute; try again in 30 s"
    headers = dict(refused.headers)
    assert (headers[b"retry-after"], headers[b"x-ratelimit-remaining-requests"]) == (b"30", b"0")
    clock.now_s = 30
    assert limits.take(key, 100).refused is None


def test_requests_at_once_count_until_they_are_given_back():
    limits, key = KeyLimits(StillClock()), replace(KEY, concurrent_max=1)
    first = limits.take(key, 1)
    second = limits.take(key, 1)
    assert "1 requests at once" in str(second.refused)
    limits.give_back(key, second, 1)
    assert limits.take(key, 1).refused
    for _ in range(2):
        limits.give_back(key, first, 1)
    third = limits.take(key, 1)
    assert (third.refused, list(third.headers)) == (None, [])
    assert limits.take(key, 1).refused


def test_too_many_tokens_are_refused_with_the_number():
    limits, key = KeyLimits(StillClock()), replace(KEY, tokens_per_minute=10)
    assert limits.take(key, 9).refused is None
    assert "10 tokens per minute, and this request may need 5" in str(limits.take(key, 5).refused)


def test_keys_that_say_nothing_any_more_are_forgotten():
    clock = StillClock()
    limits, key = KeyLimits(clock), replace(KEY, requests_per_minute=60)
    for number in range(2000):
        clock.now_s += 1
        one = replace(key, id=f"k{number}")
        limits.give_back(one, limits.take(one, 1), 1)
    assert len(limits) <= 512
