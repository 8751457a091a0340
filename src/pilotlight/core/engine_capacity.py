"""How many slots an engine is given, from what it says of its own load.

The concurrency that an endpoint is configured with is a promise nobody has checked: long prompts fill the
engine's KV cache, and what does not fit waits inside the engine, first come first served, where no key's
share counts and no other worker can take it over; or it is preempted and computed twice. So the gateway
keeps such requests: while an engine shows strain it gets about as many requests as it really runs, and a few
to follow at once. `loops.engine_load` reads the figures and applies what is decided here.

Why it settles instead of swinging: what is lowered is lowered to a measured number, never by guess; between
"many wait in it" (lower) and "nobody waits in it" (raise) lies a band in which nothing changes, and the few
that follow at once keep a busy engine in that band. Raised it is by no more than the width of that band at a
time, and by more only when for a while nothing has spoken against it, or all of it once the engine is empty.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

CACHE_FULL = 0.95
"""Share of the KV cache in use from which on running requests may soon have no room to grow: no more of
them."""

CACHE_EASY = 0.90
"""Below this share there is room for more. What lies between the two changes nothing."""

TOLERATED_SHARE = 16
"""One request in so many may wait in the engine, and one besides, so that a place which becomes free in it is
taken in its next step; arbitrary, small enough that nobody waits long there."""

STRAIN_MS = 900
"""How long strain must last: a prompt waits for the next step anyway, and a burst for its prefill. A little
below the period of the readings, so that two in a row are enough."""

RAISE_MS = 900
"""Shortest time from one change to the next raise, in which its effect can be seen."""

CALM_MS = 10_000
"""After so long with no request waiting and room in the cache it is raised by a quarter at a time;
arbitrary. A busy engine that is given all it can run has a request waiting in nearly every reading."""

GAP_MS = 5_000
"""Readings further apart say nothing about what lasted between them."""

UNKNOWN_MS = 30_000
"""After so long without a reading the limit is lifted: nobody knows whether it is still right."""


class CapacityReason(StrEnum):
    """Why a worker has the capacity that it has."""

    CONFIGURED = "configured"
    WAITING = "waiting_in_engine"
    CACHE_FULL = "cache_full"
    SETTLED = "settled"
    RECOVERING = "recovering"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReading:
    """What an engine says of itself.

    Attributes:
        running: Sequences in its batch.
        waiting: Sequences that wait for room in it.
        cache_use: Share of its KV cache in use, 0 to 1.
        preemptions: How often it threw a running sequence out, since it started. vLLM counts one when the
            sequence runs again, so this comes late.
    """

    running: int
    waiting: int
    cache_use: float = 0.0
    preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityState:
    """What is remembered of one engine from reading to reading.

    Attributes:
        limit: Slots it is held to; None for as many as configured.
        pressed_ms: When last anything spoke against more.
        changed_ms: When `limit` last changed.
        strained_ms: Since when every reading has shown strain; None when the last did not.
        served: Slots whose requests ran at the last reading.
        preemptions: Of the last reading; None before there was one.
        read_ms: When that was.
    """

    limit: int | None = None
    pressed_ms: int = 0
    changed_ms: int = 0
    strained_ms: int | None = None
    served: int = 0
    preemptions: int | None = None
    read_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityDecision:
    """How many slots a worker has from now on.

    Attributes:
        capacity: From 1 to the configured concurrency.
        limit: The same for `SlotTable.limit_worker`: None when it is the configured concurrency.
        reason: Why.
        state: For the next reading.
    """

    capacity: int
    limit: int | None
    reason: CapacityReason
    state: CapacityState


def decide_capacity(
    state: CapacityState, reading: EngineReading | None, now_ms: int, *, occupied: int, configured: int
) -> CapacityDecision:
    """How many requests and jobs an engine should have at a time.

    Args:
        state: What the last decision left; a fresh one for an engine that is new.
        reading: What the engine says; None when it said nothing this time.
        now_ms: The moment of the reading.
        occupied: Slots of the worker in use at this moment. Requests with several sequences take one slot
            and many places in the engine: only the proportion of the two counts.
        configured: Slots it has when it is not limited; at least 1.
    """
    if state.limit is not None and state.limit >= configured:
        state = replace(state, limit=None)
    if reading is None:
        return _unknown(state, now_ms, configured)
    present = configured if state.limit is None else state.limit
    sequences = reading.running + reading.waiting
    if not sequences and reading.cache_use < CACHE_EASY:
        # What strained it is over; the next burst finds all of its cache, as the first one did.
        fresh = CapacityState(preemptions=reading.preemptions, read_ms=now_ms)
        return _decision(fresh, CapacityReason.CONFIGURED, configured)
    served = occupied * reading.running // sequences if sequences else occupied
    tolerated = 1 + reading.running // TOLERATED_SHARE
    preempted = state.preemptions is not None and reading.preemptions > state.preemptions
    crowded = reading.waiting > tolerated or preempted
    strained = crowded or reading.cache_use >= CACHE_FULL
    recent = state.read_ms is not None and now_ms - state.read_ms <= GAP_MS
    since_ms = state.strained_ms if recent and state.strained_ms is not None else now_ms
    seen = replace(
        state,
        strained_ms=since_ms if strained else None,
        served=served,
        preemptions=reading.preemptions,
        read_ms=now_ms,
    )
    if strained:
        seen = replace(seen, pressed_ms=now_ms)
        if now_ms - since_ms < STRAIN_MS:
            return _decision(seen, CapacityReason.SETTLED, configured)
        # Of the last two readings the better one, and never less than half: an engine that preempts shows for
        # a moment next to nothing in its batch.
        following = max(1, tolerated * occupied // max(1, sequences)) if crowded else 0
        target = max(max(served, state.served) + following, present // 2)
        reason = CapacityReason.WAITING if crowded else CapacityReason.CACHE_FULL
        return _lowered(seen, target, now_ms, reason, configured)
    if reading.waiting or reading.cache_use >= CACHE_EASY:
        return _decision(replace(seen, pressed_ms=now_ms), CapacityReason.SETTLED, configured)
    return _raised(seen, now_ms, configured)


def _unknown(state: CapacityState, now_ms: int, configured: int) -> CapacityDecision:
    state = replace(state, strained_ms=None)
    if state.read_ms is None or now_ms - state.read_ms >= UNKNOWN_MS:
        state = CapacityState()
    return _decision(state, CapacityReason.UNKNOWN, configured)


def _lowered(
    state: CapacityState, target: int, now_ms: int, reason: CapacityReason, configured: int
) -> CapacityDecision:
    target = max(1, target)
    if target < (configured if state.limit is None else state.limit):
        state = replace(state, limit=target, changed_ms=now_ms)
    return _decision(state, reason, configured)


def _raised(state: CapacityState, now_ms: int, configured: int) -> CapacityDecision:
    if state.limit is None or now_ms - state.changed_ms < RAISE_MS:
        return _decision(state, CapacityReason.RECOVERING, configured)
    share = 4 if now_ms - state.pressed_ms >= CALM_MS else TOLERATED_SHARE
    raised = state.limit + 1 + state.limit // share
    state = replace(state, limit=raised if raised < configured else None, changed_ms=now_ms)
    return _decision(state, CapacityReason.RECOVERING, configured)


def _decision(state: CapacityState, reason: CapacityReason, configured: int) -> CapacityDecision:
    if state.limit is None and reason is not CapacityReason.UNKNOWN:
        reason = CapacityReason.CONFIGURED
    capacity = configured if state.limit is None else state.limit
    return CapacityDecision(capacity=capacity, limit=state.limit, reason=reason, state=state)
