"""Recent failures of endpoints' workers, and until when none is started; kept by the fleet alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from pilotlight.core.supervision import CRASH_WINDOW_MS, BackoffSettings, decide_retry_at
from pilotlight.domain.endpoint import EndpointKind
from pilotlight.domain.worker import Failure
from pilotlight.loops.living import Living
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Health
from pilotlight.settings import WorkerSettings

_CRASHES_KEPT = 100


@dataclass(slots=True)
class _Record:
    """Recent failures of one endpoint."""

    start_failures: int = 0
    crashes_ms: list[int] = field(default_factory=list)
    failure: Failure | None = None
    last_ms: int = 0
    throttled: str | None = None


class FailureLog:
    """Counts failures and tells what follows from them.

    Args:
        clock: Time.
        settings: Pauses after failures.
    """

    def __init__(self, clock: Clock, settings: WorkerSettings) -> None:
        self._clock = clock
        self._backoff = BackoffSettings(
            start_failures_max=settings.start_failures_max,
            backoff_ms=settings.backoff_s * 1000,
            backoff_max_ms=settings.backoff_max_s * 1000,
        )
        self._records: dict[str, _Record] = {}

    def health(self, endpoint_id: str) -> Health:
        """The endpoint's recent starts, and until when no worker is started."""
        record = self._records.get(endpoint_id)
        if record is None:
            return Health()
        since = self._clock.now_ms() - CRASH_WINDOW_MS
        return Health(
            failures=record.start_failures or sum(moment > since for moment in record.crashes_ms),
            failure=record.failure,
            retry_ms=decide_retry_at(record.start_failures, record.crashes_ms, record.last_ms, self._backoff),
            throttled=record.throttled,
        )

    def forgive(self, endpoint_id: str) -> None:
        """Forget an endpoint's failures."""
        self._records.pop(endpoint_id, None)

    def note(self, endpoint_id: str, failure: Failure, *, started: bool) -> None:
        """Count a failure: of a worker that had been ready (`started`), or of a start."""
        record = self._record(endpoint_id)
        record.failure = failure
        record.last_ms = self._clock.now_ms()
        if started:
            record.crashes_ms = [*record.crashes_ms, record.last_ms][-_CRASHES_KEPT:]
        else:
            record.start_failures += 1

    def note_start(self, endpoint_id: str) -> None:
        """A worker has become ready: earlier starts that failed count no more."""
        record = self._record(endpoint_id)
        record.start_failures, record.failure = 0, None

    def throttle(self, endpoint_id: str, message: str | None) -> None:
        """Remember why there is no room for the endpoint's next worker; None for room."""
        self._record(endpoint_id).throttled = message

    def _record(self, endpoint_id: str) -> _Record:
        return self._records.setdefault(endpoint_id, _Record())


async def explain_exit(
    live: Living, code: int | None, last_line: Callable[[str], Awaitable[str]] | None
) -> Failure:
    """What is to be said of a worker whose process ended without a report.

    Args:
        live: Which.
        code: Its exit status, -N for signal N; None when unknown.
        last_line: Gives the last line that a worker wrote, "" for none. The log of a program that is not ours
            is the only place to look.
    """
    how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
    cause = f"worker ended with {how} in stage {live.worker.stage}"
    if live.endpoint.kind is EndpointKind.VLLM or last_line is None:
        return Failure(kind="exited", cause=cause)
    line = await last_line(live.worker.id)
    return Failure(
        kind="exited",
        cause=cause if line else f"{cause}, without a word",
        advice=f"see `pilotlight logs {live.endpoint.name}`",
        line=line,
    )
