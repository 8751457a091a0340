"""The fork itself: both sides, up to the moment from which the child goes on alone."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pilotlight_engine.child import Launch, RequestError, become_engine

_READY = b"ready"
_GO = b"go"
_READY_SECONDS = 10.0
_TEXT_BYTES_MAX = 4096


@dataclass(slots=True)
class Forked:
    """A child that is ready, and waits to be told to go on; without that it ends.

    Attributes:
        pid: Its process id, session and group.
        handle: Its pidfd.
        gate: Where it waits.
    """

    pid: int
    handle: int
    gate: socket.socket

    def release(self) -> None:
        """Lets it go on; raises OSError if it is gone."""
        with self.gate:
            self.gate.sendall(_GO)


def fork_engine(
    launch: Launch, output: int, own: Mapping[str, str], abandon: Callable[[], None]
) -> Forked | None:
    """Forks.

    There must be no engine that no worker program was told of, not even if the launcher is killed in the
    middle of this. So the child waits until that has happened.

    Args:
        launch: What the child becomes.
        output: Descriptor for its output; closed here.
        own: The launcher's environment.
        abandon: Called in the child, closes what belongs to the launcher.

    Returns:
        The child; in the child itself None, once it was released.

    Raises:
        RequestError: It cannot be forked, or cannot become the engine.
    """
    try:
        gate, theirs = socket.socketpair()
    except OSError as error:
        os.close(output)
        raise RequestError(f"no process can be forked: {error.strerror}") from error
    sys.stdout.flush()
    try:
        pid = os.fork()
    except OSError as error:
        gate.close()
        theirs.close()
        os.close(output)
        raise RequestError(f"no process can be forked: {error.strerror}") from error
    if pid == 0:
        gate.close()
        _await_release(launch, output, own, abandon, theirs)
        return None
    theirs.close()
    os.close(output)
    try:
        gate.settimeout(_READY_SECONDS)
        answer = gate.recv(_TEXT_BYTES_MAX)
        if answer != _READY:
            raise RequestError(answer.decode(errors="replace") or "the forked process ended at once")
        return Forked(pid, os.pidfd_open(pid), gate)
    except (OSError, RequestError) as error:
        gate.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"the forked process is not ready: {error}") from error


def trial() -> None:
    """Forks a child that ends at once: threads of libraries that know of forks are gone after that."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _await_release(
    launch: Launch, output: int, own: Mapping[str, str], abandon: Callable[[], None], gate: socket.socket
) -> None:
    """The child's side; whatever fails here is told and ends it."""
    try:
        abandon()
        become_engine(launch, output, own, keep=gate.fileno())
        gate.sendall(_READY)
        if gate.recv(len(_GO)) != _GO:
            os._exit(1)
        gate.close()
        gc.enable()
    except BaseException as error:  # noqa: BLE001 - nothing may lead back into the launcher's code
        with contextlib.suppress(OSError):
            gate.sendall(str(error).encode()[:_TEXT_BYTES_MAX] or type(error).__name__.encode())
        os._exit(1)
