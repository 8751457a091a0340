"""The named queries of the SQLite store, loaded once."""

from __future__ import annotations

from pilotlight.stores.sql import load_queries, parse_queries, statements

__all__ = ["QUERIES", "parse_queries", "statements"]

assert __package__ is not None
QUERIES = load_queries(__package__)
