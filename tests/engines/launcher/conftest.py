"""A launcher in plain Python, and a worker program's side of its protocol."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pilotlight.engines.launching import DISTRIBUTION, launcher_environment

HERE = Path(__file__).parent
SECONDS = 30
KEY = "k" * 43
COOKIE = "abcdefghijklmn"


def base_environment(**more: str) -> dict[str, str]:
    """An engine's environment without its secrets."""
    return {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHONUNBUFFERED": "1"} | more


def engine_environment(**more: str) -> dict[str, str]:
    """An engine's whole environment."""
    return base_environment(VLLM_API_KEY=KEY, PILOTLIGHT_WORKER_ID=COOKIE, SPT_NOENV="1") | more


class Program:
    """A launcher's process."""

    def __init__(self, command: list[str], environment: dict[str, str], path: Path, log: Path) -> None:
        self.path = path
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        self.events: list[dict[str, Any]] = []

    def event(self, name: str, seconds: float = SECONDS) -> dict[str, Any]:
        """The next event with this name; the others are kept."""
        assert self.process.stdout is not None
        while True:
            ready, _, _ = select.select([self.process.stdout], [], [], seconds)
            line = self.process.stdout.readline() if ready else b""
            assert line, f"no event {name}, but {self.events}; {self.log.read_text()}"
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name:
                return self.events[-1]

    def connect(self) -> Connection:
        """A worker program's connection; the greeting is not read."""
        return Connection(self.path)

    def close(self) -> int:
        """Ends it as the gateway does; returns its exit code."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.wait(SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


class Connection:
    """A worker program's side."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SECONDS)
        self.socket.connect(str(path))
        self._lines = self.socket.makefile("rb")
        self.log = -1

    def read(self) -> dict[str, Any]:
        """The next message; EOFError if there is none."""
        line = self._lines.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def send(self, message: Any, descriptors: list[int]) -> None:
        """One message with descriptors."""
        socket.send_fds(self.socket, [json.dumps(message).encode() + b"\n"], descriptors)

    def launch(self, *arguments: str, **changes: Any) -> dict[str, Any]:
        """Asks for an engine; returns the answer. Its output can be read from `log`."""
        self.log, theirs = os.pipe()
        message = {
            "arguments": list(arguments),
            "environment": engine_environment(),
            "folder": "/",
            "architectures": [],
            "worker_id": COOKIE,
        }
        self.send(message | changes, [theirs])
        os.close(theirs)
        return self.read()

    def said(self) -> dict[str, Any]:
        """The next thing that the engine prints."""
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.log], [], [], SECONDS)
            assert ready, line
            data = os.read(self.log, 1)
            assert data, line
            line += data
        return json.loads(line)

    def close(self) -> None:
        """As if the worker program died."""
        self._lines.close()
        self.socket.close()
        if self.log >= 0:
            os.close(self.log)
            self.log = -1


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts a launcher that runs `programs.run`; ended after the test."""
    programs: list[Program] = []

    def begin(**environment: str) -> Program:
        path = tmp_path / "launcher.sock"
        target = ["--socket", str(path), "--target", "programs:run"]
        env = launcher_environment(base_environment(PYTHONPATH=str(HERE), **environment))
        command = [sys.executable, "-m", "pilotlight_engine.launcher", *target]
        programs.append(Program(command, env, path, tmp_path / "launcher.log"))
        programs[-1].event("listening")
        return programs[-1]

    yield begin
    for program in programs:
        children = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children")
        for pid in children.read_text().split() if children.exists() else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid), signal.SIGKILL)
        program.process.kill()
        program.close()


@pytest.fixture
def launcher(start: Callable[..., Program]) -> Program:
    """One that is ready."""
    program = start()
    program.event("ready")
    return program


@pytest.fixture
def connection(launcher: Program) -> Iterator[Connection]:
    """A connection to it, greeted."""
    made = launcher.connect()
    made.read()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the distribution's modules importable."""
    monkeypatch.syspath_prepend(DISTRIBUTION)


def ended(pid: int) -> bool:
    """Whether a process ends; waits for it."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        ready, _, _ = select.select([handle], [], [], SECONDS)
        return bool(ready)
    finally:
        os.close(handle)


def kill(pid: int) -> None:
    """Ends a process that nobody else would end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
