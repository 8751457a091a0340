"""The engine as a process: spawning it, reading its log, asking its health, ending it completely.

It leads a session of its own, so that it and everything it starts can be found and ended together, and
listens on a Unix socket with a random key that only travels in its environment. It is a child of ours
(`SpawnedProcess`) or was forked from a launcher (`launching.LaunchedProcess`); all else is the same for both.
Sending requests to it is here too; what the answers mean is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from pilotlight.domain.worker import ProcessIdentity
from pilotlight.processes import identify, let_go_on, read_process, stop_found
from pilotlight.system import death_signal_prefix
from pilotlight.worker.errors import EngineGoneError

if TYPE_CHECKING:
    # Loaded when the engine is first asked something: its process is spawned sooner that way.
    import aiohttp

_LINE_BYTES_MAX: Final = 64 * 1024
_SWEEP_SECONDS: Final = 5.0
_FLUSH_SECONDS: Final = 0.5
_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 - the system's place for it, not a file of ours
_PYTHON_NAMES: Final = ("psm_", "sem.mp-")


class EngineProcess(Protocol):
    """An engine's leading process, whoever is its parent."""

    @property
    def pid(self) -> int:
        """Its process id, which is also its process group and session."""
        ...

    @property
    def log(self) -> asyncio.StreamReader:
        """What it and its children print."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        ...

    @property
    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs, and where nobody can say."""
        ...

    @property
    def reaped(self) -> bool:
        """Whether its number may belong to somebody else by now."""
        ...

    async def wait(self) -> None:
        """Returns once it has ended."""
        ...

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to it; of no effect when it is gone."""
        ...

    def send_group(self, number: signal.Signals) -> None:
        """Sends a signal to its group, as far as its number vouches for that; of no effect otherwise."""
        ...

    def release(self) -> None:
        """Gives up the right to its number; nothing is asked of it afterwards."""
        ...


class SpawnedProcess:
    """An engine that is our child."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        self._process = process
        self.pid = process.pid
        self.log = process.stdout

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.returncode is None

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.returncode

    @property
    def reaped(self) -> bool:
        """A child of ours is waited for as soon as it has ended."""
        return self._process.returncode is not None

    async def wait(self) -> None:
        """Returns once it has ended."""
        await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def send_group(self, number: signal.Signals) -> None:
        """Sends a signal to its group while it is there to vouch for the number."""
        if not self.reaped:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def release(self) -> None:
        """Nothing is held."""


async def spawn(command: Sequence[str], environment: Mapping[str, str]) -> SpawnedProcess:
    """An engine as our child, ended by the kernel when we are killed; OSError if it cannot be spawned."""
    program = command[0]
    if shutil.which(program, path=environment.get("PATH")) is None:
        # What stands before it on the command line would be found, and end with a code of its own.
        raise FileNotFoundError(errno.ENOENT, "no such program", program)
    process = await asyncio.create_subprocess_exec(
        *death_signal_prefix(),
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
    )
    return SpawnedProcess(process)


