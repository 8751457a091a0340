"""Which of the gateways on one database leads: the one whose connection holds an advisory lock.

The lock goes with the connection, however that ends: gateway stopped or killed, network cut (TCP keep-alive
finds out), server restarted. The holder asks its connection for a sign of life every few seconds, so that it
notices a dead one about as soon as the server does; a connection that is closed says so at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import structlog

from pilotlight.errors import StoreError
from pilotlight.stores.postgresql.connections import FAILURES, connect, store_error
from pilotlight.stores.postgresql.database import LEAD_LOCK

_log = structlog.get_logger()

_CHECK_S = 2.0
_CHECK_TIMEOUT_S = 5.0


class Lead:
    """The lead of one gateway, held or not.

    Args:
        url: The database.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: Any = None
        self._holding: asyncio.Task[None] | None = None
        self._closed = False

    async def take(self, lost: Callable[[], None]) -> bool:
        """Take the lead if nobody has it. It is held until `close`, or until `lost` is called, once.

        Raises:
            StoreError: The database cannot be asked.
        """
        if self._holding is not None and not self._holding.done():
            return True
        if self._closed:
            raise StoreError("the store is closed")
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(self._url)
        connection = self._connection
        try:
            leads: bool = await connection.fetchval(
                "SELECT pg_try_advisory_lock($1, $2)", *LEAD_LOCK, timeout=_CHECK_TIMEOUT_S
            )
        except FAILURES as error:
            connection.terminate()
            raise store_error(error, "the database cannot be asked for the lead") from error
        if self._closed:
            connection.terminate()
            raise StoreError("the store is closed")
        if leads:
            self._holding = asyncio.create_task(self._hold(connection, lost), name="store-lead")
        return leads

    async def close(self) -> None:
        """Give the lead up; idempotent."""
        self._closed = True
        if self._holding is not None:
            self._holding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._holding
        if self._connection is not None and not self._connection.is_closed():
            # Politely, so that the lock is free when this returns.
            try:
                await self._connection.close(timeout=2)
            except FAILURES:
                self._connection.terminate()

    async def _hold(self, connection: Any, lost: Callable[[], None]) -> None:
        gone = asyncio.Event()
        connection.add_termination_listener(lambda _: gone.set())
        while not connection.is_closed():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(gone.wait(), _CHECK_S)
            if connection.is_closed():
                break
            try:
                await connection.execute("SELECT 1", timeout=_CHECK_TIMEOUT_S)
            except FAILURES as error:
                _log.warning("lead_connection_failed", error=str(error) or type(error).__name__)
                connection.terminate()
        if not self._closed:
            lost()
