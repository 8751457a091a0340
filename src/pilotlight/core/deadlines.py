"""How long a client waits, and what a request is told that would wait for longer.

A client says it in one of two headers. `X-Request-Timeout` is our own: seconds for the whole request, and
what is not a number there is refused, because somebody meant something by it. `x-stainless-read-timeout` is
sent by OpenAI's and Anthropic's Python packages with every request, unasked (600 by default, none when it is
switched off): the longest silence their HTTP client bears. An answer must have begun by then; once it flows,
nothing ends it. Whatever is no use there is ignored.

A request that will not be served in time takes a place in the queue from those that will. It is shed at once
if the queue is known to be too long, and answered shortly before its client gives up if it was held until
then. Never shed is what waits for a worker that is to be started: held requests are what makes it start.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Protocol

from pilotlight.errors import InvalidInputError

OWN_HEADER: Final = b"x-request-timeout"
STAINLESS_HEADER: Final = b"x-stainless-read-timeout"

RETRY_AFTER_S_MAX: Final = 60
"""OpenAI's package obeys a Retry-After up to this; some versions do not retry at all when it is longer."""

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_SHOWN_MAX = 32

_MARGIN_SHARE = 0.05
_MARGIN_S_MAX = 0.5
"""An answer that shall reach a client in time leaves us a little before; for so much of its time, or so
long."""

_SMOOTHING = 16
"""Requests over which service times are averaged, roughly."""


class HeaderValues(Protocol):
    """Headers of a request, by names in lower case."""

    def get(self, name: bytes, default: bytes = b"", /) -> bytes:
        """One value."""
        ...


@dataclass(frozen=True, slots=True)
class Deadline:
    """How long a request may take, from its arrival, in seconds.

    Attributes:
        begin_s: Until its answer must have begun.
        whole_s: Until it must be complete, however long the answer flows.
        asked: Whether the client said so; else both are the gateway's own bound.
    """

    begin_s: float
    whole_s: float
    asked: bool


@dataclass(frozen=True, slots=True)
class HoldBound:
    """How long a request may be held.

    Attributes:
        seconds: From now on; 0 when its time is over.
        by_client: Whether the client's deadline ends it, and not the gateway's bound on holding.
    """

    seconds: float
    by_client: bool


def request_deadline(headers: HeaderValues, *, longest_s: float) -> Deadline:
    """How long a client waits for its answer.

    Args:
        headers: Of the request.
        longest_s: The gateway's bound on one request (`limits.data_path_s`), which no client can exceed.

    Raises:
        InvalidInputError: `X-Request-Timeout` is not a number of seconds above 0.
    """
    own = headers.get(OWN_HEADER, b"")
    if own:
        whole_s = min(_own_seconds(own), longest_s)
        return Deadline(whole_s, whole_s, asked=True)
    stainless = headers.get(STAINLESS_HEADER, b"")
    silence_s = _stainless_seconds(stainless) if stainless else None
    if silence_s is None:
        return Deadline(longest_s, longest_s, asked=False)
    return Deadline(min(silence_s, longest_s), longest_s, asked=True)


def hold_bound(deadline: Deadline, *, elapsed_s: float, hold_s: float, fed: bool = False) -> HoldBound:
    """How long a request may be held from now on.

    Args:
        deadline: Its client's.
        elapsed_s: How long ago it came.
        hold_s: The gateway's bound on holding (`limits.hold_s`).
        fed: Whether the client is sent comments meanwhile, so that to it the answer has begun.
    """
    until_s = deadline.whole_s if fed else deadline.begin_s
    if not deadline.asked:
        return HoldBound(max(0.0, min(hold_s, until_s - elapsed_s)), by_client=False)
    left_s = max(0.0, until_s - min(_MARGIN_SHARE * until_s, _MARGIN_S_MAX) - elapsed_s)
    return HoldBound(min(hold_s, left_s), by_client=left_s < hold_s)


def expected_wait_ms(ahead: int, slots: int, service_ms: float | None) -> int | None:
    """How long a request will probably be held whose endpoint has all its slots in use; None if nobody knows.

    With c slots, each in use for s on average, one becomes free every s/c; the first of them after half of
    that, as it is being waited for already.

    Args:
        ahead: Held requests that will be served before it.
        slots: Slots of all workers that are ready.
        service_ms: How long a slot was in use lately, on average (`smoothed_ms`); None before anything was.
    """
    if slots <= 0 or service_ms is None:
        return None
    return int((ahead + 0.5) * service_ms / slots)


def hopeless(expected_ms: int | None, bound: HoldBound) -> bool:
    """Whether a request is to be shed because its client will have given up before it is served.

    Args:
        expected_ms: How long it will probably be held (`expected_wait_ms`); None if nobody knows, such as
            while no worker is ready.
        bound: How long it may be. Where only the gateway's own bound ends it, it waits: an estimate is no
            reason to break a promise.
    """
    return bound.by_client and expected_ms is not None and expected_ms > bound.seconds * 1000


def retry_after_s(expected_ms: int | None, bound: HoldBound) -> int:
    """Seconds after which the same request would probably be served in time; from 1 to `RETRY_AFTER_S_MAX`.

    Args:
        expected_ms: How long it would have to be held if it came now; None if nobody knows.
        bound: How long it might be. Half of that shall be enough at the next try, as this is an estimate.
    """
    if expected_ms is None:
        return 1
    seconds = math.ceil(expected_ms / 1000 - bound.seconds / 2)
    return max(1, min(RETRY_AFTER_S_MAX, seconds))


def smoothed_ms(average_ms: float | None, sample_ms: float) -> float:
    """An average that forgets: the new one after a slot was in use for `sample_ms`.

    Args:
        average_ms: The one before; None before the first.
        sample_ms: From the moment a request got its slot to the moment it gave it back.
    """
    return sample_ms if average_ms is None else average_ms + (sample_ms - average_ms) / _SMOOTHING


def _own_seconds(value: bytes) -> float:
    text = value.decode("latin-1").strip()
    seconds = float(text) if _SECONDS.fullmatch(text) else 0.0
    if seconds <= 0:
        raise InvalidInputError(
            f"X-Request-Timeout is {text[:_SHOWN_MAX]!r};"
            " legal is a number of seconds above 0, such as 30 or 2.5"
        )
    return seconds


def _stainless_seconds(value: bytes) -> float | None:
    # Python's own rendering of a number: 600, 2.5, 1e-07.
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
