"""The first schema."""

from __future__ import annotations

from pilotlight.stores.postgresql.migrations.script import run_script

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create all tables."""
    run_script("0001_initial.sql")
