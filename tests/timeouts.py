"""A test that hangs ends after its time, on whichever loop it hangs, and says where.

pytest-timeout raises in a signal handler, which asyncio's loop passes on. uvloop takes what is raised there for the
error of a callback and goes on, so a test would hang forever. Nothing of this is asked of a test that ends in time.
"""

from __future__ import annotations

import asyncio
import sys

import pytest
import uvloop

GRACE_S = 20
"""How long after its time a test may still run before its whole process is ended."""


class UvLoop(uvloop.Loop):
    """uvloop's, which a test's time ends too, after it printed where every task waits."""

    def call_exception_handler(self, context: dict) -> None:
        if not isinstance(context.get("exception"), pytest.fail.Exception):
            super().call_exception_handler(context)
            return
        for task in asyncio.all_tasks(self):
            task.print_stack(file=sys.stderr)
        self.stop()
