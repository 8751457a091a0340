"""Says which parameters had no effect, each name once in a worker's life (`vllm-worker.md` §8 A14)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pilotlight.worker.log import LogSink
from pilotlight.worker.parameters import Ignored

_NAMES_MAX: Final = 500
"""Callers choose the names, so there is an end to what is remembered and said. Arbitrary."""


class Notices:
    """Remembers what was said.

    Args:
        log: Where it is said.
    """

    def __init__(self, log: LogSink) -> None:
        self._log = log
        self._said: set[str] = set()

    def say(self, ignored: Iterable[Ignored]) -> None:
        """Logs those that were not said before."""
        for one in ignored:
            if one.name not in self._said and len(self._said) < _NAMES_MAX:
                self._said.add(one.name)
                self._log.event("job.parameter_ignored", parameter=one.name, reason=one.explain())
