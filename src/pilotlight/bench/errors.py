"""What can end a benchmark before it has its figures."""

from __future__ import annotations

from pilotlight.errors import PilotlightError


class BenchError(PilotlightError):
    """A program of the benchmark that did not start, died or answered nonsense; quotes its last words."""
