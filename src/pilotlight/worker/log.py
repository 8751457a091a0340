"""The worker's one log: its own events as JSON lines, the engine's lines as they are, all on stdout.

A thread writes, fed through a bounded queue: a reader that stops reading (a frozen or dead platform) must not
stop the event loop. What does not fit is counted and said later.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from typing import Any, BinaryIO, Final

import msgspec

_LINES_MAX: Final = 5_000

_REST_SECONDS: Final = 0.05
"""Pause after what was queued is written. To wake a thread for every line, here and in whoever reads them,
would cost a third of what a short job costs a worker."""


class LogSink:
    """Writes lines to a stream without ever blocking the caller."""

    def __init__(self, stream: BinaryIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout.buffer
        self._lines: queue.Queue[bytes | None] = queue.Queue(_LINES_MAX)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def event(self, name: str, **fields: Any) -> None:
        """One event of the worker program; fields never hold prompts, headers or keys."""
        record = {"ts": round(time.time(), 3), "event": name, **fields}
        self.line(msgspec.json.encode(record, enc_hook=str))

    def line(self, line: bytes) -> None:
        """One line of the engine, without its line end."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self, seconds: float = 2.0) -> None:
        """Writes out what is queued, for at most so long."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=seconds)
        self._thread.join(seconds)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line + b"\n")
                if self._dropped and self._lines.empty():
                    dropped, self._dropped = self._dropped, 0
                    self._stream.write(b'{"event":"log.dropped","lines":%d}\n' % dropped)
                if self._lines.empty():
                    self._stream.flush()
                    time.sleep(_REST_SECONDS)
            except (OSError, ValueError):
                return
