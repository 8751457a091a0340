"""Output of workers: captured, stamped, bounded, kept after their end, read back and followed.

Called by `clusters.local` (capture) and by the management API (`tail`, `follow`). Each worker has
`<id>.log` and, after the first rotation, one older `<id>.log.1`; a line in them is

    2026-06-01T12:05:04.123Z 000000000042 container Worker ready.

How the output gets there: stdout and stderr of a worker are one pipe, and one thread of the gateway reads
all pipes and writes all files. The alternative, workers appending to the file themselves with rotation by
copy and truncate, was rejected: no time per line, lines lost between copy and truncate, and nothing limits
how much is written between two looks at the size. What follows from the pipe:

* *Disk*: at most two files of the rotation size per worker. A worker that writes faster than
  `bytes_per_s` in the long run has lines left out, and a system line says how many.
* *Event loop*: never touched by output; splitting and disk writes happen in the thread, in pieces of at
  most 64 KiB. A follower costs one wake-up of the loop for each piece.
* *A worker is never hung by its pipe*: the thread goes on reading whatever happens, also beyond the
  rate and while the disk is full (those lines are counted and dropped). One that writes too fast is read
  every 20 ms only, which slows it to about 50 MB/s (a full pipe of 1 MiB each time) and keeps the thread
  from taking a processor. Only a stopped gateway stops its workers' output, and then they have no work.
* *The gateway dies*: writing gives the worker EPIPE. It has lost its platform and is ending anyway, and
  the next gateway's sweep ends what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from pilotlight.clusters.capture import PIPE_BYTES, Capture, CaptureThread
from pilotlight.clusters.logfiles import LogFile, LogLine, LogSource, read_newest
from pilotlight.errors import ClusterError, InvalidInputError

__all__ = ["LogLine", "LogSource", "WorkerLogs"]

FOLLOW_LINES_MAX = 5000
"""Lines a follower may be behind before older ones are left out (the contract's largest tail)."""

RATE_BYTES_PER_S = 512 * 1024
"""Lasting output of one worker that is kept; an engine at its most talkative stays far below."""

_ID_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True, eq=False)
class _Follower:
    loop: asyncio.AbstractEventLoop
    changed: asyncio.Event


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class WorkerLogs:
    """The logs of all workers of one installation.

    Args:
        folder: Where the files are; made with mode 0700 if missing.
        log_bytes: Size at which a log is rotated; one older file is kept.
        bytes_per_s: Lasting output of one worker that is kept.
        now_ms: The wall clock.
    """

    def __init__(
        self,
        folder: Path,
        *,
        log_bytes: int,
        bytes_per_s: int = RATE_BYTES_PER_S,
        now_ms: Callable[[], int] = _now_ms,
    ) -> None:
        self._folder = folder
        self._log_bytes = log_bytes
        self._bytes_per_s = bytes_per_s
        self._now_ms = now_ms
        self._captures: dict[str, Capture] = {}
        self._followers: dict[str, set[_Follower]] = {}
        self._lock = threading.Lock()
        self._thread: CaptureThread | None = None

    def open(self, worker_id: str) -> int:
        """Begin to capture a worker.

        Args:
            worker_id: Whose output.

        Returns:
            The descriptor for its stdout and stderr; the caller closes it after the start.

        Raises:
            ClusterError: The log file could not be made.
        """
        path = self._path(worker_id)
        if worker_id in self._captures:
            raise ClusterError(f"worker {worker_id}: its output is captured already")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = LogFile(path, self._log_bytes)
        except OSError as error:
            raise ClusterError(f"log file {path} cannot be written: {error.strerror}") from error
        try:
            read_end, write_end = os.pipe()
        except OSError as error:
            file.close()
            raise ClusterError(f"worker {worker_id}: no pipe for its output: {error.strerror}") from error
        os.set_blocking(read_end, False)
        _enlarge_pipe(read_end)
        capture = Capture(worker_id, read_end, file, self._bytes_per_s)
        self._captures[worker_id] = capture
        thread = self._ensure_thread()
        thread.submit(lambda: thread.watch(capture))
        return write_end

    def note(self, worker_id: str, text: str) -> Future[None]:
        """Add a system line to a log that exists, of a living or an ended worker; returns at once."""
        path = self._path(worker_id)
        return self._ensure_thread().submit(lambda: self._write_note(worker_id, path, text))

    async def finish(self, worker_id: str, text: str = "") -> None:
        """End the capture of a worker whose processes are gone; returns when all its lines are in the file.

        Args:
            worker_id: Whose; without a capture nothing happens.
            text: A last system line; none if empty.
        """
        capture = self._captures.get(worker_id)
        if capture is not None:
            thread = self._ensure_thread()
            await asyncio.wrap_future(thread.submit(lambda: self._finish(thread, capture, text)))

    async def tail(self, worker_id: str, lines: int = 100, *, since_ms: int | None = None) -> list[LogLine]:
        """The newest lines of a worker's log, oldest first; empty without a log.

        Args:
            worker_id: Whose, living or ended.
            lines: At most so many.
            since_ms: Only lines from this moment on; None for no such limit.

        Raises:
            InvalidInputError: That cannot be a worker's id.
        """
        path = self._path(worker_id)
        return await asyncio.to_thread(read_newest, path, lines, 0, since_ms)

    async def follow(self, worker_id: str, after: int | None = None) -> AsyncIterator[LogLine]:
        """The lines of a worker's log as they come; ends after its last line when the worker has ended.

        Args:
            worker_id: Whose, living or ended.
            after: Sequence number of the last line already seen (0 for none); None for new lines only.

        Raises:
            InvalidInputError: That cannot be a worker's id.
        """
        path = self._path(worker_id)
        follower = _Follower(asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._followers.setdefault(worker_id, set()).add(follower)
        try:
            if after is None:
                newest = await self.tail(worker_id, 1)
                after = newest[0].sequence if newest else 0
            while True:
                follower.changed.clear()
                # Looked at before reading: what an ended worker wrote is in the file by then.
                ended = worker_id not in self._captures
                lines = await asyncio.to_thread(read_newest, path, FOLLOW_LINES_MAX, after, None)
                for line in lines:
                    yield line
                    after = line.sequence
                if not lines:
                    if ended:
                        return
                    await follower.changed.wait()
        finally:
            with self._lock:
                followers = self._followers[worker_id]
                followers.discard(follower)
                if not followers:
                    del self._followers[worker_id]

    async def prune(self, older_than_ms: int) -> int:
        """Delete the logs of ended workers that were last written before a moment; returns how many files.

        Args:
            older_than_ms: The moment, in milliseconds since the epoch.
        """
        return await asyncio.to_thread(self._prune, older_than_ms, frozenset(self._captures))

    async def close(self) -> None:
        """Finish all captures and end the thread; idempotent. Reading still works afterwards."""
        for worker_id in list(self._captures):
            await self.finish(worker_id)
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(thread.stop)

    def _path(self, worker_id: str) -> Path:
        if not _ID_PATTERN.fullmatch(worker_id):
            raise InvalidInputError(
                f"worker id {worker_id[:80]!r} is not one: 1 to 64 letters, digits, - and _", field="id"
            )
        return self._folder / f"{worker_id}.log"

    def _prune(self, older_than_ms: int, living: frozenset[str]) -> int:
        count = 0
        for path in [*self._folder.glob("*.log"), *self._folder.glob("*.log.1")]:
            with contextlib.suppress(FileNotFoundError):
                if path.name.split(".")[0] not in living and path.stat().st_mtime * 1000 < older_than_ms:
                    path.unlink()
                    count += 1
        return count

    def _ensure_thread(self) -> CaptureThread:
        if self._thread is None:
            self._thread = CaptureThread(self._now_ms, self._notify)
        return self._thread

    # The rest runs in the capture thread.

    def _finish(self, thread: CaptureThread, capture: Capture, text: str) -> None:
        if self._captures.get(capture.worker_id) is not capture:
            return
        thread.unwatch(capture)
        capture.finish(text, self._now_ms())
        del self._captures[capture.worker_id]
        self._notify(capture.worker_id)

    def _write_note(self, worker_id: str, path: Path, text: str) -> None:
        capture = self._captures.get(worker_id)
        if capture is not None:
            capture.file.append([text.encode()], LogSource.SYSTEM, self._now_ms())
        elif path.exists():
            file = LogFile(path, self._log_bytes)
            file.append([text.encode()], LogSource.SYSTEM, self._now_ms())
            file.close()
        self._notify(worker_id)

    def _notify(self, worker_id: str) -> None:
        with self._lock:
            followers = list(self._followers.get(worker_id, ()))
        for follower in followers:
            # RuntimeError: that loop has been closed; its follower is gone with it.
            with contextlib.suppress(RuntimeError):
                follower.loop.call_soon_threadsafe(follower.changed.set)


def _enlarge_pipe(descriptor: int) -> None:
    # Refused when the user's pipes already take the system's limit; the default size works as well.
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
