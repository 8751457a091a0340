"""Readers of streams: `/stream` and its replay (serverless-api.md §2.8, §12 item 13)."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from pilotlight.domain.job import Job, JobStatus
from pilotlight.errors import NotFoundError
from pilotlight.gateway.errors import JOB_NOT_FOUND
from pilotlight.gateway.jobs.ledger import Ledger
from pilotlight.gateway.jobs.waiting import Gone, happened
from pilotlight.ports.store import Chunk

_ANSWER_BYTES = 8 * 1024 * 1024
"""Chunks put into one answer."""

_CANCELLED_MS = 60_000
"""Python's stream loop never ends on CANCELLED by itself; after this long it is told 404 (§2.8)."""

_CANCELLED_MAX = 10_000


class StreamPart(NamedTuple):
    """What one read of a stream brought.

    Attributes:
        status: Of the job; while more chunks remain than fit into one answer it is IN_PROGRESS.
        chunks: Raw JSON.
        attempt: Whose chunks they are, or would be.
    """

    status: JobStatus
    chunks: Sequence[bytes]
    attempt: int


class StreamReaders:
    """Reads streams for clients.

    Args:
        ledger: Jobs, and who waits for them.
        find: The job of an endpoint, as clients may see it, or NotFoundError.
        forgotten: Whether an ended job is unknown to clients.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        find: Callable[[str, str], Awaitable[Job]],
        forgotten: Callable[[Job], bool],
    ) -> None:
        self._ledger = ledger
        self._find = find
        self._forgotten = forgotten
        self._cancelled: OrderedDict[str, int] = OrderedDict()

    async def read(
        self, endpoint_id: str, job_id: str, *, hold_s: float, gone: Gone | None = None
    ) -> StreamPart:
        """Chunks not returned before, waiting for some, for a change of state, or for `hold_s` (§2.8).

        When the worker is lost, the stream of the next one begins anew (worker-protocol.md §7.2).

        Raises:
            NotFoundError: Unknown job, or a cancelled one whose reader does not stop by itself.
        """
        job, status, chunks = await self._read(endpoint_id, job_id, None, hold_s=hold_s, gone=gone)
        if status is JobStatus.CANCELLED and not chunks:
            self._check_cancelled(job_id)
        return StreamPart(status, [chunk.body for chunk in chunks], job.attempt)

    async def replay(
        self, endpoint_id: str, job_id: str, *, cursor: int, hold_s: float, gone: Gone | None = None
    ) -> tuple[JobStatus, Sequence[bytes], int]:
        """As `read`, but all chunks from a position on, as often as wanted (§12 item 13).

        Returns:
            The status, the chunks' raw JSON, and the position after them.
        """
        _, status, chunks = await self._read(endpoint_id, job_id, cursor, hold_s=hold_s, gone=gone)
        return status, [chunk.body for chunk in chunks], chunks[-1].sequence + 1 if chunks else cursor

    async def _read(
        self, endpoint_id: str, job_id: str, cursor: int | None, *, hold_s: float, gone: Gone | None
    ) -> tuple[Job, JobStatus, Sequence[Chunk]]:
        deadline = asyncio.get_running_loop().time() + hold_s
        ledger = self._ledger
        before = await self._find(endpoint_id, job_id)
        with ledger.signals.watch(job_id, group=endpoint_id) as changed:
            while True:
                changed.clear()
                if gone is not None and gone.done():
                    return before, before.status, []
                try:
                    job, chunks = await ledger.store.drain_chunks(
                        job_id, limit_bytes=_ANSWER_BYTES, cursor=cursor
                    )
                except NotFoundError:
                    raise NotFoundError(JOB_NOT_FOUND) from None
                if self._forgotten(job):
                    raise NotFoundError(JOB_NOT_FOUND)
                delivered = False
                try:
                    status = await self._status_with(job, chunks, cursor)
                    delivered = gone is None or not gone.done()
                finally:
                    if chunks and cursor is None and not delivered:
                        # Its reader has left, or gets an error: they are for the next one (§2.8).
                        await ledger.store.return_chunks(job_id, chunks, attempt=job.attempt)
                        ledger.signals.notify(job_id)
                if not delivered:
                    return before, before.status, []
                if chunks or job.status.terminal or job.status is not before.status or ledger.closing:
                    return job, status, chunks
                if not await happened(changed, deadline=deadline, gone=gone):
                    return job, status, []

    async def _status_with(self, job: Job, chunks: Sequence[Chunk], cursor: int | None) -> JobStatus:
        """The status to tell with these chunks: terminal only with the last of them."""
        if not chunks or not job.status.terminal:
            return job.status
        following = None if cursor is None else chunks[-1].sequence + 1
        more = await self._ledger.store.has_chunks(job.id, cursor=following)
        return JobStatus.IN_PROGRESS if more else job.status

    def _check_cancelled(self, job_id: str) -> None:
        now_ms = self._ledger.clock.now_ms()
        since_ms = self._cancelled.setdefault(job_id, now_ms)
        if now_ms - since_ms >= _CANCELLED_MS:
            raise NotFoundError(JOB_NOT_FOUND)
        if len(self._cancelled) > _CANCELLED_MAX:
            self._cancelled.popitem(last=False)
