"""Renders the migrations as SQL; imported only when a database is not at the newest one.

Alembic would run them through SQLAlchemy, which reaches asyncpg only with greenlet. Its offline mode writes
the same statements down instead, those of its version table included, and the caller runs them: so the
database is one that Alembic's own tools recognise.
"""

from __future__ import annotations

import importlib.resources
import io
from pathlib import Path
from typing import Any

from alembic import op
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory

from pilotlight.stores.sql import statements


def scripts() -> ScriptDirectory:
    """The migration scripts, as Alembic sees them."""
    return ScriptDirectory(str(Path(__file__).parent))


def run_script(name: str) -> None:
    """Put the statements of an SQL file of this folder into the migration, as they are."""
    text = (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")
    for statement in statements(text):
        op.get_context().impl.static_output(statement + "\n")


def render_upgrade(revision: str | None) -> str:
    """The statements that bring a database to the newest revision, for one transaction.

    Args:
        revision: Where it stands; None for a new database.
    """
    directory = scripts()
    output = io.StringIO()

    def steps(_revision: Any, _context: Any) -> Any:
        return directory._upgrade_revs("head", revision)  # type: ignore[arg-type]  # noqa: SLF001 - what Alembic's own upgrade calls

    with EnvironmentContext(Config(), directory, fn=steps, as_sql=True, starting_rev=revision) as environment:
        environment.configure(dialect_name="postgresql", output_buffer=output)
        environment.run_migrations()
    return output.getvalue()
