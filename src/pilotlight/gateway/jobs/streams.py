"""Stream chunks as they come from workers, and what is kept of a long stream; called by `desk`.

What nobody has read is bounded by the store, with every chunk. What has been read stays for readers with a
cursor (serverless-api.md §12 item 13), and would fill the disk with a job that streams for days.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable

import structlog

from pilotlight.errors import InvalidInputError, NotFoundError, StoreError
from pilotlight.gateway.jobs.ledger import Ledger
from pilotlight.gateway.jobs.links import HandOut, WorkerLink
from pilotlight.gateway.jobs.results import ChunkTooLargeError, parse_chunk
from pilotlight.ports.store import ChunkFate
from pilotlight.settings import LimitSettings

_log = structlog.get_logger()

_SLICE = 1_000
"""Chunks forgotten in one go, so that other users of the store get their turn."""


class Chunks:
    """Stores the chunks of running jobs.

    Args:
        ledger: Jobs and bookkeeping.
        limits: Sizes of chunks and streams.
        fail: Ends a job whose worker goes on, with an error.
        note: Adds a line to the log of a worker.
    """

    def __init__(
        self,
        ledger: Ledger,
        limits: LimitSettings,
        *,
        fail: Callable[[WorkerLink, HandOut, str], Awaitable[None]],
        note: Callable[[str, str], object],
    ) -> None:
        self._ledger = ledger
        self._limits = limits
        self._fail = fail
        self._note = note

    async def store(
        self,
        link: WorkerLink,
        hand_out: HandOut,
        body: bytes | None,
        size: int,
        *,
        sequence: int | None = None,
    ) -> None:
        """Take a `job-stream` post; a chunk over the limit is split when it is text, else fails the job.

        Args:
            link: Who posts.
            hand_out: For which attempt.
            body: The post; None when it was larger than anything we keep.
            size: Its length in bytes.
            sequence: Its number, from workers that offer a chunk again when they had no answer; one that
                was stored already is dropped.

        Raises:
            StoreError: It may be posted again; pieces that were stored are not stored twice
                (worker-protocol.md §7.2).
        """
        if hand_out.storing is None:
            hand_out.storing = asyncio.Lock()
        async with hand_out.storing:
            if sequence is not None and sequence <= hand_out.last_sequence:
                return
            # Only after a failure of ours the same is posted again.
            if hand_out.broken is None or hand_out.broken != _digest(body):
                hand_out.pieces = 0
            try:
                stored = await self._store(link, hand_out, body, size)
            except StoreError:
                hand_out.broken = _digest(body)
                raise
            hand_out.broken = None
            if stored and sequence is not None:
                hand_out.last_sequence = sequence

    async def _store(self, link: WorkerLink, hand_out: HandOut, body: bytes | None, size: int) -> bool:
        """Store the pieces of a chunk but for those that are; whether the last of them is stored."""
        ledger, worker, job_id = self._ledger, link.worker_id, hand_out.job_id
        try:
            if body is None:
                raise ChunkTooLargeError(f"stream chunk exceeds 1 MB limit (got {size} bytes)")
            pieces = parse_chunk(body, limit=self._limits.chunk_bytes)
        except ChunkTooLargeError as error:
            _log.warning("chunk_too_large", worker_id=worker, job_id=job_id, size=size)
            self._note(worker, f"job {job_id} failed: {error}")
            await self._fail(link, hand_out, str(error))
            return False
        except InvalidInputError as error:
            _log.warning("chunk_ignored", worker_id=worker, job_id=job_id, error=str(error))
            return False
        for piece in pieces[hand_out.pieces :]:
            try:
                fate = await ledger.store.append_chunk(
                    job_id,
                    worker,
                    piece,
                    attempt=hand_out.attempt,
                    now_ms=ledger.clock.now_ms(),
                    limit_bytes=self._limits.stream_bytes,
                )
            except NotFoundError:
                return False
            if fate is ChunkFate.FULL:
                limit = self._limits.stream_bytes / 1_048_576
                reason = f"nobody reads the stream: more than {limit:g} MB of chunks wait for a reader"
                await self._fail(link, hand_out, reason)
            if fate is not ChunkFate.STORED:
                return False
            hand_out.pieces += 1
            hand_out.show()
            if hand_out.first_chunk_ms is None:
                hand_out.first_chunk_ms = ledger.clock.now_ms()
            if b"usage" in piece:
                hand_out.usage_chunk = piece
            ledger.signals.notify(job_id)
            hand_out.streamed += len(piece)
        await self._forget_read(hand_out)
        return True

    async def _forget_read(self, hand_out: HandOut) -> None:
        """Forget what was read of a stream, each time that `stream_bytes` more have been stored of it."""
        if hand_out.streamed <= self._limits.stream_bytes:
            return
        hand_out.streamed = 0
        try:
            while await self._ledger.store.trim_chunks(hand_out.job_id, limit=_SLICE) == _SLICE:
                pass
        except StoreError as error:
            # What the worker posted is stored, and it must not post it again.
            _log.warning("stream_not_trimmed", job_id=hand_out.job_id, error=str(error))


def _digest(body: bytes | None) -> bytes:
    return hashlib.sha256(body or b"").digest()
