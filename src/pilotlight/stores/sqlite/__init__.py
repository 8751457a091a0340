"""The store of one machine: a SQLite database in the data folder, owned by one process.

`store` is the port's face; `threads` holds the one writer with its group commit and the reader;
`folder` guards the data folder; `migrate` brings the schema up to date; the other modules are the
operations, plain functions on a transaction, with their SQL in `queries/*.sql`.
"""

from __future__ import annotations

from pilotlight.stores.sqlite.store import SqliteStore, open_sqlite_store

__all__ = ["SqliteStore", "open_sqlite_store"]
