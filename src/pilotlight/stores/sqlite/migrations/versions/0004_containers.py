"""Revisions whose workers are containers."""

from __future__ import annotations

from pilotlight.stores.sqlite.migrations.script import run_script

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Let a revision say how its containers run."""
    run_script("0004_containers.sql")
