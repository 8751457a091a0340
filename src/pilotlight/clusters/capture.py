"""From the pipes of workers into their log files: one thread that reads all pipes.

Used by `logs`, whose description says why it is done so and what is promised.
"""

from __future__ import annotations

import collections
import contextlib
import os
import selectors
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import structlog

from pilotlight.clusters.logfiles import LogFile, LogSource

_log = structlog.get_logger(__name__)

LINE_BYTES_MAX = 8 * 1024
"""A longer line is cut there; long enough for a traceback's line or a JSON log line."""

PIPE_BYTES = 1024 * 1024
"""Size asked for a worker's pipe: what it can write while nobody reads."""

_BURST_SECONDS = 4
_READ_BYTES = 64 * 1024
_DRAIN_BYTES_MAX = 4 * PIPE_BYTES
_PAUSE_S = 0.02
_CUT_MARK = b" [cut]"


class LineSplitter:
    """Cuts a stream of bytes into bounded lines, holding back at most one unfinished line."""

    def __init__(self) -> None:
        self._partial = b""
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes]:
        """The lines completed by `data`, without their ends."""
        *complete, rest = data.split(b"\n")
        lines: list[bytes] = []
        for piece in complete:
            if self._skipping:
                self._skipping = False
                continue
            lines.append(_shorten(self._partial + piece))
            self._partial = b""
        if not self._skipping:
            # Of a progress bar only the last state counts, as on a terminal.
            self._partial = _after_return(self._partial + rest)
            if len(self._partial) > LINE_BYTES_MAX:
                lines.append(_shorten(self._partial))
                self.skip()
        return lines

    def skip(self) -> None:
        """Forget the unfinished line and what is still to come of it."""
        self._partial = b""
        self._skipping = True

    def flush(self) -> list[bytes]:
        """The unfinished line, if any, at the end of the stream."""
        rest, self._partial, self._skipping = self._partial, b"", False
        return [_shorten(rest)] if rest else []


class Capture:
    """The pipe of one worker on its way into the file. Used by the capture thread only."""

    def __init__(self, worker_id: str, descriptor: int, file: LogFile, bytes_per_s: int) -> None:
        self.worker_id = worker_id
        self.descriptor = descriptor
        self.file = file
        self._splitter = LineSplitter()
        self._rate = bytes_per_s
        self._allowance = float(bytes_per_s * _BURST_SECONDS)
        self._refilled = time.monotonic()
        self._over = False
        self._dropped_lines = 0
        self._dropped_bytes = 0

    def read(self, now_ms: int) -> tuple[int, bool]:
        """Take one piece from the pipe.

        Returns:
            Bytes taken (0 at the end of the stream, -1 when the pipe was empty) and whether the worker is
            beyond its rate.
        """
        try:
            data = os.read(self.descriptor, _READ_BYTES)
        except BlockingIOError:
            return -1, False
        except OSError:
            return 0, False
        if data:
            self._take(data, now_ms)
        return len(data), self._over

    def _take(self, data: bytes, now_ms: int) -> None:
        now = time.monotonic()
        limit = float(self._rate * _BURST_SECONDS)
        self._allowance = min(limit, self._allowance + (now - self._refilled) * self._rate)
        self._refilled = now
        # Once over, wait for a second's worth: one note and one run of lines per second, not a patchwork.
        self._over = self._allowance < (self._rate if self._over else len(data))
        if self._over:
            self._dropped_lines += data.count(b"\n")
            self._dropped_bytes += len(data)
            self._splitter.skip()
            if data.endswith(b"\n"):
                self._splitter.flush()
            return
        self._allowance -= len(data)
        self._report_dropped(now_ms)
        lines = self._splitter.feed(data)
        if lines:
            self.file.append(lines, LogSource.CONTAINER, now_ms)

    def _report_dropped(self, now_ms: int) -> None:
        if self._dropped_bytes:
            text = (
                f"{self._dropped_lines} lines ({self._dropped_bytes} bytes) were left out: "
                f"more than {self._rate} bytes per second"
            )
            self._dropped_lines = self._dropped_bytes = 0
            self.file.append([text.encode()], LogSource.SYSTEM, now_ms)

    def finish(self, text: str, now_ms: int) -> None:
        """Take what is left in the pipe, write a last system line, close everything."""
        taken = 0
        # Bounded, because a process that we could not see may still hold the other end.
        while taken < _DRAIN_BYTES_MAX and (count := self.read(now_ms)[0]) > 0:
            taken += count
        self._report_dropped(now_ms)
        lines = self._splitter.flush()
        if lines:
            self.file.append(lines, LogSource.CONTAINER, now_ms)
        if text:
            self.file.append([text.encode()], LogSource.SYSTEM, now_ms)
        os.close(self.descriptor)
        self.file.close()


