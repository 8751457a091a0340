"""Endpoints that say how the worker of a request is chosen."""

from __future__ import annotations

from pilotlight.stores.postgresql.migrations.script import run_script

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Let an endpoint choose its routing."""
    run_script("0006_routing.sql")
