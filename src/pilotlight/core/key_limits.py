"""What one API key may ask for: requests and tokens in a minute, and requests at once.

Leaky buckets. A bucket holds as much as a minute's limit and drains evenly, so that a key which was quiet may
ask for a minute's worth at once and gets a sixtieth of that every second from then on. Whole numbers only: a
level is counted in `_MINUTE_NS`-ths, of which each unit of the limit drains one in a nanosecond.

`gateway.key_limits` keeps the states and tells time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from pilotlight.domain.key import ApiKey

_MINUTE_NS = 60_000_000_000
_SECOND_NS = 1_000_000_000

_RETRY_AT_ONCE_S = 1
"""When a request over the limit of concurrent ones should come again: nobody knows when one of them ends."""


class LimitReason(StrEnum):
    """Why a request was let through or refused."""

    WITHIN = "within"
    REQUESTS = "requests"
    TOKENS = "tokens"
    CONCURRENT = "concurrent"


@dataclass(frozen=True, slots=True)
class Bucket:
    """How much of a minute's limit is used up.

    Attributes:
        limit: Units that drain in a minute.
        level: Used, in `_MINUTE_NS`-ths of a unit, as of `as_of_ns`. It may be more than the limit: what a
            request costs turns out at its end.
        as_of_ns: The moment.
    """

    limit: int
    level: int = 0
    as_of_ns: int = 0

    def at(self, now_ns: int, limit: int) -> Bucket:
        """What has not drained by now; with a limit that was changed it is as full as before."""
        level = max(0, self.level - self.limit * max(0, now_ns - self.as_of_ns))
        return Bucket(limit, level * limit // self.limit, now_ns)

    def add(self, units: int) -> Bucket:
        """With so many units more in it, or less."""
        return replace(self, level=max(0, self.level + units * _MINUTE_NS))

    def wait_ns(self, units: int) -> int:
        """When so many units would fit; those that never do fit into an empty bucket."""
        surplus = self.level - max(0, self.limit - units) * _MINUTE_NS
        return max(0, -(-surplus // self.limit))

    @property
    def remaining(self) -> int:
        """Whole units that fit now."""
        return max(0, self.limit * _MINUTE_NS - self.level) // _MINUTE_NS

    @property
    def reset_ns(self) -> int:
        """When it will be empty if nothing is added."""
        return -(-self.level // self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUse:
    """What a key has asked for.

    Attributes:
        requests: None where the key has no such limit, as is the next.
        tokens: Of requests that have ended, and as expected of those that have not.
        under_way: Requests.
    """

    requests: Bucket | None = None
    tokens: Bucket | None = None
    under_way: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitDecision:
    """The decision.

    Attributes:
        reason: The limit that stands in the way, or none.
        use: What the key has asked for now, this request included if it was let through.
        retry_after_s: When a refused request would be let through, if no other comes; zero for others.
    """

    reason: LimitReason
    use: KeyUse
    retry_after_s: int = 0


def use_at(use: KeyUse, key: ApiKey, now_ns: int) -> KeyUse:
    """What counts of a key's use at a moment, by the limits that it has now."""
    return KeyUse(
        requests=_bucket(use.requests, key.requests_per_minute, now_ns),
        tokens=_bucket(use.tokens, key.tokens_per_minute, now_ns),
        under_way=use.under_way,
    )


def decide_limits(use: KeyUse, key: ApiKey, tokens: int, now_ns: int) -> LimitDecision:
    """Whether one more request is within the limits of its key. A request that is refused counts for nothing.

    Args:
        use: What the key asked for before.
        key: Whose limits count.
        tokens: Expected of the request, of prompt and completion together. One that expects more than the
            limit is let through when nothing else counts.
        now_ns: The moment, of a clock that never goes back.
    """
    use = use_at(use, key, now_ns)
    if key.concurrent_max is not None and use.under_way >= key.concurrent_max:
        return LimitDecision(reason=LimitReason.CONCURRENT, use=use, retry_after_s=_RETRY_AT_ONCE_S)
    waits = [
        (bucket.wait_ns(units), reason)
        for bucket, units, reason in (
            (use.requests, 1, LimitReason.REQUESTS),
            (use.tokens, tokens, LimitReason.TOKENS),
        )
        if bucket is not None
    ]
    wait_ns, reason = max(waits, default=(0, LimitReason.WITHIN))
    if wait_ns:
        return LimitDecision(reason=reason, use=use, retry_after_s=-(-wait_ns // _SECOND_NS))
    counted = KeyUse(
        requests=use.requests and use.requests.add(1),
        tokens=use.tokens and use.tokens.add(tokens),
        under_way=use.under_way + 1,
    )
    return LimitDecision(reason=LimitReason.WITHIN, use=counted)


def end_request(use: KeyUse, *, expected: int, tokens: int | None) -> KeyUse:
    """A key's use when one of its requests has ended.

    Args:
        use: Before.
        expected: Tokens that were expected of it.
        tokens: Those that it has cost; None if nobody knows, and then it was what was expected.
    """
    bucket = use.tokens
    if bucket is not None and tokens is not None:
        bucket = bucket.add(tokens - expected)
    return replace(use, tokens=bucket, under_way=use.under_way - 1)


def duration(nanoseconds: int) -> str:
    """A length of time as OpenAI's headers spell it: "0s", "120ms", "1.2s", "1m30s". Rounded up to 1 ms."""
    milliseconds = -(-nanoseconds // 1_000_000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = f"{rest // 1000}.{rest % 1000:03}".rstrip("0").rstrip(".") + "s"
    return f"{minutes}m{seconds}" if minutes else seconds


def _bucket(bucket: Bucket | None, limit: int | None, now_ns: int) -> Bucket | None:
    if limit is None:
        return None
    return Bucket(limit, 0, now_ns) if bucket is None else bucket.at(now_ns, limit)
