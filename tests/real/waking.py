"""What the tests of the warm ladder share: an endpoint, its worker from outside, and waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.conftest import LiveInstallation

from pilotlight.clusters.processes import find_processes

QUESTION = {
    "model": "pilotlight/ember",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 32,
}
ENGINE_PROCESSES = 3
"""API server, engine core, worker of the engine; more where Python's resource tracker runs."""
ANSWER = "The capital of France is Paris."


def until(condition: Callable[[], Any], *, timeout_s: float = 60) -> Any:
    """What the condition gives once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.02)
    return found


def state_of(pid: int) -> str:
    """The letter of /proc/PID/stat, "" for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class Sleeper:
    """An endpoint whose worker goes to sleep after a second.

    Args:
        installation: Where.
        name: Of the endpoint.
        flashboot: Whether the worker is frozen, or ended.
    """

    def __init__(self, installation: LiveInstallation, name: str, *, flashboot: bool = True) -> None:
        self.installation = installation
        self.api = installation.api
        self.id = installation.deploy("pilotlight/ember", name, idle_timeout_s=1, max=1, flashboot=flashboot)[
            "id"
        ]

    def ask(self) -> str:
        """The answer to the question, through the data path."""
        answer = self.api.post(f"/v2/{self.id}/openai/v1/chat/completions", json=QUESTION)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    def counts(self) -> dict[str, int]:
        """Its workers by state."""
        return self.api.get(f"/pilotlight/v1/endpoints/{self.id}").json()["workers"]

    def worker_id(self) -> str:
        """The id of its one worker."""
        (worker,) = self.api.get(f"/pilotlight/v1/endpoints/{self.id}/workers").json()["workers"]
        return worker["id"]

    def await_frozen(self) -> str:
        """The id of its worker once that is frozen, and its engine stands still."""
        until(lambda: self.counts() == {"frozen": 1})
        worker_id = self.worker_id()
        until(lambda: len(engine_of(worker_id)) >= ENGINE_PROCESSES)
        return worker_id

    def await_none(self) -> None:
        """Return when it has no workers."""
        until(lambda: not self.counts())

    def starts(self) -> list[dict]:
        """Its starts, latest first."""
        return self.api.get(f"/pilotlight/v1/endpoints/{self.id}/starts").json()["starts"]

    def start_after(self, last: dict) -> dict:
        """The start that came after this one, once it is on record."""

        def newer() -> dict | None:
            latest = self.starts()[0]
            return latest if latest["stages"][0] != last["stages"][0] else None

        return until(newer)

    def usage_states(self) -> set[str]:
        """States for which usage was recorded."""
        usage = self.api.get(f"/pilotlight/v1/usage?endpoint={self.id}").json()["intervals"]
        return {interval["state"] for interval in usage}

    def remove(self) -> None:
        """Delete it and wait for its end."""
        self.api.delete(f"/v2/serverless/{self.id}").raise_for_status()


def processes_of(worker_id: str) -> list[int]:
    """Processes of a worker, its worker program first."""
    return [identity.pid for identity in find_processes({worker_id: None}).get(worker_id, [])]


def engine_of(worker_id: str) -> list[int]:
    """Processes of a worker's engine: those that are stopped while it is frozen."""
    return [pid for pid in processes_of(worker_id) if state_of(pid) == "T"]


def end(pids: list[int]) -> None:
    """Kill processes that the test's own installation has started; the end of one may have been that of others."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# Attaches to every thread, says so, and collects their ends, which the process's parent would else not learn of.
_HOLDER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
threads = {int(thread) for thread in os.listdir(f"/proc/{sys.argv[1]}/task")}
for thread in sorted(threads):
    if libc.ptrace(16, thread, None, None):  # PTRACE_ATTACH
        if ctypes.get_errno() != 3:  # ESRCH: it has ended meanwhile
            sys.exit(os.strerror(ctypes.get_errno()))
        threads.remove(thread)
print("held", flush=True)
while threads:
    thread, status = os.waitpid(-1, 0x40000000)  # __WALL
    if os.WIFEXITED(status) or os.WIFSIGNALED(status):
        threads.remove(thread)
"""


@contextmanager
def held(pid: int) -> Iterator[None]:
    """The threads of a stopped process stay where they are whoever continues it, as under a debugger."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(pid)], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield
        finally:
            holder.kill()


def launcher_of(installation: LiveInstallation) -> dict:
    """The one launcher, once it is ready."""

    def ready() -> dict | None:
        launchers = installation.api.get("/pilotlight/v1/launchers").json()["launchers"]
        return next((launcher for launcher in launchers if launcher["state"] == "ready"), None)

    return until(ready, timeout_s=120)
