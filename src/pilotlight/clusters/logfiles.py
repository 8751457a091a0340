"""Files that hold the output of workers: the format of a line, appending with rotation, reading back.

Used by `capture` (the only writer) and `logs` (readers). A reader may look at a file while it is written
and rotated: it ignores the unfinished last line, and line numbers tell it what it has seen already.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

_BLOCK_BYTES = 64 * 1024
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


class LogSource(StrEnum):
    """Who wrote a line (serverless-api.md §7.4)."""

    CONTAINER = "container"
    SYSTEM = "system"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of a worker's log.

    Attributes:
        sequence: 1, 2, 3 … within the worker's log; gaps only where lines were lost to rotation.
        ts_ms: When it was read from the worker.
        source: The worker itself, or we about it.
        text: The line without its end, without control characters.
    """

    sequence: int
    ts_ms: int
    source: LogSource
    text: str

    @property
    def timestamp(self) -> str:
        """`ts_ms` by RFC 3339, in UTC with milliseconds."""
        return _format_timestamp(self.ts_ms)

    @property
    def id(self) -> str:
        """The event id of serverless-api.md §7.4: timestamp and sequence."""
        return f"{self.timestamp}/{self.sequence:012d}"


class LogFile:
    """The file of one worker: appends, rotates, numbers. Owned by the capture thread once opened."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = bytes_max
        last = next(_read_backwards(path), None)
        self._sequence = 0 if last is None else last.sequence
        self._descriptor = self._open()
        self._size = os.fstat(self._descriptor).st_size
        self._lost = 0
        if self._size and not _ends_with_newline(path):
            # The last writer was killed within a line.
            self._write(b"\n", 0)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def append(self, lines: list[bytes], source: LogSource, now_ms: int) -> None:
        """Write lines with time and number; what cannot be written is counted and reported later."""
        stamp = _format_timestamp(now_ms)
        parts: list[bytes] = []
        if self._lost:
            parts.append(self._format(f"{self._lost} lines were lost: the log could not be written", stamp))
        for line in lines:
            self._sequence += 1
            parts.append(f"{stamp} {self._sequence:012d} {source} {_clean(line)}\n".encode())
        piece = bytearray()
        count = 0
        for part in parts:
            filled = self._size + len(piece)
            if filled and filled + len(part) > self._bytes_max:
                self._write(bytes(piece), count)
                self._rotate()
                piece, count = bytearray(), 0
            piece += part
            count += 1
        self._write(bytes(piece), count)

    def _format(self, text: str, stamp: str) -> bytes:
        self._sequence += 1
        return f"{stamp} {self._sequence:012d} {LogSource.SYSTEM} {text}\n".encode()

    def _write(self, data: bytes, lines: int) -> None:
        if not data:
            return
        try:
            written = os.write(self._descriptor, data)
        except OSError as error:
            if not self._lost:
                _log.warning("logs.write_failed", path=str(self._path), error=str(error))
            self._lost += lines
            return
        self._size += written
        if written < len(data):
            # The disk filled up in the middle: close the torn line, so that the next one starts clean.
            self._lost += data[written:].count(b"\n")
            with contextlib.suppress(OSError):
                self._size += os.write(self._descriptor, b"\n")
        else:
            self._lost = 0

    def _rotate(self) -> None:
        try:
            self._path.replace(older_path(self._path))
            fresh = self._open()
        except OSError as error:
            # Without a rename the bound still holds: start the file over.
            _log.warning("logs.rotate_failed", path=str(self._path), error=str(error))
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            self._size = 0
            return
        os.close(self._descriptor)
        self._descriptor, self._size = fresh, 0

    def close(self) -> None:
        """Release the file."""
        os.close(self._descriptor)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def older_path(path: Path) -> Path:
    """Where the part of a log goes that was rotated out."""
    return path.with_name(f"{path.name}.1")


def _clean(line: bytes) -> str:
    text = line.decode("utf-8", "replace")
    if text.isprintable():
        return text
    # Logs are shown on terminals: no colours, and nothing that could steer one.
    return _CONTROLS.sub("�", _ESCAPES.sub("", text))


def _format_timestamp(ts_ms: int) -> str:
    moment = datetime.fromtimestamp(ts_ms // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{ts_ms % 1000:03d}Z"


def _parse(raw: bytes) -> LogLine | None:
    """A stored line; None for one that was torn by a full disk or a power failure."""
    try:
        stamp, number, source, text = raw.decode("utf-8", "replace").split(" ", 3)
        moment = datetime.fromisoformat(stamp)
        return LogLine(
            sequence=int(number),
            ts_ms=round(moment.timestamp() * 1000),
            source=LogSource(source),
            text=text,
        )
    except ValueError:
        return None


def _read_backwards(path: Path) -> Iterator[LogLine]:
    """The finished lines of one file, newest first; nothing for a missing file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        position = file.seek(0, os.SEEK_END)
        rest = b""
        first = True
        while position > 0:
            start = max(0, position - _BLOCK_BYTES)
            file.seek(start)
            rest = file.read(position - start) + rest
            position = start
            head, *lines = rest.split(b"\n")
            if first and lines:
                # What stands after the last end is a line that is being written just now.
                lines.pop()
                first = False
            for raw in reversed(lines):
                line = _parse(raw)
                if line is not None:
                    yield line
            rest = head
        if not first and (line := _parse(rest)) is not None:
            yield line


def read_newest(path: Path, count: int, after: int, since_ms: int | None) -> list[LogLine]:
    """The newest `count` lines with a higher number than `after`, oldest first, over both files."""
    newest: list[LogLine] = []
    for each in (path, older_path(path)):
        for line in _read_backwards(each):
            # The files may be rotated between the two reads, which then show the same lines twice.
            if newest and line.sequence >= newest[-1].sequence:
                continue
            if (
                len(newest) >= count
                or line.sequence <= after
                or (since_ms is not None and line.ts_ms < since_ms)
            ):
                return newest[::-1]
            newest.append(line)
    return newest[::-1]
