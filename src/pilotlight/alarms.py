"""A call at a moment, which knows its moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Alarm:
    """A call that will be made.

    The loop's own handle does not always know when: uvloop's has no `when` if that is less than half a
    millisecond away, or past.

    Attributes:
        moment_s: When, on the clock of the loop.
        handle: What the loop gave.
    """

    moment_s: float
    handle: asyncio.Handle

    def cancel(self) -> None:
        """Call nothing; harmless if it has been called."""
        self.handle.cancel()


def alarm_at(moment_s: float, callback: Callable[..., object], *args: object) -> Alarm:
    """Have the running loop call this at a moment of its clock, in its next turn if that is past."""
    return Alarm(moment_s, asyncio.get_running_loop().call_at(moment_s, callback, *args))
