"""The data folder: made, guarded against other users, and owned by one process at a time."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from pilotlight.errors import DataFolderError

LOCK_FILE = "lock"
DATABASE_FILE = "pilotlight.db"


class FolderLock:
    """The right to use a data folder, held from `acquire` to `release`.

    The kernel's lock on the open file is what counts and ends with the process, however it ends; the
    file stays and its contents (our pid) only help the message for whoever comes second.

    Args:
        folder: The data folder; made by `acquire` when missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Make the folder if needed, restrict it to us, and lock it.

        Raises:
            DataFolderError: It cannot be written, or another process holds it.
        """
        assert self._descriptor is None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _restrict(self.folder)
            descriptor = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _not_writable(self.folder, error) from error
        try:
            self._lock(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise DataFolderError(
                f"data folder {self.folder} is in use by another pilotlight (pid {holder});"
                " stop that one, or set PILOTLIGHT_HOME to another folder"
            ) from error
        except OSError as error:
            raise _not_writable(self.folder, error) from error
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise _not_writable(self.folder, error) from error

    def release(self) -> None:
        """Give the folder up; idempotent."""
        if self._descriptor is not None:
            # Closing is not enough: a child between fork and exec has a copy that would keep the lock.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


def create_database_file(folder: Path) -> Path:
    """The path of the database file, which exists afterwards and only we may read.

    SQLite gives its write-ahead log and shared-memory file the mode of the database file.

    Raises:
        DataFolderError: It cannot be made or written.
    """
    path = folder / DATABASE_FILE
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        _restrict(path)
    except OSError as error:
        raise _not_writable(folder, error) from error
    return path


def _restrict(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        path.chmod(mode & ~0o077)


def _not_writable(folder: Path, error: OSError) -> DataFolderError:
    return DataFolderError(
        f"data folder {folder} is not writable: {error.strerror or error};"
        " give this user the right to write there, or set PILOTLIGHT_HOME to another folder"
    )
