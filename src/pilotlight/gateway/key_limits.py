"""Counts what keys with limits of their own ask for, all endpoints together; `core.key_limits` decides.

Every gateway process counts for itself. A key without limits is not looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pilotlight.core.key_limits import (
    Bucket,
    KeyUse,
    LimitDecision,
    LimitReason,
    decide_limits,
    duration,
    end_request,
    use_at,
)
from pilotlight.domain.key import ApiKey
from pilotlight.gateway.errors import RateLimitedError
from pilotlight.gateway.refusal import RequestRefusedError
from pilotlight.ports.clock import Clock

_KEYS_MIN = 256
"""Uses are looked through for old ones when there are twice as many as were left the last time."""


@dataclass(slots=True)
class Taken:
    """What a request was told of the limits of its key.

    Attributes:
        refused: What it is answered instead of being served; None if it is within them.
        retry_after_s: When to come again, if it is refused.
        headers: What its answer says of them, `x-ratelimit-…`; an error has them already.
        tokens: Expected of it.
        counted: Whether it counts until it is given back.
    """

    refused: RequestRefusedError | None = None
    retry_after_s: int = 0
    headers: Sequence[tuple[bytes, bytes]] = ()
    tokens: int = 0
    counted: bool = False


class KeyLimits:
    """The limits of all keys.

    Args:
        clock: Time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._uses: dict[str, KeyUse] = {}
        self._uses_max = 2 * _KEYS_MIN

    def __len__(self) -> int:
        """How many keys are counted for."""
        return len(self._uses)

    def take(self, key: ApiKey, tokens: int) -> Taken:
        """Count a request, if it is within the limits of its key.

        Args:
            key: Whose it is.
            tokens: Expected of it, of prompt and completion together (`core.fair_queue.expected_tokens`).

        Returns:
            What becomes of it. To be given back when it has ended; if it was refused, that does nothing.
        """
        if not key.limited:
            return Taken()
        if len(self._uses) >= self._uses_max:
            self._forget()
        decision = decide_limits(self._uses.get(key.id, KeyUse()), key, tokens, self._clock.monotonic_ns())
        self._uses[key.id] = decision.use
        headers = [*_named("requests", decision.use.requests), *_named("tokens", decision.use.tokens)]
        if decision.reason is LimitReason.WITHIN:
            return Taken(headers=headers, tokens=tokens, counted=True)
        return Taken(refused=_refusal(key, decision, tokens, headers), retry_after_s=decision.retry_after_s)

    def give_back(self, key: ApiKey, taken: Taken, tokens: int | None) -> None:
        """Count no longer with a request as one that is under way. Harmless the second time.

        Args:
            key: Whose it was.
            taken: What `take` returned.
            tokens: What it has cost, of prompt and completion together; None if nobody knows.
        """
        if not taken.counted:
            return
        taken.counted = False
        use = use_at(self._uses[key.id], key, self._clock.monotonic_ns())
        self._uses[key.id] = end_request(use, expected=taken.tokens, tokens=tokens)

    @contextlib.contextmanager
    def admitted(self, key: ApiKey) -> Iterator[None]:
        """Count a request for as long as it is under way, whose tokens nobody knows; none are counted.

        Raises:
            RateLimitedError: It is over a limit and was not counted.
        """
        taken = self.take(key, 0)
        if taken.refused is not None:
            raise RateLimitedError(str(taken.refused), retry_after_s=taken.retry_after_s)
        try:
            yield
        finally:
            self.give_back(key, taken, None)

    def _forget(self) -> None:
        """Drop what says nothing any more."""
        now_ns = self._clock.monotonic_ns()
        self._uses = {
            key_id: use
            for key_id, use in self._uses.items()
            if use.under_way
            or any(b and b.as_of_ns + b.reset_ns > now_ns for b in (use.requests, use.tokens))
        }
        self._uses_max = 2 * max(_KEYS_MIN, len(self._uses))


def _named(name: str, bucket: Bucket | None) -> list[tuple[bytes, bytes]]:
    if bucket is None:
        return []
    return [
        (f"x-ratelimit-limit-{name}".encode(), b"%d" % bucket.limit),
        (f"x-ratelimit-remaining-{name}".encode(), b"%d" % bucket.remaining),
        (f"x-ratelimit-reset-{name}".encode(), duration(bucket.reset_ns).encode()),
    ]


def _refusal(
    key: ApiKey, decision: LimitDecision, tokens: int, headers: list[tuple[bytes, bytes]]
) -> RequestRefusedError:
    if decision.reason is LimitReason.CONCURRENT:
        limit = f"{key.concurrent_max} requests at once"
    elif decision.reason is LimitReason.REQUESTS:
        limit = f"{key.requests_per_minute} requests per minute"
    else:
        limit = f"{key.tokens_per_minute} tokens per minute, and this request may need {tokens}"
    return RequestRefusedError(
        429, f"rate limit reached for key {key.id}: {limit}; try again in {decision.retry_after_s} s",
        code="rate_limit_exceeded", retry_after_s=decision.retry_after_s, headers=headers,
    )  # fmt: skip
