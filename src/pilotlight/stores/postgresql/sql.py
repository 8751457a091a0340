"""The named queries of the PostgreSQL store, loaded once."""

from __future__ import annotations

from pilotlight.stores.sql import load_queries

assert __package__ is not None
QUERIES = load_queries(__package__)
