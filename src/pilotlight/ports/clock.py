"""Time as an argument: the only way loops and gateway learn what time it is."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Reads of the two clocks we need."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch; may jump when the machine's clock is set."""
        ...

    def monotonic_ns(self) -> int:
        """Nanoseconds that never go back; only differences mean something."""
        ...
