"""The workers' side of the job road, in the terms of `worker-protocol.md`.

Takes, stop polls, heartbeats, results and chunks: the routes in `gateway.worker_protocol` authenticate and
read bodies; here is what the calls mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from pilotlight.core.lifecycle import (
    Applied,
    Confirmed,
    Effect,
    JobEvent,
    PlatformInterrupted,
    Progressed,
    ResultPosted,
    WorkerLost,
)
from pilotlight.domain.endpoint import EndpointKind
from pilotlight.domain.job import Job
from pilotlight.domain.worker import Failure, Stage, Worker
from pilotlight.errors import InvalidInputError, NotFoundError, PilotlightError, StoreError
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.jobs.buckets import Buckets, Outsize
from pilotlight.gateway.jobs.ledger import Ledger
from pilotlight.gateway.jobs.links import HandOut, Poll, WorkerLink
from pilotlight.gateway.jobs.results import PostedResult, oversize, parse_result
from pilotlight.gateway.jobs.streams import Chunks
from pilotlight.gateway.jobs.waiting import Gone, happened
from pilotlight.gateway.protocol import ClientStream
from pilotlight.ports.fleet import StageReport
from pilotlight.settings import LimitSettings

_log = structlog.get_logger()

NO_RESULT_ERROR = "worker produced no result"
"""Error of a job that its worker finished without posting anything (worker-protocol.md §7.1 L1)."""

STOP_NOTHING = "-"
"""An id that no job has: it ends a stop poll without the pause that follows an empty answer (§6.3)."""

_POLLS_MAX = 64
"""Open takes per worker; old libraries keep one per slot, newer ones a single one."""

_CROSSING_NS = 2_000_000_000
"""A worker with several open takes may have asked on one, saying that it holds nothing, before it read the
job that was answered on another; arbitrary, far longer than that can take."""

_REPLACED_GRACE_S = 10.0
"""From SIGTERM to SIGKILL of a worker that asked to be replaced (worker-protocol.md §8)."""

_ENDING_HOLD_S = 1.0
"""Hold of polls by a worker that is being ended, so that they do not delay its exit."""


class TooManyPollsError(PilotlightError):
    """A worker has more open takes than any library needs."""


class WorkerDesk:
    """What workers may ask and tell.

    Args:
        ledger: Jobs and bookkeeping.
        directory: Tells the kind of a worker's endpoint.
        limits: Sizes of results and chunks.
        entropy: Random bytes, to spread the holds.
        buckets: Opens the `s3Config` of jobs, and takes results that are too large.
        note: Adds a line to the log of a worker.
    """

    def __init__(
        self,
        ledger: Ledger,
        directory: Directory,
        limits: LimitSettings,
        *,
        entropy: Callable[[int], bytes],
        buckets: Buckets,
        note: Callable[[str, str], object],
    ) -> None:
        self._ledger = ledger
        self._directory = directory
        self._limits = limits
        self._entropy = entropy
        self._buckets = buckets
        self._note = note
        self._chunks = Chunks(ledger, limits, fail=self._fail, note=note)

    def link(self, worker: Worker) -> WorkerLink | None:
        """What is known of a living worker; None when it has ended."""
        return self._ledger.link_of(worker)

    async def take(
        self, worker: Worker, *, count: int, holding: bool, gone: Gone, connection: ClientStream | None = None
    ) -> Sequence[Job]:
        """Wait for jobs; empty when the hold is over, or when the worker is being ended.

        Args:
            worker: Who asks.
            count: Jobs wanted at most.
            holding: Its `job_in_progress`: whether it holds any job at the moment of asking.
            gone: Done when it hangs up; jobs handed to it then go back without using up their retry.
            connection: Its connection, where known.

        Raises:
            TooManyPollsError: Answer 429.
        """
        link = self.link(worker)
        if link is None:
            return []
        link.several_polls = link.several_polls or bool(link.polls)
        link.note_take()
        self._ledger.dispatcher.look_again(link)
        await self._ledger.fleet.took(worker.id, slots=self._slots_of(link, count, holding=holding))
        if len(link.polls) >= _POLLS_MAX:
            raise TooManyPollsError(f"worker {worker.id} has {len(link.polls)} open takes")
        if not holding and not link.polls:
            await self._close_earlier(link)
        loop = asyncio.get_running_loop()
        poll = Poll(link, count, connection, loop.create_future())
        self._ledger.dispatcher.park(poll)
        hold_s = _ENDING_HOLD_S if link.released else self._spread(self._ledger.settings.take_hold_s)
        timer = loop.call_later(hold_s, poll.expire)
        try:
            return await self._answer_of(poll, gone)
        finally:
            timer.cancel()
            link.asked_ns = self._ledger.clock.monotonic_ns()

    async def _answer_of(self, poll: Poll, gone: Gone) -> Sequence[Job]:
        """The jobs of a take, when it is resolved; none when its client has gone, and they go back then."""
        gone.add_done_callback(poll.hang_up)
        try:
            await poll.future
        except asyncio.CancelledError:
            self._leave(poll, deliver=False)
            raise
        finally:
            gone.remove_done_callback(poll.hang_up)
        # Nothing is awaited between this look and the write, unless the client reads too slowly.
        deliver = not gone.done() and self._ledger.dispatcher.may_hand_out(poll.link)
        return self._opened(self._leave(poll, deliver=deliver))

    def _opened(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """Jobs with their `s3Config` readable; those for which it is lost fail, and are not handed over."""
        readable, lost = self._buckets.opened(jobs)
        for job, error in lost:
            assert job.worker_id is not None
            now_ms = self._ledger.clock.now_ms()
            event = ResultPosted(worker_id=job.worker_id, now_ms=now_ms, error=error, attempt=job.attempt)
            _log.error("s3_config_lost", job_id=job.id, endpoint_id=job.endpoint_id)
            self._ledger.spawn(self._apply(job.id, event), f"fail-{job.id}")
        return readable

    async def stop_poll(self, worker: Worker, *, gone: Gone) -> Sequence[str]:
        """Wait for ids the worker should stop; empty when the hold is over."""
        link = self.link(worker)
        if link is None:
            return []
        link.stop_polls += 1
        link.stop_broken_ns = None
        try:
            return await self._stop_poll(link, gone=gone)
        finally:
            link.stop_polls -= 1
            link.stop_polled_ns = self._ledger.clock.monotonic_ns()
            if gone.done() and not link.stop_polls:
                link.stop_broken_ns = link.stop_polled_ns

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

    async def ping(
        self, worker: Worker, job_ids: Sequence[str], *, complete: bool, library: str = ""
    ) -> None:
        """Take a heartbeat: what it lists is confirmed, what it lists no more is lost (§5).

        Args:
            worker: Who.
            job_ids: Jobs it says it holds.
            complete: Whether the list cannot have been cut short.
            library: Version of its library, as it says.
        """
        link = self.link(worker)
        if link is None:
            return
        if link.library is None:
            link.library = library
            _log.info("worker_library", worker_id=worker.id, version=library or "unknown")
            self._note(worker.id, f"the worker's library is {library or 'of an unknown version'}")
        link.pinged_ns = self._ledger.clock.monotonic_ns()
        # Nothing is awaited while two pings are compared, so they are compared in the order they came.
        listed, previous = frozenset(job_ids), frozenset(link.listed)
        shown = [link.hand_outs[job_id] for job_id in listed if job_id in link.hand_outs]
        unrecorded = [hand_out for hand_out in shown if not hand_out.recorded]
        for hand_out in unrecorded:
            hand_out.show()
        missing = [link.hand_outs[job_id] for job_id in previous - listed if job_id in link.hand_outs]
        # A post that is being received may be the final one; the next ping looks again.
        lost: list[HandOut] = []
        if complete and not link.bodies:
            lost = [hand_out for hand_out in missing if not hand_out.posts]
            lost += [hand_out for hand_out in link.note_list(listed) if hand_out not in missing]
        # Until the store knows of a loss, the next ping must find it again.
        link.listed = {*listed, *(hand_out.job_id for hand_out in missing)}
        self._look_at_stops(link, listed, previous)
        now_ms = self._ledger.clock.now_ms()
        events = [(hand_out.job_id, self._loss(link, hand_out, arrived=True)) for hand_out in lost]
        for hand_out in unrecorded:
            event = Confirmed(worker_id=worker.id, now_ms=now_ms, attempt=hand_out.attempt)
            events.append((hand_out.job_id, event))
        try:
            await self._apply_many(events)
        except StoreError as error:
            # The worker has done its part; what the store has missed comes with the next heartbeat.
            _log.warning("heartbeat_not_recorded", worker_id=worker.id, error=str(error))
            for hand_out in unrecorded:
                hand_out.recorded = False
        else:
            link.listed -= {hand_out.job_id for hand_out in lost}
        self._ledger.dispatcher.look_again(link)

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
        event, replace_worker = self._posted(link, job_id, body, size, final_stream=final_stream)
        if replace_worker:
            self._replace(link)
        if isinstance(event, Outsize):
            event = await self._buckets.settle(job_id, event)
        if event is not None:
            await self._apply(job_id, event)

    async def results(self, worker: Worker, items: Sequence[tuple[str, bytes, bool]]) -> None:
        """Take many `job-done` posts at once: they are applied in their order, in one go.

        Args:
            worker: Who posts.
            items: (job id, body, `isStream`) of each.

        Raises:
            StoreError: None of them was applied.
        """
        link = self.link(worker)
        if link is not None:
            await self._apply_many(await self._events_of(link, items))

    async def results_and_take(
        self,
        worker: Worker,
        items: Sequence[tuple[str, bytes, bool]],
        *,
        count: int,
        gone: Gone,
        connection: ClientStream | None,
    ) -> Sequence[Job]:
        """As `results`, and hand out jobs for the slots that are free then; none where none is queued.

        Args:
            worker: Who posts.
            items: (job id, body, `isStream`) of each.
            count: Jobs wanted at most.
            gone: As of `take`.
            connection: As of `take`.

        Raises:
            StoreError: None of the results was applied, and no job is handed out.
        """
        link = self.link(worker)
        if link is None:
            return []
        events = await self._events_of(link, items)
        ended = {job_id for job_id, event in events if not isinstance(event, Progressed)}
        leaving = len(ended & link.hand_outs.keys())
        held = len(link.hand_outs) - leaving
        await self._ledger.fleet.took(worker.id, slots=self._shown(link, held + count))
        # A task, though it is awaited here: so both reach the store before it begins to write either.
        storing = asyncio.create_task(self._apply_many(events), name=f"results-{worker.id}")
        poll = Poll(link, count, connection, asyncio.get_running_loop().create_future())
        asked = self._ledger.dispatcher.ask_with(poll, storing, leaving=leaving)
        try:
            await storing
        except BaseException:
            self._leave(poll, deliver=False)
            raise
        return await self._answer_of(poll, gone) if asked else []

    async def _events_of(
        self, link: WorkerLink, items: Sequence[tuple[str, bytes, bool]]
    ) -> list[tuple[str, JobEvent]]:
        """What posts mean for their jobs, in their order; results that are too large are stored elsewhere."""
        posted: list[tuple[str, JobEvent | Outsize]] = []
        for job_id, body, final_stream in items:
            event, replace_worker = self._posted(link, job_id, body, len(body), final_stream=final_stream)
            if replace_worker:
                self._replace(link)
            if event is not None:
                posted.append((job_id, event))
        large = [(job_id, event) for job_id, event in posted if isinstance(event, Outsize)]
        settled = iter(
            await asyncio.gather(*(self._buckets.settle(*each) for each in large)) if large else ()
        )
        return [(job_id, next(settled) if isinstance(event, Outsize) else event) for job_id, event in posted]

    async def chunk(
        self, worker: Worker, job_id: str, body: bytes | None, size: int, *, sequence: int | None = None
    ) -> None:
        """Take a `job-stream` post: see `Chunks.store`."""
        link = self.link(worker)
        hand_out = link.hand_outs.get(job_id) if link else None
        if link is None or hand_out is None:
            return
        await self._chunks.store(link, hand_out, body, size, sequence=sequence)

    async def _fail(self, link: WorkerLink, hand_out: HandOut, error: str) -> None:
        """End a job whose worker goes on, and tell the worker."""
        now_ms = self._ledger.clock.now_ms()
        event = ResultPosted(worker_id=link.worker_id, now_ms=now_ms, error=error, attempt=hand_out.attempt)
        await self._apply(hand_out.job_id, event)
        link.stop(hand_out.job_id, deadline_ns=self._ledger.stop_deadline_ns())

    def _leave(self, poll: Poll, *, deliver: bool) -> Sequence[Job]:
        """End a take; jobs that cannot be delivered go back."""
        poll.closed = True
        dispatcher = self._ledger.dispatcher
        dispatcher.unpark(poll)
        given = poll.future.result() if poll.future.done() and not poll.future.cancelled() else []
        # What ended, or was taken away, after the store had given it must not be run.
        hand_outs = poll.link.hand_outs
        jobs = [job for job in given if job.id in hand_outs and hand_outs[job.id].attempt == job.attempt]
        if deliver or not jobs:
            return jobs
        poll.link.return_all(jobs)
        self._ledger.spawn(dispatcher.give_back(jobs), f"give-back-{poll.link.worker_id}")
        return []

    def _spread(self, seconds: int) -> float:
        # ± 10 %, so that the polls of many workers do not end together, and never more than 60 s (§8).
        return min(60.0, seconds * (0.9 + 0.2 * self._entropy(1)[0] / 255))

    def _slots_of(self, link: WorkerLink, count: int, *, holding: bool) -> int:
        """Slots that a worker shows with a take (§6.2).

        An idle one asks for all it has, and a busy one may ask for fewer than are free. Libraries before 1.7
        ask for one while idle, and for as many as they have, each on its own, while busy.
        """
        if link.several_polls:
            return self._shown(link, len(link.polls) + count)
        return self._shown(link, count + len(link.hand_outs)) if holding else count

    def _shown(self, link: WorkerLink, slots: int) -> int:
        """Slots that a busy worker shows when it asks as if it had so many: no fewer than are known."""
        known = self._ledger.slots.worker(link.worker_id)
        return slots if known is None else max(known.capacity, slots)

    def _posted(
        self, link: WorkerLink, job_id: str, body: bytes | None, size: int, *, final_stream: bool
    ) -> tuple[JobEvent | Outsize | None, bool]:
        """What a `job-done` post means for its job, and whether it asks for a new worker (`stopPod`).

        For a job that the worker does not hold any more it means nothing (§7.2).
        """
        posted = _read_result(body)
        hand_out = link.hand_outs.get(job_id)
        if posted is not None and posted.progress and not final_stream:
            return self._progressed(link, hand_out, posted), False
        replace_worker = posted is not None and posted.replace_worker
        if hand_out is None:
            _log.info("late_post", job_id=job_id, worker_id=link.worker_id, reason="not in its hands")
            return None, replace_worker
        return self._final(link, hand_out, posted, size, too_large=body is None), replace_worker

    def _replace(self, link: WorkerLink) -> None:
        """Give it nothing more, at once, since its open takes may be served meanwhile, and drain it (§6.4).

        It is told to end when its last slot is free, so what it has posted just now is not in danger.
        """
        if link.retiring:
            return
        link.retiring = True
        drain = self._ledger.fleet.drain(
            link.worker_id, reason="the worker asked to be replaced", grace_s=_REPLACED_GRACE_S
        )
        self._ledger.spawn(drain, f"drain-{link.worker_id}")

    def _final(
        self, link: WorkerLink, hand_out: HandOut, posted: PostedResult | None, size: int, *, too_large: bool
    ) -> ResultPosted | PlatformInterrupted | Outsize:
        now_ms, job_id = self._ledger.clock.now_ms(), hand_out.job_id
        worker_id, attempt = link.worker_id, hand_out.attempt
        limits = self._limits
        limit = limits.sync_result_bytes if job_id.startswith("sync-") else limits.result_bytes
        if posted is None:
            error = "the worker posted a result that is not valid JSON"
            if too_large:
                error = oversize(size, limit)
                self._note(worker_id, f"job {job_id}: {error}")
            return ResultPosted(worker_id=worker_id, now_ms=now_ms, error=error, attempt=attempt)
        length = len(posted.output or b"")
        # UTF-8 takes up to four bytes per character.
        error_text = posted.error if posted.error is None else posted.error[: limit // 4]
        if length > limit:
            too_long = oversize(length, limit)
            self._note(worker_id, f"job {job_id}: {too_long}")
            # What the handler says went wrong is worth more than that its output was too large.
            error = error_text or too_long
            failed = ResultPosted(worker_id=worker_id, now_ms=now_ms, error=error, attempt=attempt)
            return Outsize(failed, posted.output if posted.error is None else None)
        retryable = posted.retryable and self._runs_our_program(link)
        if retryable and (self._ledger.closing or self._ledger.suspended):
            # It was us who ended the worker: not the job's fault, and not its retry.
            reason = "the gateway ended its worker"
            return PlatformInterrupted(now_ms=now_ms, reason=reason, worker_id=worker_id, attempt=attempt)
        return ResultPosted(
            worker_id=worker_id,
            now_ms=now_ms,
            output=posted.output,
            error=error_text,
            retryable=retryable,
            attempt=attempt,
        )

    def _runs_our_program(self, link: WorkerLink) -> bool:
        """Whether `retryable` in an error is our worker program's word on its engine (vllm-worker.md §3.7).

        From any other program it is the handler's, whose errors are final (serverless-api.md §12 item 17).
        """
        endpoint = self._directory.endpoint(link.endpoint_id)
        return endpoint is not None and endpoint.kind is EndpointKind.VLLM

    def _progressed(
        self, link: WorkerLink, hand_out: HandOut | None, posted: PostedResult
    ) -> Progressed | None:
        """A progress value; None when it comes late (§1 rule 16) or is too large to keep."""
        if hand_out is None:
            return None
        hand_out.show()
        if len(posted.output or b"") > self._limits.result_bytes:
            job_id = hand_out.job_id
            _log.warning("progress_ignored", worker_id=link.worker_id, job_id=job_id, reason="too large")
            return None
        return Progressed(
            worker_id=link.worker_id,
            now_ms=self._ledger.clock.now_ms(),
            output=posted.output,
            attempt=hand_out.attempt,
        )

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

    async def _close_earlier(self, link: WorkerLink) -> None:
        """Close every hand-out to a worker that says it holds nothing (§5)."""
        now_ns = self._ledger.clock.monotonic_ns()
        events: list[tuple[str, JobEvent]] = []
        for hand_out in link.hand_outs.values():
            crossing = link.several_polls and now_ns - hand_out.at_ns < _CROSSING_NS
            if not (hand_out.posts or hand_out.returning or link.bodies or crossing):
                loss = self._loss(link, hand_out, arrived=hand_out.arrived)
                events.append((hand_out.job_id, loss))
        await self._apply_many(events)
        if not link.hand_outs:
            link.stopping.clear()
            link.stop_pending.clear()
            link.avoid.clear()
            link.listed.clear()
            self._ledger.dispatcher.look_again(link)

    def _loss(self, link: WorkerLink, hand_out: HandOut, *, arrived: bool) -> JobEvent:
        """The end of an attempt without a result: FAILED when the worker made none, else requeued."""
        now_ms, worker_id = self._ledger.clock.now_ms(), link.worker_id
        if arrived and not hand_out.post_failed:
            return ResultPosted(
                worker_id=worker_id, now_ms=now_ms, error=NO_RESULT_ERROR, attempt=hand_out.attempt
            )
        reason = "result lost on its way" if arrived else "job never reached the worker"
        return WorkerLost(worker_id=worker_id, now_ms=now_ms, reason=reason, attempt=hand_out.attempt)

    async def _apply_many(self, events: Sequence[tuple[str, JobEvent]]) -> None:
        """Apply events in one go, each as `_apply` would."""
        for (job_id, _), applied in zip(events, await self._ledger.apply_many(events), strict=True):
            _note_late(job_id, applied)

    async def _apply(self, job_id: str, event: JobEvent) -> None:
        """Apply an event; one that comes late, twice or for another attempt changes nothing."""
        try:
            applied = await self._ledger.apply(job_id, event)
        except NotFoundError:
            _note_late(job_id, None)
            return
        _note_late(job_id, applied)


def _note_late(job_id: str, applied: Applied | None) -> None:
    """Log what came too late for its job."""
    if applied is None:
        _log.info("late_post", job_id=job_id, reason="unknown job")
    elif applied.effect is Effect.IGNORED_TERMINAL or applied.effect is Effect.IGNORED_OTHER_ATTEMPT:
        _log.info("late_post", job_id=job_id, reason=applied.effect.value)


def _read_result(body: bytes | None) -> PostedResult | None:
    if body is None:
        return None
    try:
        return parse_result(body)
    except InvalidInputError:
        return None
