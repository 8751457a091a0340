"""Which workers get no requests for a while, because they fail or are far slower than the others.

Circuit breaking looks at one worker: failures in a row suspend it; afterwards it gets one request, whose
outcome decides; the pauses double. Outlier ejection compares it with the others. Neither ever takes more than
half of an endpoint's workers, or the only one: what all of them do is no worker's fault. `gateway.router`
tells what happened and acts on the decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from statistics import median

import msgspec

FAILURES_MAX = 5
"""Failures in a row after which a worker is suspended."""

PAUSE_MS, PAUSE_MS_MAX = 2_000, 60_000
"""The first suspension, and the longest; each is twice as long as the one before."""

PROBE_MS = 5_000
"""After so long another request may follow the first one: a long answer that has not failed yet is a good
sign."""

SAMPLES_MIN = 20
"""A worker is compared with others once so many of its requests have ended; so many without a suspension
make earlier ones forgotten."""

WINDOW = 32
"""Rates are moving averages over about so many requests."""

ERROR_RATE = 0.5
ERROR_RATE_ABOVE = 0.3
"""Errors of an outlier: half of its requests, and so much more than the median of the others."""

SLOW_FACTOR = 4
SLOW_MS = 1_000
"""First bytes of an outlier: so many times the median of the others, and so much later."""


class Reason(StrEnum):
    """Why a worker is suspended or not."""

    WELL = "well"
    FAILURES = "failures_in_a_row"
    PROBE_FAILED = "probe_failed"
    ERROR_RATE = "error_rate"
    SLOW = "slow_first_byte"
    TOO_FEW_LEFT = "too_few_left"


class WorkerHealth(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """How a worker fares.

    Attributes:
        failures: Failed requests in a row.
        trips: Suspensions that are not forgotten.
        until_ms: End of the suspension; 0 when it is in full use. Passed, it is in use on probation.
        probe_ms: When the latest request on probation was let through; None for not yet.
        samples: Requests that ended since it is in use.
        error_rate: Share of them that failed, a moving average.
        timed: How many of them had a first byte.
        first_byte_ms: Time to it, a moving average.
    """

    failures: int = 0
    trips: int = 0
    until_ms: int = 0
    probe_ms: int | None = None
    samples: int = 0
    error_rate: float = 0.0
    timed: int = 0
    first_byte_ms: float = 0.0

    @property
    def takes_from_ms(self) -> int:
        """From when on it may get a request."""
        if self.probe_ms is None:
            return self.until_ms
        return max(self.until_ms, self.probe_ms + PROBE_MS)

    def probed(self, now_ms: int) -> WorkerHealth:
        """The same, as it gets a request now; without effect on a worker in full use."""
        return self if self.until_ms == 0 else msgspec.structs.replace(self, probe_ms=now_ms)


class Judgement(msgspec.Struct, frozen=True, gc=False):
    """What follows from the end of a request.

    Attributes:
        health: The worker's health from now on.
        reason: Why it is suspended, or not.
        pause_ms: For how long; 0 for not.
    """

    health: WorkerHealth
    reason: Reason
    pause_ms: int = 0


def judge(
    worker_id: str,
    fleet: Mapping[str, WorkerHealth],
    *,
    failed: bool,
    first_byte_ms: int | None,
    slow: bool,
    now_ms: int,
) -> Judgement:
    """What the end of a request means for the worker that served it.

    Args:
        worker_id: Which; one of the fleet.
        fleet: All workers of the endpoint as they were before.
        failed: Whether the worker was at fault.
        first_byte_ms: Time to the first byte of the answer; None where there was none.
        slow: Whether that was longer than `SLOW_MS` without the good reason of being busier than the others.
        now_ms: The moment, on a clock that never goes back and is above 0.
    """
    before = fleet[worker_id]
    if before.until_ms > now_ms:
        # Of a request that was sent before the suspension: it tells nothing new.
        return Judgement(before, Reason.WELL)
    health = _after(before, failed=failed, first_byte_ms=first_byte_ms)
    reason = _reason(worker_id, fleet, health, failed=failed, slow=slow)
    if reason is Reason.WELL:
        return Judgement(health, reason)
    beside = sum(other.until_ms != 0 for name, other in fleet.items() if name != worker_id)
    if 2 * (beside + 1) > len(fleet):
        return Judgement(health, Reason.TOO_FEW_LEFT)
    pause_ms = min(PAUSE_MS << min(health.trips, 16), PAUSE_MS_MAX)
    return Judgement(WorkerHealth(trips=health.trips + 1, until_ms=now_ms + pause_ms), reason, pause_ms)


def _after(health: WorkerHealth, *, failed: bool, first_byte_ms: int | None) -> WorkerHealth:
    samples = health.samples + 1
    timed, average = health.timed, health.first_byte_ms
    if first_byte_ms is not None and not failed:
        timed += 1
        average += (first_byte_ms - average) / min(timed, WINDOW)
    on_probation = failed and health.until_ms != 0
    return WorkerHealth(
        failures=health.failures + 1 if failed else 0,
        trips=0 if samples >= SAMPLES_MIN and not failed else health.trips,
        until_ms=health.until_ms if on_probation else 0,
        probe_ms=None,
        samples=samples,
        error_rate=health.error_rate + (failed - health.error_rate) / min(samples, WINDOW),
        timed=timed,
        first_byte_ms=average,
    )


def _reason(
    worker_id: str, fleet: Mapping[str, WorkerHealth], health: WorkerHealth, *, failed: bool, slow: bool
) -> Reason:
    if failed:
        if health.until_ms != 0:
            return Reason.PROBE_FAILED
        if health.failures >= FAILURES_MAX:
            return Reason.FAILURES
        if health.samples >= SAMPLES_MIN and health.error_rate >= ERROR_RATE:
            rates = [
                other.error_rate
                for name, other in fleet.items()
                if name != worker_id and other.samples >= SAMPLES_MIN
            ]
            if rates and health.error_rate >= median(rates) + ERROR_RATE_ABOVE:
                return Reason.ERROR_RATE
    elif slow and health.timed >= SAMPLES_MIN and health.first_byte_ms > SLOW_MS:
        times = [
            other.first_byte_ms
            for name, other in fleet.items()
            if name != worker_id and other.timed >= SAMPLES_MIN
        ]
        if times and health.first_byte_ms >= max(SLOW_FACTOR * median(times), median(times) + SLOW_MS):
            return Reason.SLOW
    return Reason.WELL
