"""The real clock, behind the port that loops and gateway use."""

from __future__ import annotations

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
