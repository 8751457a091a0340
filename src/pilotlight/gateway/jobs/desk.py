"""The workers' side of the job road, in the terms of `worker-protocol.md`.

Takes, stop polls, heartbeats, results and chunks: the routes in `gateway.worker_protocol` authenticate and
read bodies; here is what the calls mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from pilotlight.core.lifecycle import Confirmed, Effect, JobEvent, Progressed, ResultPosted, WorkerLost
from pilotlight.domain.job import Job
from pilotlight.domain.worker import Failure, Stage, Worker
from pilotlight.errors import InvalidInputError, NotFoundError, PilotlightError
from pilotlight.gateway.jobs.ledger import Ledger
from pilotlight.gateway.jobs.links import HandOut, Poll, WorkerLink
from pilotlight.gateway.jobs.results import (
    ChunkTooLargeError,
    PostedResult,
    oversize,
    parse_chunk,
    parse_result,
)
from pilotlight.gateway.jobs.waiting import Gone, happened
from pilotlight.ports.fleet import StageReport
from pilotlight.settings import LimitSettings

_log = structlog.get_logger()

NO_RESULT_ERROR = "worker produced no result"
"""Error of a job that its worker finished without posting anything (worker-protocol.md §7.1 L1)."""

STOP_NOTHING = "-"
"""An id that no job has: it ends a stop poll without the pause that follows an empty answer (§6.3)."""

_POLLS_MAX = 64
"""Open takes per worker; old libraries keep one per slot, newer ones a single one."""

_ENDING_HOLD_S = 1.0
"""Hold of polls by a worker that is being ended, so that they do not delay its exit."""


class TooManyPollsError(PilotlightError):
    """A worker has more open takes than any library needs."""


class WorkerDesk:
    """What workers may ask and tell.

    Args:
        ledger: Jobs and bookkeeping.
        limits: Sizes of results and chunks.
        entropy: Random bytes, to spread the holds.
    """

    def __init__(self, ledger: Ledger, limits: LimitSettings, entropy: Callable[[int], bytes]) -> None:
        self._ledger = ledger
        self._limits = limits
        self._entropy = entropy

    def link(self, worker: Worker) -> WorkerLink | None:
        """What is known of a living worker; None when it has ended."""
        return self._ledger.link_of(worker)

    async def take(
        self, worker: Worker, *, count: int, holding: bool, gone: Gone, peer: tuple[str, int] | None = None
    ) -> Sequence[Job]:
        """Wait for jobs; empty when the hold is over, or when the worker is being ended.

        Args:
            worker: Who asks.
            count: Jobs wanted at most.
            holding: Its `job_in_progress`: whether it holds any job at the moment of asking.
            gone: Done when it hangs up; jobs handed to it then go back without using up their retry.
            peer: Its connection, where known.

        Raises:
            TooManyPollsError: Answer 429.
        """
        link = self.link(worker)
        if link is None:
            return []
        leased = len(link.hand_outs) if holding else 0
        await self._ledger.fleet.took(worker.id, slots=count + leased)
        if len(link.polls) >= _POLLS_MAX:
            raise TooManyPollsError(f"worker {worker.id} has {len(link.polls)} open takes")
        if not holding and not link.polls:
            await self._close_earlier(link, peer)
        poll = Poll(link, count, peer, asyncio.get_running_loop().create_future())
        either: set[asyncio.Future[Any]] = {poll.future, gone}
        dispatcher = self._ledger.dispatcher
        dispatcher.park(poll)
        hold_s = _ENDING_HOLD_S if link.released else self._spread(self._ledger.settings.take_hold_s)
        try:
            await asyncio.wait(either, timeout=hold_s, return_when=asyncio.FIRST_COMPLETED)
            poll.expired = True
            if poll.asking and not gone.done():
                # The store is being asked for this poll right now; its answer is a moment away.
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._leave(poll, deliver=False)
            raise
        # Nothing is awaited between this look and the write, unless the client reads too slowly.
        return self._leave(poll, deliver=not gone.done() and dispatcher.may_hand_out(link))

    async def stop_poll(self, worker: Worker, *, gone: Gone) -> Sequence[str]:
        """Wait for ids the worker should stop; empty when the hold is over."""
        link = self.link(worker)
        if link is None:
            return []
        link.stop_polls += 1
        try:
            return await self._stop_poll(link, gone=gone)
        finally:
            link.stop_polls -= 1
            link.stop_polled_ns = self._ledger.clock.monotonic_ns()

    async def _stop_poll(self, link: WorkerLink, *, gone: Gone) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        if link.released:
            if not link.stop_pending:
                await asyncio.wait({gone}, timeout=_ENDING_HOLD_S)
            return link.take_stops() or [STOP_NOTHING]
        deadline = loop.time() + self._spread(self._ledger.settings.stop_hold_s)
        await happened(link.stop_changed, deadline=deadline, gone=gone)
        if gone.done():
            return []
        return link.take_stops() or ([STOP_NOTHING] if link.released else [])

    async def ping(self, worker: Worker, job_ids: Sequence[str], *, complete: bool) -> None:
        """Take a heartbeat: what it lists is confirmed, what it lists no more is lost (§5).

        Args:
            worker: Who.
            job_ids: Jobs it says it holds.
            complete: Whether the list cannot have been cut short.
        """
        link = self.link(worker)
        if link is None:
            return
        link.pinged_ns = self._ledger.clock.monotonic_ns()
        # Nothing is awaited while two pings are compared, so they are compared in the order they came.
        listed, previous = frozenset(job_ids), link.listed
        confirmed = [link.hand_outs[job_id] for job_id in listed if job_id in link.hand_outs]
        confirmed = [hand_out for hand_out in confirmed if not hand_out.confirmed]
        for hand_out in confirmed:
            hand_out.confirmed = True
        missing = [link.hand_outs[job_id] for job_id in previous - listed if job_id in link.hand_outs]
        # A post that is being received may be the final one; the next ping looks again.
        undecided = {hand_out.job_id for hand_out in missing if hand_out.posts or not complete}
        link.listed = listed | undecided
        self._look_at_stops(link, listed, previous)
        for hand_out in confirmed:
            await self._apply(hand_out.job_id, Confirmed(worker_id=worker.id))
        for hand_out in missing:
            if hand_out.job_id not in undecided:
                await self._lose(link, hand_out, arrived=True)

    async def unhealthy(self, worker: Worker, *, check: str, reason: str) -> None:
        """Take the last word of a worker that failed its own start-up check (§3.6); it is ended."""
        text = f"fitness check {check or 'unknown'} failed: {reason or 'no reason given'}"
        _log.warning("worker_unhealthy", worker_id=worker.id, endpoint_id=worker.endpoint_id, reason=text)
        failure = Failure(kind="fitness_check", cause=text, advice="See the worker's log.")
        await self._ledger.fleet.reported(worker.id, StageReport(stage=Stage.FAILED, failure=failure))
        self._ledger.spawn(self._ledger.fleet.kill(worker.id, reason=text), f"kill-{worker.id}")

    async def result(
        self, worker: Worker, job_id: str, body: bytes | None, size: int, *, final_stream: bool
    ) -> None:
        """Take a `job-done` post: a result or a progress value (§4.1).

        Args:
            worker: Who posts.
            job_id: For which job.
            body: The post; None when it was larger than anything we keep.
            size: Its length in bytes.
            final_stream: Whether the query said `isStream=true`, the end of a generator.
        """
        link = self.link(worker)
        if link is None:
            return
        posted = _read_result(body)
        if posted is not None and posted.progress and not final_stream:
            await self._progress(link, job_id, posted)
            return
        event = self._final(worker.id, job_id, posted, size, too_large=body is None)
        await self._apply(job_id, event)
        if posted is not None and posted.replace_worker:
            # Before anything is awaited: with the per-result form it goes on polling (§6.4).
            link.retiring = True
            self._ledger.spawn(
                self._ledger.fleet.drain(worker.id, reason="the worker asked to be replaced"),
                f"drain-{worker.id}",
            )

    async def chunk(
        self, worker: Worker, job_id: str, body: bytes | None, size: int, *, sequence: int | None = None
    ) -> None:
        """Take a `job-stream` post; a chunk over the limit is split when it is text, else fails the job.

        Args:
            worker: Who posts.
            job_id: For which job.
            body: The post; None when it was larger than anything we keep.
            size: Its length in bytes.
            sequence: Its number, from workers that offer a chunk again when they had no answer; one that
                was stored already is dropped.
        """
        link = self.link(worker)
        hand_out = link.hand_outs.get(job_id) if link else None
        if link is None or hand_out is None:
            return
        if sequence is not None and sequence <= hand_out.last_sequence:
            return
        ledger = self._ledger
        try:
            if body is None:
                raise ChunkTooLargeError(f"stream chunk exceeds 1 MB limit (got {size} bytes)")
            pieces = parse_chunk(body, limit=self._limits.chunk_bytes)
        except ChunkTooLargeError as error:
            _log.warning("chunk_too_large", worker_id=worker.id, job_id=job_id, size=size)
            now_ms = ledger.clock.now_ms()
            await self._apply(job_id, ResultPosted(worker_id=worker.id, now_ms=now_ms, error=str(error)))
            link.stop(job_id, deadline_ns=ledger.stop_deadline_ns())
            return
        except InvalidInputError as error:
            _log.warning("chunk_ignored", worker_id=worker.id, job_id=job_id, error=str(error))
            return
        for piece in pieces:
            try:
                stored = await ledger.store.append_chunk(job_id, worker.id, piece)
            except NotFoundError:
                return
            if not stored:
                return
            hand_out.confirmed = True
            if hand_out.first_chunk_ms is None:
                hand_out.first_chunk_ms = ledger.clock.now_ms()
            if b"usage" in piece:
                hand_out.usage_chunk = piece
            ledger.signals.notify(job_id)
        if sequence is not None:
            hand_out.last_sequence = sequence

    def _leave(self, poll: Poll, *, deliver: bool) -> Sequence[Job]:
        """End a take; jobs that cannot be delivered go back."""
        poll.closed = True
        dispatcher = self._ledger.dispatcher
        dispatcher.unpark(poll)
        jobs = poll.future.result() if poll.future.done() else []
        if deliver or not jobs:
            return jobs
        self._ledger.spawn(dispatcher.give_back(jobs), f"give-back-{poll.link.worker_id}")
        return []

    def _spread(self, seconds: int) -> float:
        # ± 10 %, so that the polls of many workers do not end together (§8).
        return seconds * (0.9 + 0.2 * self._entropy(1)[0] / 255)

    def _final(
        self, worker_id: str, job_id: str, posted: PostedResult | None, size: int, *, too_large: bool
    ) -> ResultPosted:
        now_ms = self._ledger.clock.now_ms()
        limits = self._limits
        limit = limits.sync_result_bytes if job_id.startswith("sync-") else limits.result_bytes
        if posted is None:
            error = (
                oversize(size, limit) if too_large else "the worker posted a result that is not valid JSON"
            )
            return ResultPosted(worker_id=worker_id, now_ms=now_ms, error=error)
        length = len(posted.output or b"")
        if length > limit:
            return ResultPosted(worker_id=worker_id, now_ms=now_ms, error=oversize(length, limit))
        error_text = posted.error
        if error_text is not None and len(error_text) > limit // 4:
            # UTF-8 takes up to four bytes per character.
            error_text = error_text[: limit // 4]
        return ResultPosted(
            worker_id=worker_id,
            now_ms=now_ms,
            output=posted.output,
            error=error_text,
            retryable=posted.retryable,
        )

    async def _progress(self, link: WorkerLink, job_id: str, posted: PostedResult) -> None:
        hand_out = link.hand_outs.get(job_id)
        if hand_out is None:
            return
        hand_out.confirmed = True
        if len(posted.output or b"") > self._limits.result_bytes:
            _log.warning("progress_ignored", worker_id=link.worker_id, job_id=job_id, reason="too large")
            return
        await self._apply(job_id, Progressed(worker_id=link.worker_id, output=posted.output))

    def _look_at_stops(self, link: WorkerLink, listed: frozenset[str], previous: frozenset[str]) -> None:
        for job_id in [*link.stopping]:
            if job_id not in listed:
                del link.stopping[job_id]
                link.stop_pending.pop(job_id, None)
        # A signal that came before the job had started was ignored (§3.3), and a job that was taken away
        # from the worker may have reached it after all: what it lists twice without right is stopped.
        for job_id in listed - link.hand_outs.keys():
            if job_id in link.stopping or job_id in previous:
                link.stop(job_id, deadline_ns=self._ledger.stop_deadline_ns())
        freed = [job_id for job_id in link.avoid if job_id not in listed]
        for job_id in freed:
            del link.avoid[job_id]
        if freed:
            self._ledger.dispatcher.stop_avoiding(link)

    async def _close_earlier(self, link: WorkerLink, peer: tuple[str, int] | None) -> None:
        """Close every hand-out to a worker that says it holds nothing (§5)."""
        for hand_out in [*link.hand_outs.values()]:
            if not hand_out.posts:
                same = peer is not None and hand_out.peer == peer
                await self._lose(link, hand_out, arrived=hand_out.confirmed or same)
        if not link.hand_outs:
            link.stopping.clear()
            link.stop_pending.clear()
            link.avoid.clear()
            link.listed = frozenset()
            self._ledger.dispatcher.stop_avoiding(link)

    async def _lose(self, link: WorkerLink, hand_out: HandOut, *, arrived: bool) -> None:
        """End an attempt that will have no result: FAILED when the worker made none, else requeued."""
        now_ms, worker_id = self._ledger.clock.now_ms(), link.worker_id
        if arrived and not hand_out.post_failed:
            event: JobEvent = ResultPosted(worker_id=worker_id, now_ms=now_ms, error=NO_RESULT_ERROR)
        else:
            reason = "result lost on its way" if arrived else "job never reached the worker"
            event = WorkerLost(worker_id=worker_id, now_ms=now_ms, reason=reason)
        await self._apply(hand_out.job_id, event)

    async def _apply(self, job_id: str, event: JobEvent) -> None:
        """Apply an event; one that comes late, twice or for another attempt changes nothing."""
        try:
            applied = await self._ledger.apply(job_id, event)
        except NotFoundError:
            _log.info("late_post", job_id=job_id, reason="unknown job")
            return
        if applied.effect in {Effect.IGNORED_TERMINAL, Effect.IGNORED_OTHER_ATTEMPT}:
            _log.info("late_post", job_id=job_id, reason=applied.effect.value)


def _read_result(body: bytes | None) -> PostedResult | None:
    if body is None:
        return None
    try:
        return parse_result(body)
    except InvalidInputError:
        return None
