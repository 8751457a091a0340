"""What workers wrote to their logs, as the management API reads it; one implementation per cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol


class LogLine(Protocol):
    """One line of a worker's log."""

    @property
    def sequence(self) -> int:
        """Position in the worker's log, counting up from 1."""
        ...

    @property
    def ts_ms(self) -> int:
        """When it was read from the worker, in milliseconds since the epoch."""
        ...

    @property
    def source(self) -> str:
        """`container`: output of the worker; `system`: the platform's notes (serverless-api.md §7.4)."""
        ...

    @property
    def text(self) -> str:
        """The line without its end and without control characters."""
        ...

    @property
    def timestamp(self) -> str:
        """`ts_ms` by RFC 3339, in UTC."""
        ...

    @property
    def id(self) -> str:
        """Timestamp and sequence: the event id of serverless-api.md §7.4."""
        ...


class WorkerLogs(Protocol):
    """Logs of living workers, and of ended ones for as long as they are remembered.

    Both methods raise InvalidInputError for a text that cannot be a worker's id.
    """

    async def tail(
        self, worker_id: str, lines: int = 100, *, since_ms: int | None = None
    ) -> Sequence[LogLine]:
        """The newest lines, oldest first; empty without a log.

        Args:
            worker_id: Whose, living or ended.
            lines: At most so many.
            since_ms: Only lines from this moment on; None for no such limit.
        """
        ...

    def follow(self, worker_id: str, after: int | None = None) -> AsyncIterator[LogLine]:
        """The lines as they come; ends after the last line once the worker has ended.

        Args:
            worker_id: Whose, living or ended.
            after: Sequence number of the last line already seen (0 for none); None for new lines only.
        """
        ...
