"""Endpoints that say how the worker of a request is chosen."""

from __future__ import annotations

from pilotlight.stores.sqlite.migrations.script import run_script

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Let an endpoint choose its routing."""
    run_script("0007_routing.sql")
