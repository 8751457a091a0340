"""The order of service by submission, not by the clock."""

from __future__ import annotations

from pilotlight.stores.sqlite.migrations.script import run_script

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Sort the index of the queue anew."""
    run_script("0003_order.sql")
