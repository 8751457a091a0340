"""Whether a request is served now, held for a worker, or shed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import msgspec


class Verdict(StrEnum):
    """The three outcomes of admission."""

    ADMIT = "admit"
    QUEUE = "queue"
    SHED = "shed"


class AdmissionReason(StrEnum):
    """Why."""

    SLOT_FREE = "slot_free"
    NO_READY_WORKER = "no_ready_worker"
    ALL_SLOTS_BUSY = "all_slots_busy"
    HOLD_FULL = "hold_full"
    HOLD_BYTES_FULL = "hold_bytes_full"
    UNHEALTHY = "unhealthy"


HOLD_REASONS = frozenset({AdmissionReason.HOLD_FULL, AdmissionReason.HOLD_BYTES_FULL})
"""Why a request is shed for which there is no place to wait."""


class AdmissionSnapshot(msgspec.Struct, frozen=True, gc=False):
    """What admission depends on.

    A struct, because one is made for every request: it costs a fifth of a frozen dataclass.

    Attributes:
        ready_workers: Workers that could take requests.
        free_workers: Those with a free slot that would do for this request.
        ahead: Requests already held that would take a slot of any worker, all of which come first.
        held: Requests already held, whatever they wait for.
        held_bytes: Bytes of their bodies.
        body_bytes: Bytes of this request's body.
        retry_ms: Until when the endpoint starts no worker after failures; None when it may.
    """

    ready_workers: int
    free_workers: int
    ahead: int
    held: int
    held_bytes: int
    body_bytes: int
    retry_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Bounds of the hold, per endpoint."""

    requests: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """The decision. `retry_after_s` is set when the request is shed."""

    verdict: Verdict
    reason: AdmissionReason
    retry_after_s: int | None = None


_ADMITTED = Admission(verdict=Verdict.ADMIT, reason=AdmissionReason.SLOT_FREE)

_RETRY_AFTER_FULL_S = 5
"""Arbitrary: long enough not to hammer, short enough to notice a freed queue."""


def decide_admission(snapshot: AdmissionSnapshot, now_ms: int, limits: AdmissionLimits) -> Admission:
    """Admit when a slot is free and nobody waits for it, else hold within the limits, else shed.

    Args:
        snapshot: The endpoint at this moment.
        now_ms: The moment.
        limits: Bounds of the hold.
    """
    if snapshot.free_workers > 0 and snapshot.ahead == 0:
        return _ADMITTED
    if snapshot.ready_workers == 0 and snapshot.retry_ms is not None and snapshot.retry_ms > now_ms:
        seconds = max(1, -(-(snapshot.retry_ms - now_ms) // 1000))
        return Admission(verdict=Verdict.SHED, reason=AdmissionReason.UNHEALTHY, retry_after_s=seconds)
    if snapshot.held >= limits.requests:
        return Admission(
            verdict=Verdict.SHED, reason=AdmissionReason.HOLD_FULL, retry_after_s=_RETRY_AFTER_FULL_S
        )
    if snapshot.held_bytes + snapshot.body_bytes > limits.bytes:
        return Admission(
            verdict=Verdict.SHED, reason=AdmissionReason.HOLD_BYTES_FULL, retry_after_s=_RETRY_AFTER_FULL_S
        )
    if snapshot.ready_workers == 0:
        return Admission(verdict=Verdict.QUEUE, reason=AdmissionReason.NO_READY_WORKER)
    return Admission(verdict=Verdict.QUEUE, reason=AdmissionReason.ALL_SLOTS_BUSY)
