"""Asking a launcher for an engine: our side of the protocol, and the process that comes of it.

A launcher is a process that has imported vLLM and forks engines from itself (`engines/distribution`); it is
the engine's parent, so it alone learns how the engine ends. One connection is one engine:

1. The launcher says who it is. Its answer may take as long as its imports.
2. We say which engine we want, and hand over the write end of a pipe for what the engine prints.
3. The launcher answers with the engine's process id.
4. The connection is held for the engine's whole life: where it breaks, the launcher takes us for dead and
   ends the engine. When the engine ends, the launcher says how, and leaves its number taken until we hang up,
   so that its group can be killed by that number.

A launcher that ends does not end its engines. What is left then is a pidfd, opened while the launcher still
vouched for the number: it tells that the engine has ended, and not how.

Doubt of any kind is `LaunchRefusedError`, and no engine is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from pilotlight.engines.launching import MESSAGE_BYTES_MAX, PROTOCOL, differences
from pilotlight.processes import read_process
from pilotlight.worker.engine import end_strays, find_processes

HELLO_SECONDS: Final = 180.0
"""How long a launcher may take to greet; half of what is left of the start at most, the rest is for the next
rung. To wait for its imports is mostly faster than to import beside it, so this is for those that hang. It is
shorter than a platform's patience with a start that does not go on (420 s)."""

LATE_SECONDS: Final = 0.1
"""A launcher that has not greeted by then is still importing."""

FORK_SECONDS: Final = 60.0
"""How long it may take from the request to the engine's process id, other requests before ours included."""

LISTEN_SECONDS: Final = 2.0
"""How long a launcher may take to listen: the gateway starts it at the same time as its first workers."""

LISTEN_POLL_SECONDS: Final = 0.05

STATUS_SECONDS: Final = 5.0
"""How long a launcher may take to say how an engine ended that has ended: it may just be importing a class of
models for another. One that has ended itself is not waited for."""

_SETTLE_SECONDS: Final = 5.0
_LOG_BYTES_MAX: Final = 64 * 1024

_T = TypeVar("_T")


class LaunchRefusedError(Exception):
    """The launcher does not start this engine, or is not to; says why, for the log."""


class _Lost(Exception):  # noqa: N818 - a happening that this module handles
    """The launcher has closed the connection."""


class Hello(msgspec.Struct, frozen=True):
    """What a launcher says first.

    Attributes:
        protocol: Version of what it speaks.
        pid: Its process id.
        program: The Python that it runs.
        vllm: Version of what it has imported.
        environment: What it was started with.
        problem: Why it starts nothing; "" = it does.
    """

    protocol: int
    pid: int
    program: str = ""
    vllm: str = ""
    environment: dict[str, str] = {}
    problem: str = ""


class _Forked(msgspec.Struct, frozen=True):
    pid: int = 0
    problem: str = ""


class _Ended(msgspec.Struct, frozen=True):
    ended: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """The engine that is wanted.

    Attributes:
        home: The engine's virtual environment, which the launcher's must be.
        version: The vLLM that is expected there.
        arguments: vLLM's.
        environment: The engine's, complete.
        key: Of the environment; by it processes of this engine are found.
        folder: Its working directory.
        architectures: Classes of the model, to be imported before the fork.
        worker_id: For the launcher's reports.
    """

    home: Path
    version: str
    arguments: tuple[str, ...] = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    key: str = field(repr=False)
    folder: str
    architectures: tuple[str, ...]
    worker_id: str

    def message(self) -> bytes:
        """As it is sent; LaunchRefusedError where it holds bytes that are no text."""
        content = {
            "arguments": self.arguments,
            "environment": dict(self.environment),
            "folder": self.folder,
            "architectures": self.architectures,
            "worker_id": self.worker_id,
        }
        try:
            return msgspec.json.encode(content) + b"\n"
        except UnicodeEncodeError as error:
            # Such as variables may hold. Neither they nor the error, which quotes them, are shown.
            raise LaunchRefusedError("arguments or variables hold bytes that are not UTF-8") from error


def objection(hello: Hello, request: LaunchRequest) -> str:
    """Why this launcher cannot start this engine; "" for no reason.

    Args:
        hello: What it says.
        request: What is wanted.
    """
    if hello.protocol != PROTOCOL:
        return f"the launcher speaks protocol {hello.protocol}, not {PROTOCOL}"
    if hello.problem:
        return f"the launcher refuses: {hello.problem}"
    if _home_of(hello.program) != request.home.resolve():
        return f"the launcher runs {hello.program or 'nobody knows what'}, not the engine of {request.home}"
    if hello.vllm != request.version:
        return f"the launcher has vLLM {hello.vllm or 'unknown'}, not {request.version}"
    if names := differences(hello.environment, request.environment):
        return f"the launcher was started with another {', '.join(names)}"
    return ""


