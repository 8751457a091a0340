"""Brings queued jobs and open takes together.

Per endpoint there is a line of open takes, oldest first, and an estimate of how many jobs the store has
for them. Whenever one of the two grows, or a slot becomes free, `serve` starts takes in the store for
polls at the head of the line, as many as there are jobs to be had. The estimate counts every arrival and
is put right whenever the store returns fewer jobs than asked: then only what arrived since that take
began can be left, and what the worker that asked must not be given (`WorkerLink.withheld`). Such a worker
waits (`WorkerLink.waits`), and is asked for again when something arrives or when it lets go of something. So
no wake-up is lost and nothing is polled.

A take that comes with results (`ask_with`) waits in no line: who does has been offered all there is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field

import structlog

from pilotlight.core.lifecycle import Applied, JobEvent, PlatformInterrupted
from pilotlight.domain.job import Job
from pilotlight.domain.worker import WorkerState
from pilotlight.errors import NotFoundError, StoreError
from pilotlight.gateway.jobs.links import HandOut, Poll, WorkerLink
from pilotlight.gateway.slots import SlotTable
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet
from pilotlight.ports.store import JobStore

_log = structlog.get_logger()

_UNKNOWN = 1 << 40
"""The estimate for an endpoint whose queue has not been looked into yet."""

_PAUSE_S = 1.0
"""Pause after a failure of the store."""

_UNREACHED = "the worker was gone before it could be given the job"
_HELD = "its worker may still hold an earlier attempt of it"
"""Why jobs go back that were taken from the queue and never sent."""

_SERVES = frozenset({WorkerState.STARTING, WorkerState.READY})


@dataclass(slots=True, eq=False)
class _Line:
    """One endpoint: its open takes, what is known of its queue, and whom nothing in it can be given to."""

    polls: dict[Poll, None] = field(default_factory=dict)
    believed: int = _UNKNOWN
    arrivals: int = 0
    asked: int = 0
    paused: bool = False
    waiting: set[WorkerLink] = field(default_factory=set)


class Dispatcher:
    """Hands jobs out to open takes, the longest-waiting first (serverless-api.md §12 item 35).

    Args:
        store: The queue.
        slots: One slot per job is taken before the store is asked.
        fleet: Says whether a worker may get jobs.
        clock: Time.
        lives: Whether there is still an endpoint of this id; nothing is kept of others.
        apply: Applies an event to a job and does the bookkeeping.
        started: Called with the id of a job that was handed out.
        spawn: Runs a coroutine in the background, owned by the service.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        slots: SlotTable,
        fleet: Fleet,
        clock: Clock,
        lives: Callable[[str], bool],
        apply: Callable[[str, JobEvent], Awaitable[Applied]],
        started: Callable[[str], None],
        spawn: Callable[[Coroutine[object, object, None], str], None],
    ) -> None:
        self._store = store
        self._slots = slots
        self._fleet = fleet
        self._clock = clock
        self._lives = lives
        self._apply = apply
        self._started = started
        self._spawn = spawn
        self._lines: dict[str, _Line] = {}
        self._closed = False
        self._closing = asyncio.Event()

    def arrived(self, endpoint_id: str, count: int = 1) -> None:
        """Jobs were put into the queue: a take that is asked for from now on finds them."""
        line = self._line(endpoint_id)
        if line is None:
            return
        line.believed += count
        line.arrivals += count
        for link in line.waiting:
            link.waits = False
        line.waiting.clear()
        self.serve(endpoint_id)

    def park(self, poll: Poll) -> None:
        """Put a take at the end of the line; one for a deleted endpoint is in none, and gets nothing."""
        link = poll.link
        link.polls.add(poll)
        line = self._line(link.endpoint_id)
        if line is not None:
            line.polls[poll] = None
            self.serve(link.endpoint_id)
        elif not link.released:
            link.release()

    def unpark(self, poll: Poll) -> None:
        """Take it out of the line; idempotent."""
        line = self._lines.get(poll.link.endpoint_id)
        if line is not None:
            line.polls.pop(poll, None)
        poll.link.polls.discard(poll)

    def drop_endpoint(self, endpoint_id: str) -> None:
        """Answer the takes of a deleted endpoint and forget it."""
        line = self._lines.pop(endpoint_id, None)
        for poll in list(line.polls) if line else ():
            poll.link.release()

    def close(self) -> None:
        """Hand out nothing more."""
        self._closed = True
        self._closing.set()

    def reopen(self) -> None:
        """Hand out again; the queues are looked into anew."""
        self._closed = False
        self._closing.clear()
        for endpoint_id, line in [*self._lines.items()]:
            line.believed = _UNKNOWN
            self.serve(endpoint_id)

    def may_hand_out(self, link: WorkerLink) -> bool:
        """Whether a worker may be given jobs at this moment."""
        if link.retiring or self._closed:
            return False
        worker = self._fleet.worker(link.worker_id)
        return worker is not None and worker.state in _SERVES

    def serve(self, endpoint_id: str) -> None:
        """Start as many takes as there are jobs, willing polls and free slots."""
        line = self._lines.get(endpoint_id)
        if line is None:
            return
        for poll in line.polls:
            if line.believed <= line.asked or line.paused or self._closed:
                return
            if not (poll.asking or poll.closed or poll.future.done()):
                self._ask_for(line, poll)

    def ask_with(self, poll: Poll, results: asyncio.Task[None], *, leaving: int) -> bool:
        """Ask the store for a take that comes with results, in one commit with them where it groups.

        Args:
            poll: The take; it is resolved as soon as the store has answered.
            results: Puts the results into the store; was made a moment ago, and is asked for before the take.
            leaving: Jobs of the worker that end with them.

        Returns:
            Whether there was anything to ask for; if not, the take is left as it is.
        """
        line = self._line(poll.link.endpoint_id)
        if line is None or line.paused or self._closed:
            return False
        poll.expired = True
        return self._ask_for(line, poll, results, leaving=leaving)

    def _ask_for(
        self, line: _Line, poll: Poll, results: asyncio.Task[None] | None = None, *, leaving: int = 0
    ) -> bool:
        """Start a take in the store, unless there is no job or no slot for it, or its worker may get none."""
        link, wanted = poll.link, line.believed - line.asked
        if wanted <= 0 or link.waits or not self.may_hand_out(link):
            return False
        granted = self._slots.reserve_jobs(link.worker_id, min(poll.count, wanted), leaving=leaving)
        if not granted:
            return False
        poll.asking = True
        link.asking += 1
        line.asked += granted
        self._spawn(self._ask(line, poll, granted, results), f"take-{link.worker_id}")
        return True

    async def give_back(self, jobs: list[Job], reason: str = _UNREACHED) -> None:
        """Return jobs that never reached a worker to the head of the queue; their retry is untouched."""
        while jobs:
            failed: list[Job] = []
            for job in jobs:
                try:
                    event = PlatformInterrupted(
                        now_ms=self._clock.now_ms(),
                        reason=reason,
                        worker_id=job.worker_id,
                        attempt=job.attempt,
                    )
                    await self._apply(job.id, event)
                except NotFoundError:
                    continue
                except StoreError as error:
                    _log.warning("give_back_failed", job_id=job.id, error=str(error))
                    failed.append(job)
            jobs = failed
            if not jobs:
                return
            # As long as it is tried here the reaper leaves them alone: it would use up their retry.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _PAUSE_S)
                return

    def _line(self, endpoint_id: str) -> _Line | None:
        """The line of an endpoint; None when that was deleted."""
        line = self._lines.get(endpoint_id)
        if line is None and self._lives(endpoint_id):
            line = self._lines[endpoint_id] = _Line()
        return line

    async def _ask(self, line: _Line, poll: Poll, granted: int, results: asyncio.Task[None] | None) -> None:
        link, arrivals = poll.link, line.arrivals
        withheld = link.withheld()
        jobs: list[Job] = []
        try:
            jobs = list(
                await self._store.take(
                    link.endpoint_id,
                    link.worker_id,
                    count=granted,
                    now_ms=self._clock.now_ms(),
                    without=withheld,
                )
            )
            line.believed = max(0, line.believed - len(jobs))
            if len(jobs) < granted:
                line.believed = min(line.believed, line.arrivals - arrivals + len(withheld))
                # Unless it has let go of something meanwhile: then it is worth another look.
                if withheld and withheld <= link.withheld() and line.arrivals == arrivals:
                    link.waits = True
                    line.waiting.add(link)
            if results is not None and not results.done():
                # What follows from them comes first: a job that goes back to the queue may be among these.
                await asyncio.wait({results})
        except StoreError as error:
            _log.warning("take_failed", endpoint_id=link.endpoint_id, error=str(error))
            line.paused = True
            asyncio.get_running_loop().call_later(_PAUSE_S, self._resume, link.endpoint_id, line)
        finally:
            poll.asking = False
            link.asking -= 1
            line.asked -= granted
            kept, refused, reason = self._hand_out(poll, jobs)
            if not link.asking:
                link.ended_early.clear()
            if kept:
                poll.future.set_result(kept)
            elif (poll.expired or link.released) and not poll.future.done():
                poll.future.set_result([])
            # Last, because a freed slot may start the next take at once.
            self._slots.release_jobs(link.worker_id, granted - len(jobs))
        await self.give_back(refused, reason)
        self.serve(link.endpoint_id)

    def _hand_out(self, poll: Poll, jobs: list[Job]) -> tuple[list[Job], list[Job], str]:
        """Split what the store gave into jobs for this poll, and jobs that must go back, with the reason."""
        link = poll.link
        living = [job for job in jobs if (job.id, job.attempt) not in link.ended_early]
        for job in living:
            # It was taken away from this very worker while the store was asked, as we shall hear next.
            if (earlier := link.hand_outs.pop(job.id, None)) is not None:
                link.keep_from(earlier)
        withheld = link.withheld()
        now_ns = self._clock.monotonic_ns()
        for job in living:
            link.hand_outs[job.id] = HandOut(job.id, job.attempt, now_ns, poll.connection)
        if poll.closed or poll.future.done() or not self.may_hand_out(link):
            link.return_all(living)
            return [], living, _UNREACHED
        kept = [job for job in living if job.id not in withheld]
        refused = [job for job in living if job.id in withheld]
        link.return_all(refused)
        for job in kept:
            link.begin(job.id)
            self._started(job.id)
        return kept, refused, _HELD

    def look_again(self, link: WorkerLink) -> None:
        """Ask for a worker again that may have let go of what it could not be given."""
        if link.waits:
            self.end_wait(link)
            self.serve(link.endpoint_id)

    def end_wait(self, link: WorkerLink) -> None:
        """Let a worker wait no longer (`WorkerLink.waits`): it is asked for again, or has ended."""
        link.waits = False
        if (line := self._lines.get(link.endpoint_id)) is not None:
            line.waiting.discard(link)

    def _resume(self, endpoint_id: str, line: _Line) -> None:
        line.paused = False
        line.believed = _UNKNOWN
        self.serve(endpoint_id)
