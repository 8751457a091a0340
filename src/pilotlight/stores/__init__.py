"""Implementations of the store ports: in memory (tests, simulator), SQLite, PostgreSQL (several gateways).

`bootstrap` chooses one and hands it to gateway and loops, which know only `ports.store`. The suite in
`tests/contract` holds all of them to the same words. Differences in durability, locking and visibility
are written down in docs/decisions/0004-stores.md and 0005-postgresql.md.
"""

from __future__ import annotations

from pathlib import Path

from pilotlight.ports.store import Store
from pilotlight.stores.memory import MemoryStore
from pilotlight.stores.sqlite import SqliteStore, open_sqlite_store

__all__ = ["MemoryStore", "SqliteStore", "open_postgresql_store", "open_sqlite_store", "open_store"]


async def open_store(folder: Path, *, url: str, synchronous: str) -> Store:
    """The store that the settings choose: a PostgreSQL database, or SQLite in the data folder.

    Raises:
        SettingsError: The url is none.
        DataFolderError: The data folder is in use or not writable, or the database of a newer version.
        StoreError: The database server cannot be reached or is not fit.
    """
    if not url:
        return await open_sqlite_store(folder, synchronous=synchronous)
    return await open_postgresql_store(url, folder=folder)


async def open_postgresql_store(url: str, *, folder: Path | None = None) -> Store:
    """The store in a PostgreSQL database, see `postgresql.open_postgresql_store`.

    Its driver is loaded with the first call: most gateways never need it.

    Args:
        url: The database.
        folder: The data folder of the gateway, which still belongs to one process at a time.
    """
    from pilotlight.stores import postgresql  # noqa: PLC0415 - see above

    return await postgresql.open_postgresql_store(url, folder=folder)
