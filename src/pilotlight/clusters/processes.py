"""Processes of a worker: telling them apart, finding all of them, ending all of them.

Called by `clusters.local`, from a thread wherever a function reads the whole of /proc. A number alone
never identifies a process: every decision to signal compares start time and boot as well, and the signal
goes through a pidfd, so that a process which got a dead one's number is not hit.

What belongs to a worker:
1. its recorded main process, if that still is the same process;
2. every process whose initial environment holds the worker's cookie (`WORKER_COOKIE=<worker id>`), which
   all children inherit, also those that left the session or whose parents are gone;
3. every member of a session led by one of these, and every descendant of one of these, so that a child
   which was started with an empty environment is found too, as long as it either is in such a session or
   its parents live. One that gives up all three (environment, session, parents) is not found.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pilotlight.domain.worker import WORKER_COOKIE, ProcessIdentity
from pilotlight.errors import ClusterError

KILL_TIMEOUT_S = 10.0
"""How long SIGKILL may take before the survivors are reported; a large process needs a second to unmap."""

_KERNEL_THREAD = 0x00200000  # PF_KTHREAD in field 9 of /proc/PID/stat
_LOOKS_MAX = 5
_PAUSE_FIRST_S = 0.001
_PAUSE_LAST_S = 0.05


@dataclass(frozen=True, slots=True)
class _Process:
    """The parts of /proc/PID/stat that are needed here."""

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
    process = _read_process(pid)
    return None if process is None else _identity(process)


def is_alive(identity: ProcessIdentity) -> bool:
    """Whether this very process still runs. Zombies are dead; stopped processes are alive."""
    if identity.boot_id != boot_id():
        return False
    process = _read_process(identity.pid)
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


def find_processes(workers: Mapping[str, ProcessIdentity | None]) -> dict[str, list[ProcessIdentity]]:
    """All living processes of these workers; reads the whole of /proc, so call it from a thread.

    Args:
        workers: Worker ids with the main process recorded for each, if any.

    Returns:
        Worker id → its processes, sorted by number; ids without a living process are absent. The calling
        process is never in it.
    """
    here = {
        each: identity for each, identity in workers.items() if identity and identity.boot_id == boot_id()
    }
    # No process of a worker is older than its main process; without one on record, all are looked at.
    oldest_ticks = 0
    if len(here) == len(workers):
        oldest_ticks = min((identity.started_ticks for identity in here.values()), default=0)
    table, owners = _look(workers.keys(), oldest_ticks)
    for worker_id, identity in here.items():
        main = table.get(identity.pid)
        # A zombie counts here: as long as it is not reaped, its number is that of its session.
        if main is not None and main.started_ticks == identity.started_ticks:
            owners[main.pid] = worker_id
    _add_relatives(table, owners)
    found: dict[str, list[ProcessIdentity]] = {}
    for pid in sorted(owners):
        if not table[pid].dead:
            found.setdefault(owners[pid], []).append(_identity(table[pid]))
    return found


def kill_all(
    workers: Mapping[str, ProcessIdentity | None], *, timeout_s: float = KILL_TIMEOUT_S
) -> dict[str, list[ProcessIdentity]]:
    """End every process of these workers; returns when a look at all processes finds none.

    Blocks, so call it from a thread. Processes that were forked between a look and the signal are found by
    the next look. Stopped processes need no SIGCONT: SIGKILL ends them as they are.

    Args:
        workers: Worker ids with the main process recorded for each, if any.
        timeout_s: Bound on the whole.

    Returns:
        Worker id → the processes that were found running; ids of which nothing ran are absent.

    Raises:
        ClusterError: Some survived until the bound; the message names them.
    """
    deadline = time.monotonic() + timeout_s
    ended: dict[str, list[ProcessIdentity]] = {}
    while found := find_processes(workers):
        targets = [identity for identities in found.values() for identity in identities]
        if time.monotonic() >= deadline:
            raise ClusterError(_describe_survivors(sorted(found), targets, timeout_s))
        for worker_id, identities in found.items():
            known = ended.setdefault(worker_id, [])
            known.extend(identity for identity in identities if identity not in known)
        for identity in targets:
            send_signal(identity, signal.SIGKILL)
        _wait_until_dead(targets, deadline)
    return ended


def _wait_until_dead(identities: list[ProcessIdentity], deadline: float) -> None:
    pause_s = _PAUSE_FIRST_S
    waiting = identities
    while waiting := [identity for identity in waiting if is_alive(identity)]:
        if time.monotonic() >= deadline:
            return
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, _PAUSE_LAST_S)


def _describe_survivors(worker_ids: list[str], survivors: list[ProcessIdentity], timeout_s: float) -> str:
    processes = [(identity.pid, _read_process(identity.pid)) for identity in survivors]
    states = ", ".join(f"{pid} (state {process.state if process else 'gone'})" for pid, process in processes)
    return (
        f"worker {', '.join(worker_ids)}: process {states} still exists {timeout_s:g} s after SIGKILL; "
        "state D means that it waits inside the kernel for a device or a disk"
    )


def _look(worker_ids: Collection[str], oldest_ticks: int) -> tuple[dict[int, _Process], dict[int, str]]:
    """All processes that started at or after `oldest_ticks`, and which of them carry one of the cookies."""
    table: dict[int, _Process] = {}
    owners: dict[int, str] = {}
    unsure: list[int] = []
    seen = {os.getpid()}
    for _ in range(_LOOKS_MAX):
        # A process that forks and ends at once runs ahead of a long list of numbers, so what appeared
        # meanwhile is looked at again; those lists are short.
        fresh = {int(name) for name in os.listdir("/proc") if name.isdigit()} - seen  # noqa: PTH208 - fast
        if not fresh:
            break
        seen |= fresh
        for pid in sorted(fresh):
            process = _read_process(pid)
            if process is None or process.started_ticks < oldest_ticks:
                continue
            table[pid] = process
            if process.dead or process.kernel:
                continue
            cookie = _read_cookie(pid)
            if cookie is None:
                unsure.append(pid)
            elif cookie in worker_ids:
                owners[pid] = cookie
    # In the middle of an exec the environment reads as empty for some microseconds.
    for pid in unsure:
        cookie = _read_cookie(pid)
        if cookie and cookie in worker_ids:
            owners[pid] = cookie
    return table, owners


def _add_relatives(table: Mapping[int, _Process], owners: dict[int, str]) -> None:
    """Extend `owners` by sessions and descendants until nothing is added any more."""
    grew = True
    while grew:
        grew = False
        for process in table.values():
            if process.pid in owners:
                continue
            # Only sessions that a process of the worker *leads*: somebody who types the cookie into a
            # shell's command line must not lose the shell.
            owner = owners.get(process.session) or owners.get(process.parent)
            if owner is not None:
                owners[process.pid] = owner
                grew = True


def _read_cookie(pid: int) -> str | None:
    """The cookie in a process's environment: "" without one or not readable, None if it read as empty."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return ""
    if not environment:
        return None
    marker = f"\0{WORKER_COOKIE}=".encode()
    _, _, rest = (b"\0" + environment).partition(marker)
    return rest.partition(b"\0")[0].decode("utf-8", "replace")


def _read_process(pid: int) -> _Process | None:
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
    return _Process(
        pid=pid,
        state=state,
        parent=int(fields[1]),
        session=int(fields[3]),
        started_ticks=int(fields[19]),
        dead=state in {"Z", "X", "x"} and threads <= 1,
        kernel=bool(int(fields[6]) & _KERNEL_THREAD),
    )


def _identity(process: _Process) -> ProcessIdentity:
    return ProcessIdentity(pid=process.pid, started_ticks=process.started_ticks, boot_id=boot_id())
