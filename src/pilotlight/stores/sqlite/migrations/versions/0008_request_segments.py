"""The request log in segments instead of a row per request."""

from __future__ import annotations

from pilotlight.stores.sqlite.migrations.script import run_script

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Put the requests of each endpoint into segments."""
    run_script("0008_request_segments.sql")
