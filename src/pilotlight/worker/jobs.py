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

import aiohttp
import msgspec

from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.engine import Engine
from pilotlight.worker.errors import EngineGoneError, InputError
from pilotlight.worker.inputs import UpstreamRequest, plan_request
from pilotlight.worker.log import LogSink
from pilotlight.worker.outputs import (
    Item,
    StreamShaper,
    error_text,
    input_error_text,
    make_shaper,
    native_item,
    pass_through_item,
    upstream_error_text,
)
from pilotlight.worker.platform import Backoff, Platform, TakeAnswer, TakenJob
from pilotlight.worker.rewrite import ignored_fields
from pilotlight.worker.sse import EventTooLongError, SseSplitter
from pilotlight.worker.stages import is_fatal_error

RESULT_BYTES_MAX: Final = 20 * 1024 * 1024
"""Largest result handed in; `vllm-worker.md` §3.1."""

TAKE_CLOSE_SECONDS: Final = 0.5
"""How long an open take poll may still be answered after the worker was told to stop."""

_QUICK_SECONDS: Final = 0.5
"""A poll answered empty before this was not held; asking again at once, for ever, would be a storm."""


class EndReason(StrEnum):
    """Why a running job was ended from outside."""

    STOPPED = "stopped"
    ENGINE_GONE = "engine_gone"
    SHUTDOWN = "shutdown"


class JobFailedError(Exception):
    """A job that ends with an error envelope; `text` is its JSON."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(slots=True)
class _Running:
    job: TakenJob
    answering: bool = False
    reason: EndReason | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)


PostChunk = Callable[[Item], Awaitable[None]]


class Runner(Protocol):
    """Answers jobs."""

    async def run(self, job: TakenJob, post_chunk: PostChunk) -> list[Item]:
        """All items of the job, each already handed to `post_chunk`; JobFailedError when it failed."""
        ...


class JobRunner:
    """Answers one job from the engine.

    Args:
        config: Input defaults and the time limit.
        engine: Whom to ask.
        log: Where parameters without effect are said, once each.
        on_fatal: Called when an answer shows that the engine will not recover.
    """

    def __init__(
        self, config: WorkerConfig, engine: Engine, log: LogSink, on_fatal: Callable[[], None]
    ) -> None:
        self._settings = config.inputs
        self._seconds = config.request_seconds
        self._engine = engine
        self._log = log
        self._on_fatal = on_fatal
        self._warned: set[str] = set()

    async def run(self, job: TakenJob, post_chunk: PostChunk) -> list[Item]:
        """All items of the job, each already handed to `post_chunk`.

        Raises:
            JobFailedError: The job failed; items posted so far stay posted.
        """
        job_input = job.payload.get("input")
        anthropic = _is_anthropic(job_input)
        try:
            request = plan_request(job_input, self._settings, job_id=job.id)
        except InputError as error:
            raise JobFailedError(input_error_text(error, anthropic=anthropic)) from error
        self._warn(job_input)
        items: list[Item] = []
        size = 0

        async def emit(item: Item) -> None:
            nonlocal size
            size += len(msgspec.json.encode(item))
            if size > RESULT_BYTES_MAX:
                raise JobFailedError(
                    error_text(413, f"the result exceeds {RESULT_BYTES_MAX} bytes", anthropic=anthropic)
                )
            items.append(item)
            await post_chunk(item)

        try:
            async with asyncio.timeout(self._seconds):
                await self._ask(request, emit, anthropic=anthropic)
        except TimeoutError as error:
            text = error_text(504, f"the request ran longer than {self._seconds:g} s", anthropic=anthropic)
            raise JobFailedError(text) from error
        except (EngineGoneError, aiohttp.ClientError, ConnectionError) as error:
            raise JobFailedError(gone_text(anthropic=anthropic)) from error
        except EventTooLongError as error:
            raise JobFailedError(error_text(500, str(error), anthropic=anthropic)) from error
        return items

    async def _ask(self, request: UpstreamRequest, emit: PostChunk, *, anthropic: bool) -> None:
        body = None if request.body is None else msgspec.json.encode(request.body)
        response = await self._engine.request(request.method, request.target, body=body)
        try:
            content_type = response.headers.get("Content-Type", "")
            if response.status >= 400:
                await self._refuse(response, anthropic=anthropic)
            if request.stream and content_type.startswith("text/event-stream"):
                await _stream(response, make_shaper(request), emit)
                return
            answer = await response.read()
            await emit(_single_item(request, answer, content_type))
        finally:
            # Closing instead of releasing: an answer that was not read to its end must be aborted upstream.
            if response.content.at_eof():
                response.release()
            else:
                response.close()

    async def _refuse(self, response: aiohttp.ClientResponse, *, anthropic: bool) -> None:
        body = await response.read()
        if response.status >= 500 and is_fatal_error(body):
            self._on_fatal()
            raise JobFailedError(gone_text(anthropic=anthropic))
        raise JobFailedError(upstream_error_text(response.status, body, anthropic=anthropic))

    def _warn(self, job_input: object) -> None:
        if not isinstance(job_input, dict):
            return
        bodies = (
            job_input,
            job_input.get("sampling_params"),
            job_input.get("openai_input"),
            job_input.get("body"),
        )
        for body in bodies:
            for name in ignored_fields(body) if isinstance(body, dict) else ():
                if name not in self._warned:
                    self._warned.add(name)
                    self._log.event("job.parameter_ignored", parameter=name)


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
        """Ends every job in hand; all but stopped ones get an error that asks for another worker."""
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
        running = _Running(job)
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
        anthropic = _is_anthropic(job.payload.get("input"))
        return _encode({"error": gone_text(anthropic=anthropic, reason=running.reason)}), str(running.reason)

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


async def _stream(response: aiohttp.ClientResponse, shaper: StreamShaper, emit: PostChunk) -> None:
    """Shapes an event stream; a failure inside it is raised after what is pending was handed over (§3.7)."""
    splitter = SseSplitter()
    async for data in response.content.iter_any():
        for event in splitter.feed(data):
            for item in shaper.feed(event):
                await emit(item)
    for event in splitter.close():
        for item in shaper.feed(event):
            await emit(item)
    for item in shaper.close():
        await emit(item)
    if shaper.error is not None:
        raise JobFailedError(shaper.error)


def _single_item(request: UpstreamRequest, answer: bytes, content_type: str) -> Item:
    item = pass_through_item(answer, content_type)
    if request.native and isinstance(item, dict) and "choices" in item:
        return native_item(item, chat=request.chat)
    return item


def gone_text(*, anthropic: bool = False, reason: EndReason = EndReason.ENGINE_GONE) -> str:
    """The error of a job that another worker should run: 503, `retryable: true` (`vllm-worker.md` §1.11)."""
    if reason is EndReason.SHUTDOWN:
        message = "the worker was shut down before the job finished"
    else:
        message = "the engine ended before the job finished"
    return error_text(503, message, retryable=True, anthropic=anthropic)


def _is_anthropic(job_input: object) -> bool:
    if not isinstance(job_input, dict):
        return False
    route = job_input.get("openai_route") or job_input.get("route")
    return isinstance(route, str) and route.startswith("/v1/messages")


def _encode(value: object) -> bytes:
    return msgspec.json.encode(value)
