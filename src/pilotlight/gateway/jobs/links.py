"""What the gateway knows of one worker's life in the protocol.

What was handed out, what it last said it holds, what it was told to stop, and its open polls. Changed only
on the event loop, by the classes of this package; gone with the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pilotlight.domain.job import Job
from pilotlight.gateway.protocol import ClientStream

_STOP_POLL_MISSING_NS = 3_000_000_000
"""A living worker opens the next stop poll within two seconds of an answer (worker-protocol.md §6.5)."""

_ABSENCES = 2
"""Heartbeats without a job after a later take, until it is gone: the first may be older than the take."""


@dataclass(slots=True, eq=False)
class HandOut:
    """One attempt of a job at one worker.

    Attributes:
        job_id: Which job.
        attempt: Which attempt of it: the token of the lease (`core.lifecycle`).
        at_ns: When it was handed out, monotonic.
        connection: Where it was written to. While that stands, what was written has arrived or will: a
            worker that hangs up closes it.
        confirmed: Whether the worker has shown that it holds the job.
        recorded: Whether the store knows of that.
        followed: Whether a take came after it: the worker has read what it can of all that was sent before.
        received: Whether that has shown that the worker has got the job.
        absences: Heartbeats since then that did not list it.
        posts: Posts for this job that are being received now.
        returning: Whether it goes back to the queue, as it never reached the worker.
        post_failed: Whether we failed to take a post, so that a missing result may be our fault (L2).
        first_chunk_ms: When its first stream chunk arrived.
        usage_chunk: The last chunk that speaks of usage.
        last_sequence: Number of the last chunk, for workers that count them.
        pieces: Pieces of the chunk after that one which are stored already.
        broken: Digest of that chunk; None while none has failed.
        storing: Held while one of those is stored: the same may come twice at once.
        streamed: Bytes of chunks stored since those that had been read were last forgotten.
    """

    job_id: str
    attempt: int
    at_ns: int
    connection: ClientStream | None
    confirmed: bool = False
    recorded: bool = False
    followed: bool = False
    received: bool = False
    absences: int = 0
    posts: int = 0
    returning: bool = False
    post_failed: bool = False
    first_chunk_ms: int | None = None
    usage_chunk: bytes | None = None
    last_sequence: int = -1
    pieces: int = 0
    broken: bytes | None = None
    storing: asyncio.Lock | None = None
    streamed: int = 0

    def show(self) -> None:
        """Note that the worker has shown that it holds the job, by what the store is told, too."""
        self.confirmed = self.recorded = True

    @property
    def arrived(self) -> bool:
        """Whether the worker has, or has had, the job."""
        return self.confirmed or (self.connection is not None and self.connection.open)


@dataclass(slots=True, eq=False)
class Poll:
    """One open take.

    Attributes:
        link: Whose.
        count: Jobs it asks for.
        connection: Where it came from; None where the server does not say.
        future: Resolved with the jobs; with none when the hold is over.
        asking: Whether a take for it is under way in the store.
        expired: Whether its hold is over, so that it is answered as soon as that take returns.
        closed: Whether the client has gone, so that it must get nothing.
    """

    link: WorkerLink
    count: int
    connection: ClientStream | None
    future: asyncio.Future[list[Job]]
    asking: bool = False
    expired: bool = False
    closed: bool = False

    def expire(self) -> None:
        """End its hold: it is answered now, or with what the store says in a moment."""
        self.expired = True
        if not self.asking and not self.future.done():
            self.future.set_result([])

    def hang_up(self, _: object) -> None:
        """End it without jobs: its client has gone."""
        self.closed = True
        if not self.future.done():
            self.future.set_result([])


@dataclass(slots=True, eq=False)
class WorkerLink:
    """One worker.

    Attributes:
        worker_id: Who.
        endpoint_id: Whom it serves.
        hand_outs: Attempts it has not finished.
        listed: Ids in its last ping.
        avoid: Jobs taken away from it that it may still hold, or have in its socket, and whether it has shown
            since that it has read all that was sent to it.
        waits: Whether the queue holds nothing for it but what it may still hold.
        stopping: Jobs that ended while it ran them: when it must have let go (monotonic ns).
        stop_pending: Ids for its next stop poll.
        stop_changed: Set when that poll has something to say.
        polls: Its open takes.
        asking: Takes for it under way in the store.
        ended_early: (job, attempt) of those that ended between the store's take and the hand-out.
        bodies: Lists of results that are being received now; any job may be in one.
        retiring: Whether it gets nothing more for good.
        released: Whether its polls are to be answered at once, because it is being ended.
        key_warned: Whether a wrong key was reported already.
        pinged_ns: When its last heartbeat came, monotonic; None before the first.
        asked_ns: When its last take ended.
        stop_polls: Its open stop polls.
        stop_polled_ns: When its last stop poll was answered.
        stop_broken_ns: When a stop poll broke, until it opens the next one; None while nothing is wrong.
        library: Version of the library that it speaks with, as its heartbeats say; None before the first.
        several_polls: Whether it has had several open takes at once, as libraries before 1.7 do.
    """

    worker_id: str
    endpoint_id: str
    hand_outs: dict[str, HandOut] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    avoid: dict[str, bool] = field(default_factory=dict)
    waits: bool = False
    stopping: dict[str, int] = field(default_factory=dict)
    stop_pending: dict[str, None] = field(default_factory=dict)
    stop_changed: asyncio.Event = field(default_factory=asyncio.Event)
    polls: set[Poll] = field(default_factory=set)
    asking: int = 0
    ended_early: set[tuple[str, int]] = field(default_factory=set)
    bodies: int = 0
    retiring: bool = False
    released: bool = False
    key_warned: bool = False
    pinged_ns: int | None = None
    asked_ns: int = 0
    stop_polls: int = 0
    stop_polled_ns: int | None = None
    stop_broken_ns: int | None = None
    library: str | None = None
    several_polls: bool = False

    def begin(self, job_id: str) -> None:
        """Forget what was said of an earlier attempt of a job: it says nothing of the one that begins."""
        self.stop_pending.pop(job_id, None)
        self.stopping.pop(job_id, None)
        self.avoid.pop(job_id, None)
        self.listed.discard(job_id)

    def keep_from(self, hand_out: HandOut) -> None:
        """Do not give it a job again that is being taken away from it, until it cannot hold it any more."""
        if not hand_out.returning:
            self.avoid[hand_out.job_id] = hand_out.confirmed or hand_out.followed

    def return_all(self, jobs: Iterable[Job]) -> None:
        """Note that jobs which the store gave go back to the queue."""
        for job in jobs:
            self.hand_outs[job.id].returning = True

    def withheld(self) -> frozenset[str]:
        """Jobs that it must not be given, because it may still hold them.

        It could not tell two attempts of one job apart, and runs the same id twice (worker-protocol.md §3.2).
        """
        if not (self.avoid or self.stopping or self.listed):
            return frozenset()
        return frozenset((self.listed | self.avoid.keys() | self.stopping.keys()) - self.hand_outs.keys())

    def note_take(self) -> None:
        """Take note of a take: it has read all that was handed to it before, and listed it (§5).

        That does not hold for libraries before 1.7, whose takes are sent side by side.
        """
        if self.several_polls:
            return
        for hand_out in self.hand_outs.values():
            hand_out.followed = True
            hand_out.received = hand_out.received or hand_out.arrived
        for job_id in self.avoid:
            self.avoid[job_id] = True

    def note_list(self, listed: frozenset[str]) -> list[HandOut]:
        """Take note of what a heartbeat lists; returns what it had and has listed in none of the last ones.

        Jobs that it has let go of, having read all that was sent to it, may be handed to it again.
        """
        for job_id in [job_id for job_id, read in self.avoid.items() if read and job_id not in listed]:
            del self.avoid[job_id]
        dropped = []
        for hand_out in self.hand_outs.values():
            if hand_out.job_id in listed:
                hand_out.absences = 0
            elif hand_out.received and not (hand_out.returning or hand_out.posts):
                hand_out.absences += 1
                if hand_out.absences >= _ABSENCES:
                    dropped.append(hand_out)
        return dropped

    def stop(self, job_id: str, *, deadline_ns: int) -> None:
        """Tell it to let go of a job with its next stop poll, and remember until when it should have."""
        self.stopping.setdefault(job_id, deadline_ns)
        self.stop_pending[job_id] = None
        self.stop_changed.set()

    def take_stops(self) -> list[str]:
        """The ids to stop; each is delivered once."""
        ids = list(self.stop_pending)
        self.stop_pending.clear()
        self.stop_changed.clear()
        return ids

    def release(self) -> None:
        """Answer all its polls now, and every later one soon: it is being ended."""
        self.retiring = self.released = True
        for poll in list(self.polls):
            poll.expire()
        self.stop_changed.set()

    @property
    def at_rest(self) -> bool:
        """Whether it holds no job as far as we know, also none that it should have let go of."""
        return not (self.hand_outs or self.stopping or self.avoid or self.bodies)

    def thaw(self, now_ns: int) -> None:
        """Answer what it had open while all of it stood still, and expect signs of life from now on only.

        Its library may have given an open take up in the moment in which it goes on again, and a job written
        into that would be lost (worker-protocol.md §6.6).
        """
        for poll in list(self.polls):
            poll.expire()
        if self.stop_polls:
            self.stop_changed.set()
        self.asked_ns, self.stop_broken_ns = now_ns, None
        if self.pinged_ns is not None:
            self.pinged_ns = now_ns
        if self.stop_polled_ns is not None:
            self.stop_polled_ns = now_ns

    def silent(self, now_ns: int, *, pings_missing_ns: int, since_ns: int) -> bool:
        """Whether neither heartbeats nor stop polls come any more (worker-protocol.md §6.5, §8).

        Heartbeats alone do not count, they may come from another process than the worker, and a worker that
        runs a blocking handler does not poll. What was sent before `since_ns` may still have to be read.
        """
        if self.pinged_ns is None or now_ns - max(self.pinged_ns, since_ns) <= pings_missing_ns:
            return False
        return not self._calls(now_ns)

    def mute(self, now_ns: int) -> bool:
        """Whether it has never sent a heartbeat, and does not call either."""
        return self.pinged_ns is None and not self._calls(now_ns)

    def _calls(self, now_ns: int) -> bool:
        """Whether it has a call open by which it shows that it lives, or had one a moment ago.

        Libraries before 1.10 have no stop poll; of those takes and posts count.
        """
        if self.stop_polls:
            return True
        if self.stop_polled_ns is not None:
            return now_ns - self.stop_polled_ns <= _STOP_POLL_MISSING_NS
        return self._busy or now_ns - self.asked_ns <= _STOP_POLL_MISSING_NS

    @property
    def _busy(self) -> bool:
        """Whether it has a take open, or posts something."""
        return bool(self.polls or self.bodies) or any(held.posts for held in self.hand_outs.values())

    def orphaned(self, now_ns: int) -> bool:
        """Whether its main process is gone although heartbeats go on (worker-protocol.md §6.5).

        Its stop poll was closed by its own end and has not come back, and it has no other call open.
        """
        if self.stop_broken_ns is None or now_ns - self.stop_broken_ns <= _STOP_POLL_MISSING_NS:
            return False
        return not self._busy

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        """Count a list of results while it is received; a failure is remembered against us for all jobs."""
        self.bodies += 1
        try:
            yield
        except BaseException:
            for hand_out in self.hand_outs.values():
                hand_out.post_failed = True
            raise
        finally:
            self.bodies -= 1

    @contextlib.contextmanager
    def posting_all(self, job_ids: Iterable[str]) -> Iterator[None]:
        """Count posts for several jobs, as `posting` does for one."""
        hand_outs = [self.hand_outs[job_id] for job_id in job_ids if job_id in self.hand_outs]
        for hand_out in hand_outs:
            hand_out.posts += 1
        try:
            yield
        except BaseException:
            for hand_out in hand_outs:
                hand_out.post_failed = True
            raise
        finally:
            for hand_out in hand_outs:
                hand_out.posts -= 1

    @contextlib.contextmanager
    def posting(self, job_id: str) -> Iterator[HandOut | None]:
        """Count a post for a job while it is received; a failure is remembered against us."""
        hand_out = self.hand_outs.get(job_id)
        if hand_out is None:
            yield None
            return
        hand_out.posts += 1
        try:
            yield hand_out
        except BaseException:
            hand_out.post_failed = True
            raise
        finally:
            hand_out.posts -= 1
