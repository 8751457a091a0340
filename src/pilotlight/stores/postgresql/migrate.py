"""Brings the schema up to date when the store is opened, however many gateways open it at once."""

from __future__ import annotations

import structlog

from pilotlight.errors import DataFolderError, StoreError
from pilotlight.stores.postgresql.database import Begin, Database, Transaction
from pilotlight.stores.postgresql.migrations import REVISIONS

_log = structlog.get_logger()

VERSION_MIN = 140_000
"""PostgreSQL 14, the oldest that the queries are tested with."""


async def migrate(database: Database, name: str) -> None:
    """Bring a database to the newest revision, in one transaction: all of it or nothing.

    Args:
        database: The database.
        name: Its name for messages, without secrets.

    Raises:
        DataFolderError: It was written by a newer version of ours.
        StoreError: It is too old or not fit for us, or the migration failed; nothing was changed.
    """
    await database.read(lambda transaction: _check(transaction, name))
    if await database.read(lambda transaction: _is_current(transaction, name)):
        return
    await database.write(lambda transaction: _upgrade(transaction, name), begin=Begin.MIGRATION)


async def _check(transaction: Transaction, name: str) -> None:
    row = await transaction.row("server")
    if row["version"] < VERSION_MIN:
        raise StoreError(f"{name}: the server is version {row['version_text']}; 14 or newer is needed")
    if row["encoding"] != "UTF8":
        raise StoreError(
            f"{name}: the database has the encoding {row['encoding']}; make one with"
            " CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        )
    for setting in ("fsync", "synchronous_commit"):
        if row[setting] == "off":
            _log.warning("database_not_durable", database=name, setting=setting, value="off")


async def _is_current(transaction: Transaction, name: str) -> bool:
    revision = await _revision(transaction)
    if revision is not None and revision not in REVISIONS:
        raise DataFolderError(
            f"database {name} was written by a newer version of pilotlight (schema {revision},"
            f" this one knows up to {REVISIONS[-1]}); upgrade pilotlight,"
            " or set store.url to another database"
        )
    return revision == REVISIONS[-1]


async def _revision(transaction: Transaction) -> str | None:
    """The revision Alembic has recorded; None for a new database."""
    if not await transaction.value("has_versions"):
        return None
    revision: str | None = await transaction.value("version")
    return revision


async def _upgrade(transaction: Transaction, name: str) -> None:
    from pilotlight.stores.postgresql.migrations import script  # noqa: PLC0415 - heavy

    # Another gateway may have been faster while this one waited for the lock.
    if not await _is_current(transaction, name):
        await transaction.script(script.render_upgrade(await _revision(transaction)))