def _home_of(program: str) -> Path | None:
    return Path(program).parent.parent.resolve() if program.startswith("/") else None


async def launch(
    path: Path, request: LaunchRequest, *, deadline: float, on_late: Callable[[], None]
) -> LaunchedProcess:
    """An engine forked by the launcher that listens here.

    Whoever cancels this leaves no engine behind: the launcher ends it.

    Args:
        path: The launcher's socket.
        request: What is wanted.
        deadline: Moment of the loop's clock until which it may take, however patient we are.
        on_late: Called once when the launcher is still importing.

    Raises:
        LaunchRefusedError: There is no engine, for the reason it names.
    """
    connection = await _connect(path)
    try:
        hello = await _greeted(connection, deadline, on_late)
        reason = objection(hello, request)
        if reason:
            raise LaunchRefusedError(reason)
        return await _forked(connection, request, deadline)
    except BaseException:
        connection.close()
        raise


async def _connect(path: Path) -> _Connection:
    """A connection; a launcher that is only just being started gets a moment to listen."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + LISTEN_SECONDS
    while True:
        try:
            return await _connect_once(path)
        except LaunchRefusedError as error:
            absent = isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError)
            if not absent or loop.time() >= deadline:
                raise
        await asyncio.sleep(LISTEN_POLL_SECONDS)


async def _connect_once(path: Path) -> _Connection:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(sock, str(path))
        return _Connection(sock)
    except OSError as error:
        sock.close()
        raise LaunchRefusedError(f"no launcher at {path}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise


async def _greeted(connection: _Connection, deadline: float, on_late: Callable[[], None]) -> Hello:
    loop = asyncio.get_running_loop()
    late = loop.call_later(LATE_SECONDS, on_late)
    try:
        patience = min(HELLO_SECONDS, (deadline - loop.time()) / 2)
        async with asyncio.timeout(patience):
            return await connection.receive(Hello)
    except TimeoutError as error:
        raise LaunchRefusedError("the launcher did not greet in time") from error
    except _Lost as error:
        raise LaunchRefusedError("the launcher ended before it greeted") from error
    finally:
        late.cancel()


async def _forked(connection: _Connection, request: LaunchRequest, deadline: float) -> LaunchedProcess:
    loop = asyncio.get_running_loop()
    log, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + FORK_SECONDS)):
                await connection.send(request.message(), theirs)
                os.close(theirs)
                theirs = -1
                answer = await connection.receive(_Forked)
        finally:
            if theirs >= 0:
                os.close(theirs)
        if answer.problem or answer.pid <= 0:
            raise LaunchRefusedError(f"the launcher refuses: {answer.problem or 'it names no process'}")
        # The launcher has not waited for it, so the number is the engine's.
        handle = os.pidfd_open(answer.pid)
        if not _is_forked(answer.pid, connection.peer):
            os.close(handle)
            raise LaunchRefusedError(f"the launcher names process {answer.pid}, which is not the engine")
    except BaseException as error:
        connection.close()
        try:
            # A launcher that was killed may have forked before.
            await _until_nobody(log, request.key)
        finally:
            os.close(log)
        if isinstance(error, TimeoutError):
            raise LaunchRefusedError("the launcher did not fork an engine in time") from error
        if isinstance(error, _Lost):
            raise LaunchRefusedError("the launcher ended before it had forked an engine") from error
        if isinstance(error, OSError):
            raise LaunchRefusedError(f"the launcher cannot be asked: {error.strerror or error}") from error
        raise
    reader = asyncio.StreamReader(_LOG_BYTES_MAX)
    stream = os.fdopen(log, "rb", buffering=0)
    try:
        pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stream)
    except BaseException:
        stream.close()
        os.close(handle)
        raise
    return LaunchedProcess(answer.pid, handle, connection, reader, pipe)


async def _until_nobody(log: int, key: str) -> None:
    """Ends an engine whose process id nobody has told; returns when no process can print any more.

    Args:
        log: Read end of the pipe it would print to. It is at its end once nobody holds the other.
        key: The engine's.
    """
    os.set_blocking(log, False)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _SETTLE_SECONDS
    while loop.time() < deadline:
        with contextlib.suppress(BlockingIOError):
            if not os.read(log, _LOG_BYTES_MAX):
                return
        # It carries its key only some moments after it was forked.
        await end_strays(lambda: find_processes(None, key, reaped=False))
        await asyncio.sleep(0.01)


def _is_forked(pid: int, launcher: int) -> bool:
    """Whether a process, which may have ended, is the launcher's child and leads a session."""
    process = read_process(pid)
    return process is not None and (process.parent, process.session) == (launcher, pid)