class CaptureThread:
    """The thread that owns all pipes and log files; others hand it work with `submit`.

    Args:
        now_ms: The wall clock.
        on_lines: Called in the thread with a worker's id when there may be new lines of it.
    """

    def __init__(self, now_ms: Callable[[], int], on_lines: Callable[[str], None]) -> None:
        self._now_ms = now_ms
        self._on_lines = on_lines
        self._actions: collections.deque[tuple[Callable[[], None], Future[None]]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._paused: dict[Capture, float] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pilotlight-logs", daemon=True)
        self._thread.start()

    def submit(self, action: Callable[[], None]) -> Future[None]:
        """Run `action` in the thread, after those submitted earlier; returns at once."""
        future: Future[None] = Future()
        self._actions.append((action, future))
        os.eventfd_write(self._wake, 1)
        return future

    def stop(self) -> None:
        """End the thread after what was submitted; blocks until it has ended."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._selector.close()
        os.close(self._wake)

    def watch(self, capture: Capture) -> None:
        """Begin, or go on, to read a worker's pipe; call it in the thread."""
        self._selector.register(capture.descriptor, selectors.EVENT_READ, capture)

    def unwatch(self, capture: Capture) -> None:
        """Stop reading a worker's pipe; call it in the thread. Idempotent."""
        self._paused.pop(capture, None)
        with contextlib.suppress(KeyError):
            self._selector.unregister(capture.descriptor)

    def _run(self) -> None:
        while self._actions or not self._stopping:
            for key, _ in self._selector.select(_PAUSE_S if self._paused else None):
                if isinstance(key.data, Capture):
                    self._read_safely(key.data)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            self._resume()
            while self._actions:
                action, future = self._actions.popleft()
                # Done also when whoever asked has been cancelled meanwhile.
                awaited = future.set_running_or_notify_cancel()
                try:
                    action()
                except Exception as error:  # noqa: BLE001 - handed to whoever asked
                    if awaited:
                        future.set_exception(error)
                else:
                    if awaited:
                        future.set_result(None)

    def _read_safely(self, capture: Capture) -> None:
        try:
            self._read(capture)
        except Exception:  # noqa: BLE001 - a fault with one log must not stop the reading of all pipes
            _log.exception("logs.capture_failed", worker_id=capture.worker_id)

    def _read(self, capture: Capture) -> None:
        count, over = capture.read(self._now_ms())
        if count == 0:
            self.unwatch(capture)
        elif over:
            # Beyond the rate: empty the pipe, then look away for a moment, which slows the writer.
            emptied = count
            while emptied < PIPE_BYTES and (count := capture.read(self._now_ms())[0]) > 0:
                emptied += count
            self.unwatch(capture)
            self._paused[capture] = time.monotonic() + _PAUSE_S
        self._on_lines(capture.worker_id)

    def _resume(self) -> None:
        now = time.monotonic()
        for capture in [capture for capture, until in self._paused.items() if until <= now]:
            del self._paused[capture]
            self.watch(capture)


def _shorten(line: bytes) -> bytes:
    line = _after_return(line.rstrip(b"\r"))
    return line if len(line) <= LINE_BYTES_MAX else line[:LINE_BYTES_MAX] + _CUT_MARK


def _after_return(line: bytes) -> bytes:
    """What a terminal would show of a line that was overwritten by carriage returns."""
    # One at the very end may be half of a line end.
    end = len(line) - 1 if line.endswith(b"\r") else len(line)
    return line[line.rfind(b"\r", 0, end) + 1 :]
