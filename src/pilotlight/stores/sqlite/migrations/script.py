"""Runs the migrations; imported only when a database is not at the newest one.

Alembic and SQLAlchemy together take 20 MB and more of memory, which a gateway that starts on a database
in order does not have to spend.
"""

from __future__ import annotations

import importlib.resources
import sqlite3
from pathlib import Path
from typing import Any

from alembic import op
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.pool import NullPool

from pilotlight.stores.sqlite.sql import statements


def scripts() -> ScriptDirectory:
    """The migration scripts, as Alembic sees them."""
    return ScriptDirectory(str(Path(__file__).parent))


def run_script(name: str) -> None:
    """Run an SQL file of this folder in the transaction of the migration."""
    text = (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")
    for statement in statements(text):
        op.get_bind().exec_driver_sql(statement)


def upgrade(path: Path) -> None:
    """Bring the database to the newest revision, in one transaction: all of it or nothing."""
    directory = scripts()
    engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool)
    event.listen(engine, "connect", _leave_transactions_to_us)
    event.listen(engine, "begin", _begin)

    def steps(revision: Any, _context: Any) -> Any:
        return directory._upgrade_revs("head", revision)  # noqa: SLF001 - what Alembic's own upgrade calls

    try:
        with (
            engine.connect() as connection,
            EnvironmentContext(Config(), directory, fn=steps) as environment,
        ):
            environment.configure(connection=connection, transactional_ddl=True)
            with environment.begin_transaction():
                environment.run_migrations()
    finally:
        engine.dispose()


def _leave_transactions_to_us(connection: sqlite3.Connection, _record: object) -> None:
    # Left to itself, the driver opens no transaction before a statement that changes the schema.
    connection.isolation_level = None


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
