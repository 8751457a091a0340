"""The access log: one canonical line of JSON for each request that has ended, whatever became of it.

Lines are made of the rows that the request log gets, and of those of strangers, which it does not. They are
written in batches by a thread. There are no prompts, completions, headers or keys in them: what is not in a
row cannot get into the log.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from pilotlight.core.request_totals import error_class
from pilotlight.domain.usage import Outcome, RequestRecord
from pilotlight.gateway.row_thread import RowThread
from pilotlight.logs import ForgivingStream
from pilotlight.settings import AccessLogSettings

ACCESS_LOG = Path("access", "access.log")
"""Where the file is in the data folder."""

_encode_into = msgspec.json.Encoder().encode_into
_OPENING, _COMMA = ord("{"), ord(",")


@functools.lru_cache(maxsize=64)
def _opening(at_s: int) -> bytes:
    """How lines of this second begin; a row has the millisecond."""
    return f'{{"time":"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%dT%H:%M:%SZ}","event":"request"'.encode()


def lines_of(rows: Sequence[RequestRecord]) -> bytearray:
    """The lines of some requests: time, class of error, and all of each row that says something."""
    lines = bytearray()
    for row in rows:
        lines += _opening(row.arrival_ms // 1000)
        if row.outcome is not Outcome.OK:
            lines += b',"error":"%b"' % (error_class(row) or "").encode()
        at = len(lines)
        _encode_into(row, lines, at)
        assert lines[at] == _OPENING
        lines[at] = _COMMA
        lines += b"\n"
    return lines


class AccessLog:
    """Writes the lines; an `Observer` of the recorder.

    Args:
        settings: Where to, and how much is kept.
        home: The data folder.
    """

    def __init__(self, settings: AccessLogSettings, home: Path) -> None:
        self._file = _RotatedFile(home / ACCESS_LOG, settings) if settings.target == "file" else None
        self._thread = RowThread(self._write, name="access-log")

    @property
    def lines_dropped(self) -> int:
        """Lines that could not be written."""
        return self._thread.rows_dropped

    def note(self, rows: Sequence[RequestRecord]) -> None:
        """Write a line for each row, soon."""
        self._thread.note(rows)

    async def close(self) -> None:
        """Write what is left, within seconds."""
        if await self._thread.close() and self._file is not None:
            self._file.close()

    def _write(self, rows: Sequence[RequestRecord]) -> None:
        lines = lines_of(rows)
        if self._file is None:
            ForgivingStream(sys.stderr).write(lines.decode())
        else:
            self._file.append(lines)


class _RotatedFile:
    """The file, and the older ones beside it; readable by its owner alone. Used by one thread.

    Args:
        path: The file; the older ones have a number more, the higher the older.
        settings: How much is kept.
    """

    def __init__(self, path: Path, settings: AccessLogSettings) -> None:
        self._path = path
        self._bytes_max = settings.file_bytes
        self._older_files = settings.older_files
        self._descriptor = -1
        self._size = 0

    def append(self, lines: bytes | bytearray) -> None:
        """Append whole lines, or none of them. OSError for none; the next ones are tried anew."""
        if self._descriptor < 0:
            self._open()
        if self._size and self._size + len(lines) > self._bytes_max:
            self._rotate()
        try:
            with memoryview(lines) as rest:
                done = 0
                while done < len(lines):
                    done += os.write(self._descriptor, rest[done:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            self.close()
            raise
        self._size += len(lines)

    def close(self) -> None:
        """Release the file; the next lines open it again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        self.close()
        for number in range(self._older_files, 0, -1):
            newer = self._older(number - 1)
            with contextlib.suppress(FileNotFoundError):
                newer.replace(self._older(number))
        self._open()

    def _older(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path
