"""Keys with a priority and limits of their own."""

from __future__ import annotations

from pilotlight.stores.sqlite.migrations.script import run_script

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Let a key have a priority, and limits."""
    run_script("0006_key_limits.sql")
