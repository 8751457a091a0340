"""Opens the database: brings its schema up to date and sets how its connections behave."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from urllib.parse import quote

from pilotlight.errors import DataFolderError
from pilotlight.stores.sqlite.migrations import REVISIONS

SQLITE_MIN = (3, 38, 0)
"""STRICT tables came a little earlier; from this version on functions of JSON are always there."""

SYNCHRONOUS = ("FULL", "NORMAL", "EXTRA")
"""FULL: what was acknowledged survives power failure. NORMAL: it may not, at 1.4 times the speed."""

_BUSY_TIMEOUT_MS = 5_000
_JOURNAL_BYTES_MAX = 64 * 1024 * 1024
_CHECKPOINT_PAGES = 4_000
"""Length of the log at which it is folded into the database, by whose commit comes next; that one takes some
10 ms more. Four times SQLite's default, so that at 200 submits/s fewer than one in a hundred is concerned."""

_WRITER_CACHE_KIB = 16 * 1024
_READER_CACHE_KIB = 8 * 1024


def connect_writer(path: Path, *, synchronous: str) -> sqlite3.Connection:
    """The writing connection to a database whose schema is up to date.

    Raises:
        DataFolderError: The file is no database, cannot be used, or comes from a newer version.
    """
    if sqlite3.sqlite_version_info < SQLITE_MIN:
        legal = ".".join(map(str, SQLITE_MIN))
        raise DataFolderError(f"this Python has SQLite {sqlite3.sqlite_version}; {legal} or newer is needed")
    try:
        connection = _open(path, mode="rw")
        try:
            _set(connection, "journal_mode", "WAL")
            _set(connection, "synchronous", synchronous)
            _set(connection, "foreign_keys", "ON")
            _set(connection, "journal_size_limit", _JOURNAL_BYTES_MAX)
            _set(connection, "wal_autocheckpoint", _CHECKPOINT_PAGES)
            _set(connection, "temp_store", "MEMORY")
            _set(connection, "cache_size", -_WRITER_CACHE_KIB)
            _migrate(connection, path)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise DataFolderError(f"database {path} cannot be opened: {error}") from error
    return connection


def connect_reader(path: Path) -> sqlite3.Connection:
    """A connection that cannot write; needs the writer's to be open."""
    connection = _open(path, mode="ro")
    _set(connection, "cache_size", -_READER_CACHE_KIB)
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    revision = _revision(connection)
    if revision == REVISIONS[-1]:
        return
    if revision is not None and revision not in REVISIONS:
        raise DataFolderError(
            f"database {path} was written by a newer version of pilotlight (schema {revision},"
            f" this one knows up to {REVISIONS[-1]}); upgrade pilotlight,"
            " or set PILOTLIGHT_HOME to another folder"
        )
    from pilotlight.stores.sqlite.migrations.script import upgrade  # noqa: PLC0415 - heavy, see there

    upgrade(path)


def _revision(connection: sqlite3.Connection) -> str | None:
    """The revision Alembic has recorded; None for a new database."""
    tables = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchall()
    if not tables:
        return None
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def _open(path: Path, *, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode={mode}",
        uri=True,
        isolation_level=None,
        timeout=_BUSY_TIMEOUT_MS / 1000,
        cached_statements=256,
    )


def _set(connection: sqlite3.Connection, pragma: str, value: str | int) -> None:
    connection.execute(f"PRAGMA {pragma} = {value}")
