"""Several starts of a worker, each with what it took; keys whose streams are told that they wait."""

from __future__ import annotations

from pilotlight.stores.postgresql.migrations.script import run_script

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Let a worker start more than once, and a key ask for heartbeats."""
    run_script("0004_starts.sql")
