"""Virtual environments made from hashed locks: the machinery that `install` and `tools/setup.py` share.

Three things live here: a `Reporter` that tells a person what happens (never a silent minute),
`run_streaming`, which runs pip and turns its output into that report, and `exclusive`, the lock that keeps
two installations apart. Standard library only: this code runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from pilotlight.errors import EngineEnvironmentError, PilotlightError

REPORT_SECONDS_MIN = 10.0
"""Pause between two lines of progress where output is a file; a terminal is updated every second."""

TAIL_LINES = 40
"""Lines of a failed command's output that its error keeps."""


class SetupError(PilotlightError):
    """An environment could not be built; the message says why and what to do."""


class CommandError(SetupError):
    """A command ended with a code other than 0.

    Args:
        message: One sentence with the command's own reason.
        output: The last lines that it printed.
    """

    def __init__(self, message: str, *, output: Sequence[str]) -> None:
        super().__init__(message)
        self.output = tuple(output)


class Reporter:
    """Progress for a person, on stderr: one line per step, and within a step an update at least every 10 s.

    Args:
        stream: Where to write; a terminal gets one line that updates in place.
        clock: Monotonic seconds.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = clock()
        self._in_place = self._stream.isatty()
        self._reported = self._started
        self._open_line = False

    @property
    def elapsed_s(self) -> float:
        """Seconds since the reporter was made."""
        return self._clock() - self._started

    def line(self, text: str) -> None:
        """Write one whole line, with the seconds since the start in front."""
        self._close_line()
        self._stream.write(f"[{self.elapsed_s:4.0f} s] {text}\n")
        self._stream.flush()
        self._reported = self._clock()

    def update(self, text: str) -> None:
        """Say where the present step is; cheap to call often, written rarely."""
        now = self._clock()
        if self._in_place:
            if now - self._reported >= 1 or not self._open_line:
                width = shutil.get_terminal_size().columns - 1
                self._stream.write(f"\r\x1b[K{f'[{self.elapsed_s:4.0f} s]   {text}'[:width]}")
                self._stream.flush()
                self._open_line = True
                self._reported = now
        elif now - self._reported >= REPORT_SECONDS_MIN:
            self.line(f"  {text}")

    def _close_line(self) -> None:
        if self._open_line:
            self._stream.write("\r\x1b[K")
            self._open_line = False


def content_key(*parts: bytes | str) -> str:
    """The SHA-256, in hex, of the parts in order; their borders count."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content in one step: readers see the old text or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file, or an empty one where there is none or it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_environment(home: Path) -> bool:
    """Whether a virtual environment with a Python that can run lies here (it is not started)."""
    return (home / "pyvenv.cfg").is_file() and os.access(home / "bin" / "python", os.X_OK)


def site_packages(home: Path) -> Path:
    """The folder of an environment's packages.

    Raises:
        EngineEnvironmentError: There is none, so this is no virtual environment.
    """
    found = sorted((home / "lib").glob("python3.*/site-packages"))
    if not found:
        msg = f"{home} is not a virtual environment: it has no lib/python3.*/site-packages"
        raise EngineEnvironmentError(msg)
    return found[-1]


