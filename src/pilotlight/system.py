"""The real clock, behind the port that loops and gateway use; the interpreter, and children of a process."""

from __future__ import annotations

import gc
import shutil
import sys
import time


class SystemClock:
    """Implements the port `Clock` with the machine's clocks.

    The wall clock is read once. From then on time advances with the clock that counts since boot, through
    suspends too, so that a wall clock that is set forth or back makes nobody time out, wait or be charged.
    """

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch."""
        return (self._offset_ns + time.clock_gettime_ns(time.CLOCK_BOOTTIME)) // 1_000_000

    def monotonic_ns(self) -> int:
        """Nanoseconds that never go back."""
        return time.monotonic_ns()


def calm_collector() -> None:
    """Keep the garbage collector from walking over everything that lives as long as the process.

    Without this a full collection stops the data path for tens of milliseconds under load.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def share_interpreter() -> None:
    """Let the store's threads have the interpreter soon after they ask for it.

    Every statement of SQLite gives it up and takes it back; with the default of 5 ms per turn, a busy event
    loop makes a group commit wait for several turns. Measured: a quarter more submissions per second.
    """
    sys.setswitchinterval(0.0002)


def death_signal_prefix() -> tuple[str, ...]:
    """A prefix for a command by which the kernel sends it SIGTERM when the thread that started it has ended.

    Empty where the system lacks `setpriv`.
    """
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "TERM", "--") if setpriv else ()
