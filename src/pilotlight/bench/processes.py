"""The programs that a benchmark starts: in a temporary folder, each with a log, all ended at the end.

`Bench` is a context. Leaving it, by whatever way (the end, an error, Ctrl-C, SIGTERM, SIGHUP), ends every
program by its process group, last started first, and removes the folder. A program that is left behind by a
killed benchmark gets SIGTERM from the kernel where `setpriv` is installed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, NoReturn, Self

from pilotlight.bench.errors import BenchError

END_S = 20.0
"""From SIGTERM to SIGKILL; `pilotlight up` ends its own workers within ten seconds."""

START_S = 30.0
"""How long a small program may take until it answers."""

_POLL_S = 0.01
_QUOTED_LINES = 15
_IDLE_S = 0.02
"""CPU time within one quiet time that a process uses which has nothing left to do."""

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Child:
    """A running program.

    Attributes:
        name: For messages, and of its log.
        pid: Process id; it leads a session and a process group of its own.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._log = log

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def read_line(self, timeout_s: float = START_S) -> bytes:
        """The next line of its standard output, which it was started to print.

        Raises:
            BenchError: It ended or said nothing in time.
        """
        stream = self._process.stdout
        assert stream is not None
        lines: list[bytes] = []
        # A pipe has no timeout; the thread ends with the line, or with the program.
        reader = threading.Thread(target=lambda: lines.append(stream.readline()), daemon=True)
        reader.start()
        reader.join(timeout_s)
        if not lines or not lines[0]:
            raise self.error(f"did not say within {timeout_s:g} s that it is ready")
        return lines[0]

    def output(self, timeout_s: float) -> bytes:
        """All of its standard output, once it has ended well.

        Raises:
            BenchError: It failed, or did not end in time.
        """
        try:
            out, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise self.error(f"did not finish within {timeout_s:g} s") from error
        if self._process.returncode:
            raise self.error(f"failed with exit code {self._process.returncode}")
        return out

    def wait_port(self, port: int, timeout_s: float = START_S) -> None:
        """Return when it accepts connections.

        Raises:
            BenchError: It ended or did not listen in time.
        """
        deadline = time.monotonic() + timeout_s
        while self.running:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            if time.monotonic() > deadline:
                raise self.error(f"did not listen on port {port} within {timeout_s:g} s")
            time.sleep(_POLL_S)
        raise self.error(
            f"ended with exit code {self._process.returncode} instead of listening on port {port}"
        )

    def error(self, what: str) -> BenchError:
        """An error about this program that quotes the end of its log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_QUOTED_LINES:]
        return BenchError("\n".join([f"{self.name} {what}", *(f"  {line}" for line in lines)]))

    def end(self) -> None:
        """End it and its process group; returns when it has ended."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Bench:
    """A temporary folder and the programs that run in it.

    Attributes:
        folder: Gone after the context.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self._children: list[Child] = []
        self._closing: list[Callable[[], None]] = []
        self._handlers: dict[signal.Signals, object] = {}
        self._count = 0

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="pilotlight-bench-"))
        # PostgreSQL, which does not run as root, has to reach its folder in there.
        self.folder.chmod(0o711)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self._handlers[number] = signal.signal(number, _leave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _undisturbed():
            for close in self._closing:
                close()
            for child in reversed(self._children):
                child.end()
            shutil.rmtree(self.folder, ignore_errors=True)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    def start(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, stdout: bool = False
    ) -> Child:
        """A program that runs until `end`, or until the benchmark is over.

        Args:
            name: For messages.
            command: Program and arguments.
            env: Its whole environment; None inherits ours without Pilotlight's settings.
            stdout: Keep its standard output for `read_line` and `output`; otherwise it goes into the log.

        Raises:
            BenchError: It could not be started.
        """
        self._count += 1
        log = self.folder / f"{self._count:02}-{name.replace(' ', '-')}.log"
        with log.open("wb") as file:
            out: int | IO[bytes] = subprocess.PIPE if stdout else file
            try:
                process = subprocess.Popen(
                    [*_with_death_signal(), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=file,
                    cwd=self.folder,
                    env=dict(environment() if env is None else env),
                    start_new_session=True,
                )
            except OSError as error:
                raise BenchError(f"{name}: {command[0]} cannot be started: {error.strerror}") from error
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout_s: float,
    ) -> bytes:
        """Standard output of a program that ends by itself; otherwise as `start` and `output`."""
        child = self.start(name, command, env=env, stdout=True)
        try:
            return child.output(timeout_s)
        finally:
            self.end(child)

    def close_at_end(self, close: Callable[[], None]) -> None:
        """Call this when the benchmark is over, before the programs are ended."""
        self._closing.append(close)

    def end(self, child: Child) -> None:
        """End one program now."""
        child.end()
        self._children.remove(child)


def environment(**more: str) -> dict[str, str]:
    """Our environment without Pilotlight's settings, and what is added; a benchmark measures the defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PILOTLIGHT_")} | more


def python_module(name: str, *arguments: object) -> list[str]:
    """The command line of one of our own modules."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def free_port() -> int:
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds that these processes have used, user and system, all threads, children not counted.

    Raises:
        BenchError: One of them has ended.
    """
    return sum(map(_process_clock_s, pids))


def _process_clock_s(pid: int) -> float:
    # The clock of another process, as clock_getcpuclockid(3) makes it: exact, where /proc counts in ticks.
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError as error:
        raise _ended(pid) from error


def _ended(pid: int) -> BenchError:
    return BenchError(f"process {pid} has ended in the middle of the measurement")


def settled_cpu_s(pids: Sequence[int], *, quiet_s: float, timeout_s: float = 15.0) -> float:
    """CPU seconds once the work that was put off (batched writes, about once a second) is done too."""
    deadline = time.monotonic() + timeout_s
    before = cpu_s(pids)
    while True:
        time.sleep(quiet_s)
        now = cpu_s(pids)
        if now - before <= _IDLE_S or time.monotonic() > deadline:
            return now
        before = now


def rss_mb(pid: int) -> float:
    """Resident memory of a process in megabytes (10⁶ bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise BenchError(f"process {pid} has ended")


@contextlib.contextmanager
def watched_rss_mb(pids: Sequence[int], *, every_s: float = 0.1) -> Iterator[list[float]]:
    """Samples of the resident memory of these processes together, in MB, taken while the block runs."""
    samples = [sum(map(rss_mb, pids))]
    over = threading.Event()

    def watch() -> None:
        # A process that ends is somebody else's to report.
        with contextlib.suppress(BenchError, OSError):
            while not over.wait(every_s):
                samples.append(sum(map(rss_mb, pids)))

    watcher = threading.Thread(target=watch, name="resident memory", daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        over.set()
        watcher.join()


def children_of(pid: int) -> list[int]:
    """Processes whose parent is this one."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(child) for child in text.split()]


def stat_fields(pid: int) -> list[bytes]:
    """What /proc/PID/stat says from field 3 on; BenchError for a process that has ended."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError as error:
        raise _ended(pid) from error
    # The command name may hold blanks and brackets; what follows it begins with field 3.
    return content.rpartition(b")")[2].split()


def _with_death_signal() -> tuple[str, ...]:
    program = shutil.which("setpriv")
    return (program, "--pdeathsig", "TERM", "--") if program else ()


def _leave(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - the signature is signal's
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore the signals that end us: the ending is under way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
