"""Revisions whose workers are containers."""

from __future__ import annotations

from pilotlight.stores.postgresql.migrations.script import run_script

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Let a revision say how its containers run."""
    run_script("0003_containers.sql")