class Engine:
    """One engine process; `start` once, `stop` as often as you like.

    Args:
        command: Program and arguments, with the address; what is shown of it, however it is started.
        socket_path: Unix socket it is told to listen on.
        key: Key it asks for, also the mark by which its stray children are found.
        on_line: Called with every line it prints, without the line end.
    """

    def __init__(
        self, *, command: Sequence[str], socket_path: Path, key: str, on_line: Callable[[bytes], None]
    ) -> None:
        self.command = tuple(command)
        self.socket_path = socket_path
        self.key = key
        self._on_line = on_line
        self._process: EngineProcess | None = None
        self._reader: asyncio.Task[None] | None = None
        self._drained = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None
        self._frozen: list[ProcessIdentity] = []
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """Its process id, which is also its process group and session; None before the start."""
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        """Whether its leading process runs."""
        return self._process is not None and self._process.alive

    @property
    def exit_code(self) -> int | None:
        """How it ended; negative for a signal, None while it runs and where nobody can say."""
        return self._process.exit_code if self._process is not None else None

    def processes(self) -> dict[int, bool]:
        """Its living processes, and whether each has left its session; takes some milliseconds."""
        process = self._process
        if process is None or self._stopped:
            return {}
        return find_processes(process.pid, self.key, reaped=process.reaped)

    async def start(self, make: Callable[[], Awaitable[EngineProcess]]) -> None:
        """Has the process made and begins to read its log.

        Args:
            make: Makes it; what it raises is raised here.
        """
        self.socket_path.unlink(missing_ok=True)
        self._process = await make()
        self._reader = asyncio.create_task(self._read_log(self._process.log), name="engine-log")

    async def wait(self) -> int | None:
        """Its exit code as above, once it has ended and its last lines were read."""
        assert self._process is not None
        await self._process.wait()
        if self._reader is not None:
            # A child that outlives it may hold the pipe open; do not wait for that.
            await asyncio.wait({self._reader}, timeout=0.5)
        return self._process.exit_code

    def note_drained(self) -> None:
        """Says that the engine, told to end, has finished its last request."""
        self._drained.set()

    async def healthy(self, seconds: float = 10.0) -> bool:
        """Whether it answers `/health` with 200 within so many seconds."""
        if not self.socket_path.exists():
            return False
        import aiohttp  # noqa: PLC0415 - see above

        try:
            async with self._client().get(
                "http://engine/health", timeout=aiohttp.ClientTimeout(total=seconds)
            ) as response:
                await response.read()
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def request(
        self, method: str, target: str, *, body: bytes | None = None, content_type: str = "application/json"
    ) -> aiohttp.ClientResponse:
        """The engine's answer, headers read and body unread; the caller closes it.

        Args:
            method: HTTP method.
            target: Path and query as `core.openai_routes.check_route` returned them.
            body: Request body.
            content_type: Its type.

        Raises:
            EngineGoneError: The engine is dead, or closed the connection without an answer.
        """
        import aiohttp  # noqa: PLC0415 - see above
        from yarl import URL  # noqa: PLC0415

        url = URL(f"http://engine{target}", encoded=True)
        headers = {"Content-Type": content_type} if body is not None else {}
        for attempt in (1, 2):
            if not self.alive:
                break
            try:
                return await self._client().request(method, url, data=body, headers=headers)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                # An idle connection that the engine closed while both were frozen: a fresh one tells whether
                # the engine is really gone. Nothing of an answer had arrived, so nothing is answered twice.
                if attempt == 2:
                    raise EngineGoneError(f"the engine closed the connection: {error}") from error
            except (aiohttp.ClientError, OSError) as error:
                raise EngineGoneError(f"the engine cannot be reached: {error}") from error
        raise EngineGoneError("the engine is not running")

    async def ask(self, method: str, target: str, *, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and whole body of a short answer; EngineGoneError where there is none."""
        import aiohttp  # noqa: PLC0415 - see above

        response = await self.request(method, target, body=body)
        async with response:
            try:
                return response.status, await response.read()
            except aiohttp.ClientError as error:
                raise EngineGoneError(f"the engine broke off its answer: {error}") from error

    def _client(self) -> aiohttp.ClientSession:
        """The one session of this engine: pooled connections, no proxy, no limit for a whole answer (§7)."""
        if self._session is None:
            import aiohttp  # noqa: PLC0415 - see above

            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(self.socket_path), limit=0, keepalive_timeout=30),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                headers={"Authorization": f"Bearer {self.key}", "Accept-Encoding": "identity"},
                auto_decompress=False,
            )
        return self._session

    async def stop(self, *, term_seconds: float) -> tuple[int, ...]:
        """Ends the engine and every process it left behind; returns only when none is there any more.

        Args:
            term_seconds: Patience after SIGTERM before SIGKILL; 0 kills at once.

        Returns:
            Processes that had to be killed one by one because they outlived the engine's group.
        """
        await self._drop_connections()
        process = self._process
        if process is None or self._stopped:
            return ()
        # Before anything is taken apart: a process gives its mappings back earlier than their names.
        segments = _shared_memory(self.processes())
        if process.alive and term_seconds > 0:
            process.send(signal.SIGTERM)
            # A frozen engine would not see the signal.
            process.send_group(signal.SIGCONT)
            await self._until_ended(process, term_seconds)
        self.kill()
        await process.wait()
        strays = await end_strays(self.processes)
        for segment in segments:
            segment.unlink(missing_ok=True)
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=0.5)
            self._reader.cancel()
        self._stopped = True
        process.release()
        return strays

    def kill(self) -> None:
        """Kills the engine's process group, if its leader is there to vouch for the number."""
        if self._process is not None and not self._stopped:
            self._process.send_group(signal.SIGKILL)

    async def freeze(self, timeout_s: float) -> tuple[int, ...]:
        """Stops every process of it in place, its session's and strays; returns their numbers.

        Connections that idle are closed: after a thaw the engine would close them, mostly those that are
        just being used again.

        Args:
            timeout_s: How long that may take.

        Raises:
            ClusterError: One cannot be stopped; all go on.
        """
        await self._drop_connections()
        self._frozen = await asyncio.to_thread(
            stop_found, self._identities, "the engine", timeout_s=timeout_s
        )
        return tuple(identity.pid for identity in self._frozen)

    def thaw(self) -> None:
        """Lets its processes go on where `freeze` stopped them; stopped processes start no others."""
        let_go_on(self._frozen)
        self._frozen = []

    async def _drop_connections(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    def _identities(self) -> list[ProcessIdentity]:
        """Its living processes; takes some milliseconds."""
        found = [identity for pid in self.processes() if (identity := identify(pid)) is not None]
        # Between the look and the line above a number may have passed to somebody else.
        still = self.processes()
        return [identity for identity in found if identity.pid in still]

    async def _until_ended(self, process: EngineProcess, seconds: float) -> None:
        """Waits until it has ended or has nothing left to do.

        After its last request vLLM spends four to eight seconds on taking its processes apart (measured on
        two cores), which the kernel does in milliseconds. Answers already produced get a moment to leave.
        """
        ended = asyncio.create_task(process.wait())
        drained = asyncio.create_task(self._drained.wait())
        await asyncio.wait({ended, drained}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done() and drained.done():
            await asyncio.wait({ended}, timeout=_FLUSH_SECONDS)
        for task in (ended, drained):
            task.cancel()

    async def _read_log(self, stream: asyncio.StreamReader) -> None:
        pending = b""
        while data := await stream.read(_LINE_BYTES_MAX):
            # Progress bars rewrite their line with carriage returns; each state becomes a line.
            *lines, pending = (pending + data).replace(b"\r", b"\n").split(b"\n")
            if len(pending) > _LINE_BYTES_MAX:
                lines.append(pending)
                pending = b""
            for line in lines:
                if line:
                    self._on_line(line)
        if pending:
            self._on_line(pending)


def find_processes(session: int | None, key: str, *, reaped: bool) -> dict[int, bool]:
    """Living processes of an engine, and whether each has left the engine's session.

    Args:
        session: Session id, which is the engine's process id; None = unknown, its key alone tells.
        key: The engine's key; its children inherit it in their environment whatever session they move to.
        reaped: The engine's leading process was waited for. The kernel does not give its number away while a
            process of its session lives, so a process that has the number now says that none is left, and
            that this session is a stranger's.
    """
    recycled = session is None or (reaped and Path(f"/proc/{session}").exists())
    mark = f"VLLM_API_KEY={key}".encode()
    found: dict[int, bool] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        process = read_process(int(entry.name))
        if process is None or process.state in {"Z", "X"}:
            continue
        if process.session == session and not recycled:
            found[process.pid] = False
            continue
        with contextlib.suppress(OSError):
            if mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                found[process.pid] = True
    return found


async def end_strays(find: Callable[[], dict[int, bool]]) -> tuple[int, ...]:
    """Kills what is left of an engine, one process at a time, for some seconds.

    Args:
        find: What is left, as `find_processes` says.

    Returns:
        Those that had left the engine's session.
    """
    strays: list[int] = []
    deadline = asyncio.get_running_loop().time() + _SWEEP_SECONDS
    while (found := find()) and asyncio.get_running_loop().time() < deadline:
        for pid, moved in found.items():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                handle = os.pidfd_open(pid)
                try:
                    # Between the look and this line the number may have passed to somebody else.
                    if pid in find():
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
            if moved and pid not in strays:
                strays.append(pid)
        await asyncio.sleep(0.02)
    return tuple(strays)


def _shared_memory(pids: Iterable[int]) -> tuple[Path, ...]:
    """Shared memory and semaphores of these processes; once they are killed, nobody else removes them.

    Compared by inode: a semaphore is made under another name than the one it ends up with, and the list of
    mappings shows the first.
    """
    inodes: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
                # address, permissions, offset, device, inode, path
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{_SHARED_MEMORY}/"):
                    inodes.add(int(fields[4]))
    with contextlib.suppress(OSError):
        entries = [entry for entry in os.scandir(_SHARED_MEMORY) if entry.name.startswith(_PYTHON_NAMES)]
        return tuple(Path(entry.path) for entry in entries if entry.inode() in inodes)
    return ()
