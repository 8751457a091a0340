"""One launcher: spawned, listened to, started again after it ended, and ended for good.

`clusters.launchers` decides which there are. A launcher runs in the engine's Python and is no worker: it has
placeholders where workers have their id, so nothing that looks for workers finds it. It leads a session of
its own, and its standard input is a pipe of ours: when we are gone, however that came, it reads the end and
goes, too. Engines that were forked from it stay, they belong to their worker programs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import msgspec
import structlog

from pilotlight.clusters.local import describe_exit
from pilotlight.clusters.logs import WorkerLogs
from pilotlight.core.launchers import PAUSES_S, STEADY_S, decide_pause
from pilotlight.errors import ClusterError
from pilotlight.system import death_signal_prefix

_log = structlog.get_logger(__name__)

READY_TIMEOUT_S = 300.0
"""A launcher that has not imported everything by then never will; cold disks take a minute."""

SILENCE_S = 120.0
"""One that was ready and then says nothing for so long was stopped or hangs: it says every 20 s that it is
there, unless it is just importing a class of models."""

ROOM_PAUSE_S = 30.0
"""Between two looks whether there is room by now."""

COMPLAINTS_MAX = 3
"""After so many refusals without a launch between them a launcher is begun anew."""

_END_S = 1.0
"""From SIGTERM to SIGKILL: it has nothing to finish."""

_EVENT_BYTES_MAX = 1 << 20


class LauncherState(StrEnum):
    """Where a launcher stands."""

    IMPORTING = "importing"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherPlan:
    """How an endpoint's engines are launched; endpoints with the same fingerprint share a launcher.

    Attributes:
        fingerprint: Of the engine's home and of what counts while it is imported.
        version: The engine's, "" if unknown.
        socket: Where the launcher listens.
        environment: The launcher's own; the same for all who share it.
        worker_bytes: Host memory one worker of the endpoint is expected to take.
        command: The command line of a launcher that imports these classes of models.
        classes: The endpoint's own classes of models, as far as they can be known; reads files.
    """

    fingerprint: str
    version: str
    socket: Path
    environment: Mapping[str, str] = field(repr=False)
    worker_bytes: int
    command: Callable[[Sequence[str]], Sequence[str]] = field(repr=False)
    classes: Callable[[], Sequence[str]] = field(repr=False)


class _Event(msgspec.Struct):
    """A line that a launcher writes for us; every kind has some of these."""

    event: str
    pid: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0
    vllm: str = ""
    worker_id: str = ""
    status: int = 0
    text: str = ""


class Launcher:
    """One launcher under supervision, on one event loop.

    Args:
        plan: How it is started.
        logs: Get what it writes to standard error.
        explain_no_room: Says why it may not be started now; "" when it may.
        classes: The classes of models that it shall import; asked before each life.
        pauses_s: Before each further try after failed lives in a row.

    Attributes:
        plan: As given.
        state: Where it stands.
        problem: Why it does not run, or what it complained about last; "" for nothing.
        version: The engine's, as the launcher itself found it.
        pid: Its process while it lives.
        ready_s: How long it took to import; None before.
        launches: Engines forked in all its lives.
    """

    def __init__(
        self,
        plan: LauncherPlan,
        *,
        logs: WorkerLogs,
        explain_no_room: Callable[[], str],
        classes: Callable[[], Awaitable[Sequence[str]]],
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self.plan = plan
        self.state = LauncherState.IMPORTING
        self.problem = ""
        self.version = plan.version
        self.pid: int | None = None
        self.ready_s: float | None = None
        self.launches = 0
        self.log_id = f"launcher-{plan.fingerprint}"
        self._logs = logs
        self._explain_no_room = explain_no_room
        self._classes = classes
        self._pauses_s = pauses_s
        self._failures = 0
        self._doubtful = False
        self._ready_at = 0.0
        self._refused = ""
        self._complaints = 0
        self._engines: set[int] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def engines(self) -> int:
        """Engines forked from it that have not ended yet."""
        return len(self._engines)

    @property
    def usable(self) -> bool:
        """Whether a worker should ask it: it forks at once, or as soon as it has imported everything.

        One that did not come so far in its last life would mostly be waited for in vain.
        """
        return self.state is LauncherState.READY or (
            self.state is LauncherState.IMPORTING and not self._doubtful
        )

    def start(self, after: asyncio.Task[None] | None = None) -> None:
        """Begin; call it once.

        Args:
            after: The end of an earlier launcher of the same fingerprint, which is waited for.
        """
        self._look_for_room()
        self._task = asyncio.create_task(self._keep(after), name=self.log_id)

    async def stop(self) -> None:
        """End it for good; returns when it has ended. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _keep(self, after: asyncio.Task[None] | None) -> None:
        if after is not None:
            await asyncio.wait({after})
        while True:
            if not self._look_for_room():
                await asyncio.sleep(ROOM_PAUSE_S)
                continue
            try:
                ended = await self._live()
            except Exception as error:  # noqa: BLE001 - workers must not wait for one that nobody starts
                _log.exception("launcher_broken", launcher=self.plan.fingerprint)
                ended = repr(error)
            now = asyncio.get_running_loop().time()
            steady = self.state is LauncherState.READY and now - self._ready_at >= STEADY_S
            self._failures = 1 if steady else self._failures + 1
            self._doubtful = self.state is not LauncherState.READY
            self.state, self.problem = LauncherState.FAILED, self._refused or ended
            pause_s = decide_pause(self._failures, self._pauses_s)
            facts = {"launcher": self.plan.fingerprint, "failures": self._failures, "log": self.log_id}
            if pause_s is None:
                advice = "workers import for themselves; change an endpoint of it to try again"
                _log.error("launcher_given_up", problem=self.problem, advice=advice, **facts)
                return
            _log.warning("launcher_failed", problem=self.problem, pause_s=pause_s, **facts)
            await asyncio.sleep(pause_s)

    def _look_for_room(self) -> bool:
        problem = self._explain_no_room()
        if problem and problem.partition(":")[0] != self.problem.partition(":")[0]:
            _log.warning("launcher_not_started", launcher=self.plan.fingerprint, problem=problem)
        self.state = LauncherState.FAILED if problem else LauncherState.IMPORTING
        self.problem = problem
        return not problem

    async def _live(self) -> str:
        """One life of it; how it ended, in words."""
        self._refused, self._complaints = "", 0
        self.ready_s = None
        command = self.plan.command(await self._classes())
        try:
            output = self._logs.open(self.log_id)
        except ClusterError as error:
            return str(error)
        ended = ""
        try:
            try:
                process = await self._spawn(command, output)
            finally:
                os.close(output)
            try:
                ended = await self._listen(process)
            finally:
                await _end(process)
                ended = ended or describe_exit(process.returncode or 0)
        except OSError as error:
            ended = f"{command[0]!r} cannot be started: {error.strerror}"
        finally:
            self.pid = None
            self._engines.clear()
            self.plan.socket.unlink(missing_ok=True)
            await self._logs.finish(self.log_id, ended)
        return ended

    async def _spawn(self, command: Sequence[str], output: int) -> Process:
        process = await asyncio.create_subprocess_exec(
            *death_signal_prefix(),
            *command,
            stdin=PIPE,
            stdout=PIPE,
            stderr=output,
            cwd="/",
            env=dict(self.plan.environment),
            start_new_session=True,
            limit=_EVENT_BYTES_MAX,
        )
        self.pid = process.pid
        _log.info("launcher_started", launcher=self.plan.fingerprint, pid=process.pid)
        return process

    async def _listen(self, process: Process) -> str:
        """Take what it says until it ends, "", or is of no use any more, which is told."""
        assert process.stdout is not None
        try:
            async with asyncio.timeout(READY_TIMEOUT_S) as deadline:
                async for line in process.stdout:
                    self._heard(line)
                    if self._refused:
                        return self._refused
                    if self.state is LauncherState.READY:
                        deadline.reschedule(asyncio.get_running_loop().time() + SILENCE_S)
        except TimeoutError:
            if self.state is LauncherState.READY:
                return f"it has said nothing for {SILENCE_S:g} s"
            return f"it has not imported everything after {READY_TIMEOUT_S:g} s"
        except ValueError:
            return f"it wrote a line of more than {_EVENT_BYTES_MAX} bytes"
        await process.wait()
        return ""

    def _heard(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line, type=_Event)
        except msgspec.DecodeError as error:
            _log.warning("launcher_not_understood", launcher=self.plan.fingerprint, error=str(error))
            return
        if event.event == "ready":
            self.state, self.problem = LauncherState.READY, ""
            self._ready_at = asyncio.get_running_loop().time()
            self.ready_s = event.seconds
            self.version = event.vllm or self.version
            _log.info(
                "launcher_ready",
                launcher=self.plan.fingerprint,
                seconds=event.seconds,
                memory_bytes=event.memory_bytes,
                vllm=event.vllm,
            )
        elif event.event == "launched":
            self.launches += 1
            self._complaints = 0
            self._engines.add(event.pid)
        elif event.event == "ended":
            self._engines.discard(event.pid)
        elif event.event == "problem":
            self.problem = event.text
            self._complaints += 1
            if self.state is LauncherState.IMPORTING or self._complaints == COMPLAINTS_MAX:
                # It would stay and say so to everybody who asks; its memory is worth more.
                self._refused = event.text
            _log.warning("launcher_complained", launcher=self.plan.fingerprint, problem=event.text)


async def _end(process: Process) -> None:
    """End a launcher that may have ended already; returns when it was reaped."""
    assert process.stdin is not None
    process.stdin.close()
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_END_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    await process.wait()
