"""Thin asynchronous shells: read a snapshot, ask `core`, apply, record."""
