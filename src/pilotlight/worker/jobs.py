"""Jobs: taking them, running each against the engine, handing in what comes out.

`JobLoop` owns the set of running jobs. It is the only one to start, stop and forget them; polls and the end
of the program ask it. Each job is one task. Whoever ends it says why and cancels the task while that talks
to the engine, which closes the upstream connection, on which vLLM aborts the sequence; the task goes on and
reports.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

import msgspec

from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.inputs import is_anthropic
from pilotlight.worker.log import LogSink
from pilotlight.worker.outputs import Item, error_text, gone_text
from pilotlight.worker.platform import Backoff, Platform, TakeAnswer, TakenJob
from pilotlight.worker.runner import JobFailedError, PostChunk

TAKE_CLOSE_SECONDS: Final = 0.5
"""How long an open take poll may still be answered after the worker was told to stop."""

_QUICK_SECONDS: Final = 0.5
"""A poll answered empty before this was not held; asking again at once, for ever, would be a storm."""


class EndReason(StrEnum):
    """Why a running job was ended from outside."""

    STOPPED = "stopped"
    ENGINE_GONE = "engine_gone"
    SHUTDOWN = "shutdown"


@dataclass(slots=True)
class _Running:
    job: TakenJob
    answering: bool = False
    reason: EndReason | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Runner(Protocol):
    """Answers jobs."""

    async def run(self, job: TakenJob, post_chunk: PostChunk) -> list[Item]:
        """All items of the job, each already handed to `post_chunk`; JobFailedError when it failed."""
        ...


class JobLoop:
    """Keeps the worker's slots filled until it is told to drain.

    Args:
        config: Slots and intervals.
        platform: Where jobs come from and results go.
        runner: Answers a job.
        log: One line per finished job.
        on_defect: Called when a loop broke for a reason nobody foresaw; without it the worker would idle on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        platform: Platform,
        runner: Runner,
        log: LogSink,
        on_defect: Callable[[BaseException], None],
    ) -> None:
        self._on_defect = on_defect
        self._slots = config.max_concurrency
        self._ping_seconds = config.ping_seconds
        self._platform = platform
        self._runner = runner
        self._log = log
        self._running: dict[str, _Running] = {}
        self._gate = asyncio.Semaphore(self._slots)
        self._draining = asyncio.Event()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._open_take: asyncio.Task[TakeAnswer] | None = None
        self._full = False
        self._end_reason: EndReason | None = None
        platform.take_with_results(self._room, self._accept)

    @property
    def running(self) -> int:
        """Jobs in hand, those waiting for a slot included."""
        return len(self._running)

    def start(self) -> None:
        """Begins to take jobs, to listen for stops and to send heartbeats."""
        self._tasks = [asyncio.create_task(self._take_loop(), name="take")]
        if self._platform.can_be_stopped:
            self._tasks.append(asyncio.create_task(self._stop_loop(), name="stop"))
        if self._platform.pings:
            self._tasks.append(asyncio.create_task(self._ping_loop(), name="ping"))
        for task in self._tasks:
            task.add_done_callback(self._check_loop)

    async def drain(self) -> None:
        """Stops taking jobs and returns when none is left in hand. Safe to cancel and to call again."""
        self._draining.set()
        self._changed.set()
        if self._tasks:
            # An open take may still be answered for a moment; then it is closed.
            await asyncio.wait({self._tasks[0]}, timeout=TAKE_CLOSE_SECONDS)
            self._close_take()
            await asyncio.wait({self._tasks[0]})
        while self._running:
            self._changed.clear()
            await self._changed.wait()

    def end_all(self, reason: EndReason) -> None:
        """Ends every job in hand, and whatever still comes.

        All but stopped ones get an error that asks for another worker.
        """
        self._end_reason = reason
        for running in list(self._running.values()):
            self._end(running, reason)

    async def close(self) -> None:
        """Ends the loops; jobs still in hand are given up."""
        self._draining.set()
        tasks = [
            *self._tasks,
            *(running.task for running in self._running.values() if running.task is not None),
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _take_loop(self) -> None:
        backoff = Backoff(0.1, 5.0)
        quick = Backoff(0.05, 2.0)
        clock = asyncio.get_running_loop().time
        empty_before = False
        while not self._draining.is_set():
            free = self._slots - len(self._running)
            if free <= 0:
                # `drain` sets it, too.
                self._changed.clear()
                self._full = True
                await self._changed.wait()
                self._full = False
                continue
            asked = clock()
            answer = await self._poll(free)
            for job in answer.jobs:
                self._accept(job)
            delay = answer.pause_seconds
            if answer.failed:
                delay = backoff.next_delay()
            else:
                backoff.reset()
            is_quick = not answer.jobs and not answer.failed and clock() - asked < _QUICK_SECONDS
            if is_quick and empty_before and not delay:
                delay = quick.next_delay()
            elif not is_quick:
                quick.reset()
            empty_before = is_quick
            if delay:
                await self._unless_draining(asyncio.sleep(delay))

    def _room(self, results: int) -> int:
        """Jobs that may come with the answer to so many results.

        None while a take is open, which gets what there is, and none that would come to a worker that ends.
        """
        if not self._full or self._draining.is_set():
            return 0
        return max(0, self._slots - len(self._running) + results)

    async def _poll(self, free: int) -> TakeAnswer:
        """One take, which `drain` may close."""
        take = asyncio.create_task(self._platform.take(free, busy=bool(self._running)))
        self._open_take = take
        try:
            return await take
        except asyncio.CancelledError:
            if not self._draining.is_set():
                raise
            # `drain` closed it; only an end of the loop itself goes on.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return TakeAnswer()
        finally:
            self._open_take = None
            take.cancel()

    def _close_take(self) -> None:
        if self._open_take is not None:
            self._open_take.cancel()

    async def _stop_loop(self) -> None:
        backoff = Backoff(0.5, 5.0)
        clock = asyncio.get_running_loop().time
        while True:
            asked = clock()
            ids = await self._platform.stop_requests()
            for job_id in ids or ():
                running = self._running.get(job_id)
                if running is not None:
                    self._end(running, EndReason.STOPPED)
            if ids is None:
                await asyncio.sleep(backoff.next_delay())
                continue
            backoff.reset()
            if not ids and clock() - asked < _QUICK_SECONDS:
                await asyncio.sleep(1.0)

    async def _ping_loop(self) -> None:
        while True:
            await self._platform.ping(list(self._running))
            await asyncio.sleep(self._ping_seconds)

    def _check_loop(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._on_defect(error)

    def _accept(self, job: TakenJob) -> None:
        if job.id in self._running:
            self._log.event("job.duplicate", job=job.id)
            return
        running = _Running(job, reason=self._end_reason)
        self._running[job.id] = running
        running.task = asyncio.create_task(self._run(running), name=f"job-{job.id}")

    async def _run(self, running: _Running) -> None:
        """One job from hand-out to the platform's receipt of its result."""
        job = running.job
        clock = asyncio.get_running_loop().time
        started = clock()
        outcome = "completed"
        try:
            async with self._gate:
                body, outcome = await self._result(running)
                if body is not None and not await self._platform.post_result(job.id, body):
                    outcome = f"{outcome}, result lost"
        finally:
            # The id leaves the heartbeats only after the last try to hand in its result (§5).
            del self._running[job.id]
            if len(self._running) < self._slots:
                self._changed.set()
            self._log.event("job.finished", job=job.id, outcome=outcome, ms=round((clock() - started) * 1000))

    async def _result(self, running: _Running) -> tuple[bytes | None, str]:
        """The body to hand in and a word for the log; no body for a job that was stopped."""
        job = running.job
        number = 0

        async def post_chunk(item: Item) -> None:
            nonlocal number
            await self._platform.post_chunk(job.id, number, _encode({"output": item}))
            number += 1

        if job.unreadable is not None:
            return _encode({"error": error_text(400, job.unreadable)}), "failed"
        if running.reason is None:
            running.answering = True
            try:
                items = await self._runner.run(job, post_chunk)
            except JobFailedError as error:
                return _encode({"error": error.text}), "failed"
            except asyncio.CancelledError:
                # By `_end`, unless somebody ends this task for good.
                assert running.task is not None
                if running.reason is None or running.task.uncancel():
                    raise
            except Exception as error:  # noqa: BLE001 - see below
                # A defect of ours must not leave the platform waiting for this job's result.
                self._log.event("job.defect", job=job.id, error=repr(error))
                return _encode(
                    {"error": error_text(500, f"worker program failed: {type(error).__name__}")}
                ), "failed"
            else:
                return _encode({"output": items}), "completed"
            finally:
                running.answering = False
        if running.reason is EndReason.STOPPED:
            return None, "stopped"
        anthropic = is_anthropic(job.payload.get("input"))
        text = gone_text(anthropic=anthropic, shut_down=running.reason is EndReason.SHUTDOWN)
        return _encode({"error": text}), str(running.reason)

    def _end(self, running: _Running, reason: EndReason) -> None:
        if running.reason is not None:
            return
        running.reason = reason
        if running.answering and running.task is not None:
            running.task.cancel()

    async def _unless_draining(self, awaitable: Awaitable[Any]) -> None:
        """Waits for the given thing or for the drain, whichever comes first."""
        waiting = asyncio.ensure_future(awaitable)
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({waiting, draining}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (waiting, draining):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting


def _encode(value: object) -> bytes:
    return msgspec.json.encode(value)
