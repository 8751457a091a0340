"""What the log says of ended jobs: a line for each that matters, and a sum of the rest.

A line costs more than everything else that ends a job, and thousands a second are read by nobody. Jobs that
ended well or were cancelled are summed up per endpoint every ten seconds; those that failed or timed out get
lines of their own, up to a bound per ten seconds, and are in the sum. Every job is in the request log and has
a timeline; at the level `debug` each has its line.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import structlog

from pilotlight.domain.job import Job, JobStatus

_log = structlog.get_logger()

_PERIOD_S = 10.0
_LINES_MAX = 20
"""Lines about failures per endpoint and period."""

_MATTERS = frozenset({JobStatus.FAILED, JobStatus.TIMED_OUT})


@dataclass(slots=True)
class _Sum:
    ended: dict[JobStatus, int] = field(default_factory=dict)
    lines: int = 0


class JobTally:
    """Counts ended jobs and says so. Lives on the event loop."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}

    def ended(self, job: Job, reason: str) -> None:
        """Take note of a job that has just become terminal; `reason` is the event that did it."""
        total = self._sums.get(job.endpoint_id)
        if total is None:
            total = self._sums[job.endpoint_id] = _Sum()
            asyncio.get_running_loop().call_later(_PERIOD_S, self._say, job.endpoint_id)
        total.ended[job.status] = total.ended.get(job.status, 0) + 1
        if job.status in _MATTERS and total.lines < _LINES_MAX:
            total.lines += 1
            say = _log.info
        else:
            say = _log.debug
        say(
            "job_finished",
            job_id=job.id,
            endpoint_id=job.endpoint_id,
            worker_id=job.worker_id,
            status=job.status.value,
            reason=reason,
            attempt=job.attempt,
        )

    def close(self) -> None:
        """Say what has not been said yet."""
        for endpoint_id in [*self._sums]:
            self._say(endpoint_id)

    def _say(self, endpoint_id: str) -> None:
        total = self._sums.pop(endpoint_id, None)
        if total is not None:
            counts = {status.value.lower(): count for status, count in total.ended.items()}
            _log.info("jobs_finished", endpoint_id=endpoint_id, **counts)
