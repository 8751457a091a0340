"""Keys with a priority and limits of their own."""

from __future__ import annotations

from pilotlight.stores.postgresql.migrations.script import run_script

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Let a key have a priority, and limits."""
    run_script("0005_key_limits.sql")
