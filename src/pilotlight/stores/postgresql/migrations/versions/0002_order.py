"""The order of service by submission, not by the clock."""

from __future__ import annotations

from pilotlight.stores.postgresql.migrations.script import run_script

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Sort the index of the queue anew."""
    run_script("0002_order.sql")
