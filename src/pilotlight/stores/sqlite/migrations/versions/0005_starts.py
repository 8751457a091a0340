"""Several starts of a worker, each with what it took; keys whose streams are told that they wait."""

from __future__ import annotations

from pilotlight.stores.sqlite.migrations.script import run_script

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Let a worker start more than once, and a key ask for heartbeats."""
    run_script("0005_starts.sql")
