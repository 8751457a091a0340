"""Processes told apart, signalled and stopped in place, whoever owns them.

Which processes belong to a worker is found elsewhere: all of them by `clusters.processes`, those of an engine
by the worker program. A number alone never identifies a process: every decision to signal compares start time
and boot as well, and the signal goes through a pidfd, so that a process which got a dead one's number is not
hit.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from pilotlight.domain.worker import ProcessIdentity
from pilotlight.errors import ClusterError

STOP_TIMEOUT_S = 5.0
"""How long SIGSTOP may take; a process that waits inside the kernel stops when it comes back."""

_KERNEL_THREAD = 0x00200000  # PF_KTHREAD in field 9 of /proc/PID/stat
_STANDS_STILL = frozenset("TtZXx")
"""States of a process that has stopped or ended. A main thread that ended before the others shows as Z; they
stop with the same signal."""
_PAUSE_FIRST_S = 0.001
_PAUSE_LAST_S = 0.05


@dataclass(frozen=True, slots=True)
class Process:
    """What /proc/PID/stat says of a process, as far as anybody here needs it."""

    pid: int
    state: str
    parent: int
    session: int
    started_ticks: int
    dead: bool
    kernel: bool


@functools.cache
def boot_id() -> str:
    """The id of the present boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def identify(pid: int) -> ProcessIdentity | None:
    """The process that has this number now (it may be a zombie), or None where there is none."""
    process = read_process(pid)
    return None if process is None else identity_of(process)


def is_alive(identity: ProcessIdentity) -> bool:
    """Whether this very process still runs. Zombies are dead; stopped processes are alive."""
    if identity.boot_id != boot_id():
        return False
    process = read_process(identity.pid)
    return process is not None and process.started_ticks == identity.started_ticks and not process.dead


def send_signal(identity: ProcessIdentity, number: signal.Signals) -> bool:
    """Signal this very process.

    Args:
        identity: Whom.
        number: What.

    Returns:
        Whether it was there to be signalled.
    """
    try:
        descriptor = open_pidfd(identity.pid)
        if descriptor is None:
            # Without pidfds the check and the signal are two steps. The gap is microseconds wide, and a
            # number comes up again only after all the others.
            alive = is_alive(identity)
            if alive:
                os.kill(identity.pid, number)
            return alive
        try:
            # Checked after opening: if the number has the right start time now, the descriptor cannot be
            # that of another process, because the one meant is older than the descriptor.
            alive = is_alive(identity)
            if alive:
                signal.pidfd_send_signal(descriptor, number)
            return alive
        finally:
            os.close(descriptor)
    except ProcessLookupError:
        return False


def open_pidfd(pid: int) -> int | None:
    """A descriptor of the process with this number; None where the kernel or a sandbox has no pidfds.

    Raises:
        ProcessLookupError: There is no such process.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        # EPERM comes from seccomp profiles that are older than the call.
        if error.errno in {errno.ENOSYS, errno.EPERM}:
            return None
        raise


def stop_found(
    find: Callable[[], Collection[ProcessIdentity]], name: str, *, timeout_s: float = STOP_TIMEOUT_S
) -> list[ProcessIdentity]:
    """Stop in place every process that is found, and look again until none that is found runs; returns them.

    Blocks, so call it from a thread. What was forked between a look and the signal is found by the next look:
    by then its parent stands still. SIGKILL ends stopped processes as they are; `let_go_on` is the way back.

    Args:
        find: All living processes that are meant.
        name: Whose they are, for the error.
        timeout_s: Bound on the whole.

    Raises:
        ClusterError: Some still ran at the bound, or may not be signalled; all go on again then.
    """
    deadline = time.monotonic() + timeout_s
    stopped: set[ProcessIdentity] = set()
    try:
        while True:
            targets = list(find())
            running = [identity for identity in targets if _runs(identity)]
            if not running:
                return targets
            if time.monotonic() >= deadline:
                raise ClusterError(describe(name, running, f"still runs {timeout_s:g} s after SIGSTOP"))
            stopped.update(running)
            for identity in running:
                send_signal(identity, signal.SIGSTOP)
            wait_while(_runs, running, deadline)
    except PermissionError as error:
        let_go_on(stopped)
        raise ClusterError(describe(name, running, "may not be stopped by this user")) from error
    except BaseException:
        let_go_on(stopped)
        raise


def let_go_on(identities: Collection[ProcessIdentity]) -> None:
    """Continue processes that were stopped, as far as they are still there and may be signalled."""
    for identity in identities:
        with contextlib.suppress(PermissionError):
            send_signal(identity, signal.SIGCONT)


def _runs(identity: ProcessIdentity) -> bool:
    """Whether this very process is neither stopped nor dead."""
    process = read_process(identity.pid)
    return (
        process is not None
        and process.started_ticks == identity.started_ticks
        and process.state not in _STANDS_STILL
    )


def wait_while(
    holds: Callable[[ProcessIdentity], bool], identities: list[ProcessIdentity], deadline: float
) -> None:
    """Wait until something holds of none of these processes any more, at most until the deadline."""
    pause_s = _PAUSE_FIRST_S
    waiting = identities
    while waiting := [identity for identity in waiting if holds(identity)]:
        if time.monotonic() >= deadline:
            return
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, _PAUSE_LAST_S)


def describe(name: str, disobedient: Collection[ProcessIdentity], what: str) -> str:
    """One sentence on processes that did not do as they were told, with the state of each."""
    processes = [(identity.pid, read_process(identity.pid)) for identity in disobedient]
    states = ", ".join(f"{pid} (state {process.state if process else 'gone'})" for pid, process in processes)
    hint = "state D means that it waits inside the kernel for a device or a disk"
    return f"{name}: process {states} {what}; {hint}"


def read_process(pid: int) -> Process | None:
    """What the kernel says of the process with this number now (it may be a zombie); None without one."""
    try:
        # open() of pathlib costs three times as much, and this runs for every process of the machine.
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        content = os.read(descriptor, 4096)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    # The command name, in parentheses, may hold spaces and parentheses itself: cut at the last one.
    # fields[0] is field 3 of proc_pid_stat(5).
    fields = content[content.rindex(b")") + 2 :].split()
    state = fields[0].decode("ascii")
    # A main thread that has ended shows as Z while its other threads run on: then the count is above 1.
    threads = int(fields[17])
    return Process(
        pid=pid,
        state=state,
        parent=int(fields[1]),
        session=int(fields[3]),
        started_ticks=int(fields[19]),
        dead=state in {"Z", "X", "x"} and threads <= 1,
        kernel=bool(int(fields[6]) & _KERNEL_THREAD),
    )


def identity_of(process: Process) -> ProcessIdentity:
    """What tells this process apart from a later one with its number."""
    return ProcessIdentity(pid=process.pid, started_ticks=process.started_ticks, boot_id=boot_id())
