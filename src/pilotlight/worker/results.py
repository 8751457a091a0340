"""Handing in results: one by one, or, on our own platform, those together that became ready together.

While a post is under way, results that become ready wait for its end and then go in one post, so a worker
with many short jobs costs the platform one request and one commit for all of them, and a single result waits
for nothing. A worker whose slots are all in use asks for its next jobs with the same post: one request and
one commit less for each. Platforms without the route (RunPod) get every result by itself, as the protocol
has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from pilotlight.worker.log import LogSink

ITEMS_MAX: Final = 256
BYTES_MAX: Final = 8 * 1024 * 1024
"""Bounds of one post with many results; arbitrary, far below what the platform reads."""

_ALONE_BYTES: Final = 1024 * 1024
"""A result from this size on goes by itself, so that small ones need not wait for it."""


@dataclass(slots=True)
class _Waiting:
    job_id: str
    body: bytes
    handed_in: asyncio.Future[bool]


class _Status(msgspec.Struct):
    id: str
    status: int


class _WithJobs(msgspec.Struct):
    results: list[_Status]
    jobs: msgspec.Raw


_answers = msgspec.json.Decoder(list[_Status] | _WithJobs)


class ResultPoster:
    """Hands in results.

    Args:
        post_one: Posts one result: (job id, body) → whether the platform has it.
        post_many: Posts a JSON list and asks for so many jobs; the status and body of the answer, status None
            when it was given up. None where the platform's address shows that it has no such route.
        log: Where refusals are said.

    Attributes:
        room: How many jobs may come with the answer to so many results.
        taken: Called with those jobs, a JSON list, before the results count as handed in.
    """

    def __init__(
        self,
        post_one: Callable[[str, bytes], Awaitable[bool]],
        post_many: Callable[[bytes, int], Awaitable[tuple[int | None, bytes]]] | None,
        log: LogSink,
    ) -> None:
        self._post_one = post_one
        self._post_many = post_many
        self._log = log
        self.room: Callable[[int], int] = lambda _: 0
        self.taken: Callable[[bytes], None] = lambda _: None
        self._waiting: list[_Waiting] = []
        self._sender: asyncio.Task[None] | None = None

    async def post(self, job_id: str, body: bytes) -> bool:
        """Hands in one result; True once the platform has it."""
        if self._post_many is None or len(body) >= _ALONE_BYTES:
            return await self._post_one(job_id, body)
        loop = asyncio.get_running_loop()
        waiting = _Waiting(job_id, body, loop.create_future())
        self._waiting.append(waiting)
        if self._sender is None:
            # The task starts in the next round of the loop: what gets ready in this one goes with it.
            self._sender = loop.create_task(self._send(), name="results")
        return await waiting.handed_in

    async def close(self) -> None:
        """Gives up what is not handed in yet."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    async def _send(self) -> None:
        batch: list[_Waiting] = []
        try:
            while self._waiting:
                batch = self._next()
                await self._send_batch(batch)
                if self._waiting:
                    # Their jobs are let go of first: `room` counts what is in hand.
                    await asyncio.sleep(0)
        finally:
            self._sender = None
            for waiting in (*batch, *self._waiting):
                if not waiting.handed_in.done():
                    waiting.handed_in.set_result(False)
            self._waiting.clear()

    def _next(self) -> list[_Waiting]:
        count, size = 0, 0
        for waiting in self._waiting[:ITEMS_MAX]:
            size += len(waiting.body)
            if count and size > BYTES_MAX:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    async def _send_batch(self, batch: list[_Waiting]) -> None:
        wanted = 0 if self._post_many is None else self.room(len(batch))
        if self._post_many is None or (len(batch) == 1 and not wanted):
            await self._send_each(batch)
            return
        status, answer = await self._post_many(_encode(batch), wanted)
        statuses, jobs = _decode(answer) if status == 200 else (None, b"")
        if jobs:
            self.taken(jobs)
        if status is None:
            for waiting in batch:
                _resolve(waiting, handed_in=False)
        elif statuses is None or len(statuses) != len(batch):
            # Not our platform, or it refuses the list as a whole: by themselves the good ones get through.
            if status in {404, 405}:
                self._post_many = None
            self._log.event("platform.batch_refused", status=status, results=len(batch))
            await self._send_each(batch)
        else:
            for waiting, one in zip(batch, statuses, strict=True):
                if one >= 400:
                    self._log.event("platform.post_refused", job=waiting.job_id, status=one)
                _resolve(waiting, handed_in=one < 400)

    async def _send_each(self, batch: list[_Waiting]) -> None:
        posts = [self._post_one(waiting.job_id, waiting.body) for waiting in batch]
        results = [await posts[0]] if len(posts) == 1 else await asyncio.gather(*posts)
        for waiting, handed_in in zip(batch, results, strict=True):
            _resolve(waiting, handed_in=handed_in)


def _resolve(waiting: _Waiting, *, handed_in: bool) -> None:
    if not waiting.handed_in.done():
        waiting.handed_in.set_result(handed_in)


def _encode(batch: list[_Waiting]) -> bytes:
    items = (
        b'{"id":%b,"isStream":true,"body":%b}' % (msgspec.json.encode(waiting.job_id), waiting.body)
        for waiting in batch
    )
    return b"[%b]" % b",".join(items)


def _decode(answer: bytes) -> tuple[list[int] | None, bytes]:
    """The status of each result, None where there are none, and the jobs that came with them."""
    try:
        read = _answers.decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None, b""
    if isinstance(read, list):
        return [one.status for one in read], b""
    return [one.status for one in read.results], bytes(read.jobs)