@contextlib.contextmanager
def exclusive(path: Path, reporter: Reporter) -> Iterator[None]:
    """Hold the lock file for the block's time; says so while another process holds it.

    The kernel releases the lock with the process, so a killed installation leaves nothing to clean up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                text = f"another set-up (process {holder}) is at work here; waiting for it"
                (reporter.update if waiting else reporter.line)(text)
                waiting = True
                time.sleep(0.5)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def run_streaming(
    command: Sequence[str | Path],
    *,
    reporter: Reporter,
    log: Path,
    doing: str,
    describe: Callable[[str], str | None] = lambda _line: None,
    watch: Callable[[], str | None] = lambda: None,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Run a command and report what it does; returns the last lines of its output.

    Args:
        command: Program and arguments.
        reporter: Gets an update for each line that `describe` translates, and every second from `watch`.
        log: The whole output is appended here.
        doing: What to report until the output says more.
        describe: Turns a line of output into a progress text, or None where it says nothing new.
        watch: Looks at the world once a second, for the time in which the command prints nothing.
        environment: Variables added to our own.

    Raises:
        CommandError: The command failed; its last lines come along.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    tail: list[str] = []
    with (
        log.open("a", encoding="utf-8", errors="replace") as record,
        subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
        ) as process,
    ):

        def pump() -> None:
            for line in process.stdout or ():
                lines.put(line.rstrip("\n"))
            lines.put(None)

        threading.Thread(target=pump, name="command output", daemon=True).start()
        try:
            while True:
                try:
                    line = lines.get(timeout=1.0)
                except queue.Empty:
                    reporter.update(watch() or doing)
                    continue
                if line is None:
                    break
                record.write(line + "\n")
                tail = [*tail[-TAIL_LINES + 1 :], line]
                doing = describe(line) or doing
                reporter.update(doing)
            code = process.wait()
        except BaseException:
            process.terminate()
            raise
    if code != 0:
        reason = next((line for line in tail if line.startswith("ERROR:")), tail[-1] if tail else "no output")
        msg = f"{Path(command[0]).name} ended with code {code}: {reason}"
        raise CommandError(msg, output=tail)
    return tail


def create_environment(home: Path, *, reporter: Reporter, log: Path) -> None:
    """Make a new virtual environment with pip, from the Python that runs us; whatever lay there is removed.

    Raises:
        SetupError: This Python cannot make one; the message names the package that is missing.
    """
    remove_tree(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_streaming(
            [sys.executable, "-I", "-m", "venv", home],
            reporter=reporter,
            log=log,
            doing=f"creating {home}",
        )
    except CommandError as error:
        remove_tree(home)
        if any("ensurepip" in line for line in error.output):
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            msg = (
                f"{sys.executable} cannot create virtual environments: its module ensurepip is missing. "
                f"On Debian and Ubuntu: apt-get install python{version}-venv"
            )
            raise SetupError(msg) from error
        msg = f"{sys.executable} could not create a virtual environment at {home}: {error}. Output: {log}"
        raise SetupError(msg) from error


def remove_tree(path: Path) -> None:
    """Remove a folder completely; a link or nothing at all is fine too."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


class PipProgress:
    """Translates pip's output into "12 of 146: numpy==2.4.6", and counts packages while pip is silent.

    Args:
        home: The environment that pip works in.
        total: Entries of the lock; entries for other machines are taken off as pip reports them.
        verb: What a package's line means, "downloading" or "installing".
    """

    def __init__(self, home: Path, *, total: int, verb: str) -> None:
        self._packages = next(iter((home / "lib").glob("python3.*/site-packages")), home)
        self._total = total
        self._verb = verb
        self._seen = 0
        self._installing = False
        self._before = self._count()

    def _count(self) -> int:
        return sum(1 for entry in os.scandir(self._packages) if entry.name.endswith(".dist-info"))

    def describe(self, line: str) -> str | None:
        """The progress that one line of pip's output stands for, or None."""
        text = line.strip()
        if text.startswith("Ignoring "):
            self._total -= 1
        elif text.startswith("Installing collected packages"):
            self._installing = True
        elif match := re.match(r"(?:Collecting|Processing) (\S+)", text):
            self._seen += 1
            return f"{self._verb} {self._seen} of {self._total}: {Path(match[1]).name}"
        elif match := re.match(r"Downloading (\S+) (\([^)]*\))", text):
            return f"{self._verb} {self._seen} of {self._total}: {Path(match[1]).name} {match[2]}"
        return None

    def watch(self) -> str | None:
        """The progress seen from outside, once pip has gone silent to copy files."""
        if not self._installing:
            return None
        return f"{self._verb} {max(0, self._count() - self._before)} of {self._total}"


def run_pip(
    home: Path, arguments: Sequence[str | Path], *, total: int, verb: str, reporter: Reporter, log: Path
) -> None:
    """Run the environment's own pip, with the machine's pip configuration and none of its user settings.

    Args:
        home: The environment.
        arguments: What follows `pip`.
        total: Packages expected, for the report.
        verb: "downloading" or "installing".
        reporter: Gets the progress.
        log: Gets the whole output.

    Raises:
        CommandError: pip failed.
    """
    progress = PipProgress(home, total=total, verb=verb)
    scratch = log.parent / f"{home.name}.tmp"
    scratch.mkdir(exist_ok=True)
    try:
        run_streaming(
            [home / "bin" / "python", "-I", "-m", "pip", *arguments, "--progress-bar=off", "--no-input"],
            reporter=reporter,
            log=log,
            doing="starting pip",
            describe=progress.describe,
            watch=progress.watch,
            # pip unpacks into TMPDIR, and /tmp is a small memory disk on some machines.
            environment={"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "TMPDIR": str(scratch)},
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def lock_entries(lock: Path) -> int:
    """How many packages a lock names, those for other machines included."""
    return len(re.findall(r"^[A-Za-z0-9][\w.\[\]-]*==", lock.read_text(encoding="utf-8"), flags=re.MULTILINE))