class _Connection:
    """One connection to a launcher of the same user.

    Raises:
        LaunchRefusedError: It belongs to somebody else, or there is no room in its queue.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._pending = b""
        size = struct.calcsize("3i")
        self.peer, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if not self.peer:
            # The kernel knows nobody: it was not connected, though it was said to be.
            raise LaunchRefusedError("too many wait for the launcher, or it runs in another PID namespace")
        if uid != os.geteuid():
            raise LaunchRefusedError(f"the launcher belongs to user {uid}, not to {os.geteuid()}")

    async def send(self, message: bytes, descriptor: int) -> None:
        """Sends a message, and a descriptor with its first bytes; OSError where that cannot be."""
        # Nothing was sent before, so there is room; the rest may have to wait.
        sent = socket.send_fds(self._socket, [message], [descriptor])
        if rest := message[sent:]:
            # Who hangs up meanwhile may have said why.
            with contextlib.suppress(ConnectionError):
                await asyncio.get_running_loop().sock_sendall(self._socket, rest)

    async def receive(self, kind: type[_T]) -> _T:
        """The next message.

        Raises:
            LaunchRefusedError: It makes no sense.
            _Lost: There is none.
        """
        line = await self._line()
        try:
            return msgspec.json.decode(line, type=kind)
        except msgspec.DecodeError as error:
            raise LaunchRefusedError(f"the launcher says what makes no sense: {error}") from error

    async def _line(self) -> bytes:
        loop = asyncio.get_running_loop()
        while b"\n" not in self._pending:
            if len(self._pending) > MESSAGE_BYTES_MAX:
                raise LaunchRefusedError(f"the launcher says more than {MESSAGE_BYTES_MAX} bytes at a time")
            try:
                data = await loop.sock_recv(self._socket, _LOG_BYTES_MAX)
            except ConnectionError as error:
                raise _Lost from error
            if not data:
                raise _Lost
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def close(self) -> None:
        """Hangs up; the launcher ends the engine of this connection where there is one."""
        self._socket.close()


class LaunchedProcess:
    """An engine whose parent is the launcher; made by `launch`.

    Args:
        pid: The engine's process id.
        handle: A pidfd of it.
        connection: Held until `release`.
        log: What it prints.
        pipe: Where that comes from.
    """

    def __init__(
        self,
        pid: int,
        handle: int,
        connection: _Connection,
        log: asyncio.StreamReader,
        pipe: asyncio.ReadTransport,
    ) -> None:
        self.pid = pid
        self.log = log
        self._handle = handle
        self._connection = connection
        self._pipe = pipe
        self._orphaned = False
        self._code: int | None = None
        self._told = asyncio.Event()
        self._ended = asyncio.Event()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(handle, self._on_gone)
        self._status = asyncio.create_task(self._read_status(), name="engine-status")
        self._following = asyncio.create_task(self._follow(), name="engine-end")

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return not self._ended.is_set()

    @property
    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs, and where its launcher could not say."""
        return None if self.alive else self._code

    @property
    def reaped(self) -> bool:
        """Whether somebody has waited for it, as the kernel says of its pidfd."""
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = Path(f"/proc/self/fdinfo/{self._handle}").read_text(encoding="ascii").splitlines()
            return int(next(line for line in lines if line.startswith("Pid:")).split()[1]) < 0
        return True

    async def wait(self) -> None:
        """Returns once it has ended and, where there is somebody who knows it, its exit code is there."""
        await self._ended.wait()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def send_group(self, number: signal.Signals) -> None:
        """Sends a signal to its group while the launcher holds its number, else to itself alone."""
        if self._orphaned:
            self.send(number)
        elif not self.reaped:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def release(self) -> None:
        """Hangs up, which lets the launcher wait for it; what is left of it is killed."""
        asyncio.get_running_loop().remove_reader(self._handle)
        for task in (self._status, self._following):
            task.cancel()
        self._ended.set()
        self._pipe.close()
        self._connection.close()
        os.close(self._handle)

    def _on_gone(self) -> None:
        asyncio.get_running_loop().remove_reader(self._handle)
        if not self._gone.done():
            self._gone.set_result(None)

    async def _follow(self) -> None:
        await self._gone
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATUS_SECONDS):
                await self._told.wait()
        self._ended.set()

    async def _read_status(self) -> None:
        """How it ended, as the launcher says, and then that the launcher is gone.

        Where that is lost or garbled, the connection stays open: to hang up would end an engine that works.
        """
        try:
            self._code = (await self._connection.receive(_Ended)).ended
            self._told.set()
            await self._connection.receive(_Ended)
        except (_Lost, LaunchRefusedError, OSError):
            self._orphaned = True
            self._told.set()
