"""The folder in which local workers have their sockets, and its removal, also after a crash.

A worker that is killed cannot remove its own sockets, so the gateway owns their folder: one for each life of
it, below the system's folder for temporary files (a data folder may lie where sockets cannot, and its path
may be too long for one), private to the user. The data folder remembers its path. `bootstrap` makes one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from pilotlight.errors import SettingsError

SOCKET_PATH_BYTES_MAX = 107
"""Longest path of a Unix socket on Linux."""

_LONGEST_WITHIN = "/12345678901234/engine.sock"
_POINTER = "run"
_PREFIX = "pilotlight-"


class RunFolder:
    """Gives each worker a path for a folder of its own.

    Args:
        home: The data folder.
    """

    def __init__(self, home: Path) -> None:
        self._pointer = home / _POINTER
        self._folder: Path | None = None

    def open(self) -> None:
        """Remove what an earlier life left and make a fresh folder; call it when none of its workers lives.

        Raises:
            SettingsError: There is no folder for temporary files that can be used.
        """
        with contextlib.suppress(OSError, ValueError):
            _remove(Path(self._pointer.read_text(encoding="utf-8")))
        advice = "set TMPDIR to a folder with a short path that this user can write"
        try:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._folder = folder
            self._pointer.write_text(str(folder), encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"no folder for the workers' sockets: {error}; {advice}") from error
        longest = len(os.fsencode(folder)) + len(_LONGEST_WITHIN)
        if longest > SOCKET_PATH_BYTES_MAX:
            raise SettingsError(
                f"sockets in {folder} would have paths of {longest} bytes, at most {SOCKET_PATH_BYTES_MAX}"
                f" are possible; {advice}"
            )

    def path(self, worker_id: str) -> Path:
        """Where a worker may make its folder."""
        assert self._folder is not None
        return self._folder / worker_id

    def launcher(self, fingerprint: str) -> Path:
        """Where the launcher of a fingerprint listens."""
        assert self._folder is not None
        return self._folder / f"launcher-{fingerprint}"

    def remove(self, worker_id: str) -> None:
        """Remove what a worker that has ended left behind."""
        if self._folder is not None:
            shutil.rmtree(self._folder / worker_id, ignore_errors=True)

    def close(self) -> None:
        """Remove everything; idempotent."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._pointer.unlink(missing_ok=True)
            self._folder = None


def _remove(folder: Path) -> None:
    """Remove a folder of ours: the pointer may be old, and its name may belong to somebody else by now."""
    found = folder.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if ours and folder.is_absolute() and folder.name.startswith(_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
