"""What gateways on one database tell each other, by LISTEN and NOTIFY.

One channel, ids only. What changed while the last message was being sent goes into the next, so a busy
gateway sends few long messages and not many short ones; they go over a connection of their own, outside the
transactions they speak of, because PostgreSQL puts the commits of all transactions that notify into one line.
News are hints: what gets lost with a connection is made up for by `resync`, which the listener gets after
every reconnect and every few seconds besides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

import msgspec
import structlog

from pilotlight.errors import StoreError
from pilotlight.ports.store import StoreListener
from pilotlight.stores.postgresql.connections import FAILURES, connect

_log = structlog.get_logger()

_CHANNEL = "pilotlight"

RESYNC_S = 5.0
"""Between two looks at everything, for news that got lost."""

_PROBE_S = 10.0
"""After this long without a message the connection is asked for a sign of life."""

_SEND_TIMEOUT_S = 5.0

_PAYLOAD_MAX = 7_000
"""Bytes; PostgreSQL refuses 8,000 and more."""

_GATHERED_MAX = 5_000
"""Ids gathered while a message is under way; with more, others are told to look at everything."""

_RECONNECT_S = 0.25
_RECONNECT_MAX_S = 2.0


class _Message(msgspec.Struct, omit_defaults=True):
    """One notification."""

    jobs: list[str] = []
    queues: list[str] = []
    configuration: bool = False
    resync: bool = False


_decoder = msgspec.json.Decoder(_Message)


class News:
    """Tells others what this gateway changed, and a listener what the others did.

    Args:
        url: The database.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._listener: StoreListener | None = None
        self._jobs: dict[str, None] = {}
        self._queues: dict[str, None] = {}
        self._configuration = False
        self._resync = False
        self._wake = asyncio.Event()
        self._closing = False
        self._task = asyncio.create_task(self._run(), name="store-news")
        self._resyncing = asyncio.create_task(self._resync_often(), name="store-resync")

    def listen(self, listener: StoreListener) -> None:
        """Tell a listener from now on."""
        assert self._listener is None
        self._listener = listener

    def jobs_changed(self, job_ids: Iterable[str]) -> None:
        """Jobs changed here."""
        self._jobs.update(dict.fromkeys(job_ids))
        self._gathered()

    def queue_grew(self, endpoint_id: str) -> None:
        """A job was queued here."""
        self._queues[endpoint_id] = None
        self._gathered()

    def configuration_changed(self) -> None:
        """Endpoints or keys changed here."""
        self._configuration = True
        self._gathered()

    def _gathered(self) -> None:
        if len(self._jobs) + len(self._queues) > _GATHERED_MAX:
            self._jobs.clear()
            self._queues.clear()
            self._resync = True
        self._wake.set()

    async def close(self) -> None:
        """Send what was gathered, if it can be sent, and end; idempotent."""
        self._closing = True
        self._wake.set()
        self._resyncing.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await asyncio.shield(self._task)
        if not self._task.done():
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        pause_s = _RECONNECT_S
        while not self._closing:
            try:
                connection = await connect(self._url)
            except StoreError as error:
                _log.warning("store_news_interrupted", error=str(error))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._until_closing(), pause_s)
                pause_s = min(2 * pause_s, _RECONNECT_MAX_S)
                continue
            pause_s = _RECONNECT_S
            try:
                await self._serve(connection)
            except FAILURES as error:
                _log.warning("store_news_interrupted", error=str(error) or type(error).__name__)
            finally:
                connection.terminate()

    async def _until_closing(self) -> None:
        while not self._closing:
            self._wake.clear()
            await self._wake.wait()

    async def _serve(self, connection: Any) -> None:
        """Send and receive until the connection is lost or the store is closed."""
        connection.add_termination_listener(lambda _: self._wake.set())
        await connection.add_listener(_CHANNEL, self._received)
        # What others did before this connection listened is unknown, and what we told while there was none
        # may not have arrived.
        self._tell_resync()
        while not connection.is_closed():
            await self._send(connection)
            if self._closing and not self._anything():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PROBE_S):
                    await self._wake.wait()
                    continue
            # Only a connection that is used tells that it is dead.
            await connection.execute("SELECT 1", timeout=_SEND_TIMEOUT_S)

    async def _resync_often(self) -> None:
        """Look at everything now and then, whatever the connection does."""
        while True:
            await asyncio.sleep(RESYNC_S)
            try:
                self._tell_resync()
            except Exception:  # noqa: BLE001 - nobody else would ever look again
                _log.exception("resync_failed")

    def _anything(self) -> bool:
        return bool(self._jobs or self._queues or self._configuration or self._resync)

    async def _send(self, connection: Any) -> None:
        self._wake.clear()
        while self._anything():
            messages = [
                *(_Message(jobs=part) for part in _parts(self._jobs)),
                *(_Message(queues=part) for part in _parts(self._queues)),
            ]
            if self._configuration or self._resync:
                messages.append(_Message(configuration=self._configuration, resync=self._resync))
            self._jobs, self._queues = {}, {}
            self._configuration = self._resync = False
            try:
                for message in messages:
                    payload = msgspec.json.encode(message).decode()
                    await connection.execute(
                        "SELECT pg_notify($1, $2)", _CHANNEL, payload, timeout=_SEND_TIMEOUT_S
                    )
            except BaseException:
                self._resync = True
                raise

    def _received(self, connection: Any, pid: int, _channel: str, payload: str) -> None:
        if pid == connection.get_server_pid() or self._listener is None or self._closing:
            return
        try:
            message = _decoder.decode(payload)
        except msgspec.DecodeError:
            # Of a version that says more than we understand.
            message = _Message(resync=True)
        if message.configuration:
            self._listener.configuration_changed()
        if message.queues:
            self._listener.queues_grew(message.queues)
        if message.jobs:
            self._listener.jobs_changed(message.jobs)
        if message.resync:
            self._listener.resync()

    def _tell_resync(self) -> None:
        if self._listener is not None and not self._closing:
            self._listener.resync()


def _parts(ids: Iterable[str]) -> Iterable[list[str]]:
    """Ids in lists that fit into a message each; one too long for any message is left to the resync."""
    part: list[str] = []
    size = 0
    for each in ids:
        length = len(msgspec.json.encode(each)) + 1
        if length > _PAYLOAD_MAX:
            continue
        if size + length > _PAYLOAD_MAX:
            yield part
            part, size = [], 0
        part.append(each)
        size += length
    if part:
        yield part
