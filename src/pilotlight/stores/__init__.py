"""Implementations of the store ports: in memory (tests, simulator) and SQLite (one machine).

`bootstrap` chooses one and hands it to gateway and loops, which know only `ports.store`. The suite in
`tests/contract` holds all of them to the same words. Differences in durability, locking and visibility
are written down in docs/decisions/0004-stores.md.
"""

from __future__ import annotations

from pilotlight.stores.memory import MemoryStore
from pilotlight.stores.sqlite import SqliteStore, open_sqlite_store

__all__ = ["MemoryStore", "SqliteStore", "open_sqlite_store"]
