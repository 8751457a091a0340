"""The queue of the whole native API."""

from __future__ import annotations

from pilotlight.stores.sqlite.migrations.script import run_script

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Extend endpoints and jobs, and add idempotency, batches and webhooks."""
    run_script("0002_queue.sql")
