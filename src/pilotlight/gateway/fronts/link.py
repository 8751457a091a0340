"""The connection between the owner of the slots and a front: messages over a pair of Unix sockets.

What is sent in one turn of the event loop goes out in one frame: the length in four bytes, then a list of
messages in MessagePack. Messages arrive in the order in which they were sent. A link that brings what cannot
be read or obeyed is at its end, as both sides could no longer agree on who has which slot; each puts itself
right when it is lost.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

import msgspec
import structlog

_log = structlog.get_logger()

FRAME_BYTES_MAX = 64 * 1024 * 1024
"""Above what all keys and endpoints of any installation take."""

UNSENT_BYTES_MAX = 4 * FRAME_BYTES_MAX
"""A side that does not read for so long does nothing else either."""

_LENGTH_BYTES = 4


class LinkError(Exception):
    """What came, or is to be sent, may not be."""


def _plain(value: object) -> object:
    """Mappings that msgspec does not know (`MappingProxyType`) as dictionaries."""
    return dict(value)  # type: ignore[call-overload]


encoder = msgspec.msgpack.Encoder(enc_hook=_plain)


class Link(asyncio.Protocol):
    """One end.

    Args:
        decoder: Of lists of the messages that come.
        on_message: Called with each. What it raises ends the link.
        on_lost: Called once, when no message can come any more, whoever ended the link.
    """

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[list[Any]],
        on_message: Callable[[Any], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._decode = decoder.decode
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unread = bytearray()
        self._unsent: list[Any] = []
        self._ending = False
        self._lost = asyncio.Event()

    async def open(self, sock: socket.socket) -> None:
        """Begin to read and to write.

        Args:
            sock: Connected; it is the link's from now on.
        """
        await self._loop.create_unix_connection(lambda: self, sock=sock)

    def send(self, message: Any) -> None:
        """Send a message, or one that is encoded already (`msgspec.Raw`); dropped if it cannot arrive."""
        if self._ending:
            return
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(message)

    async def close(self) -> None:
        """Send what is to be sent, and end; returns when the link is lost."""
        self._flush()
        self._ending = True
        if self._transport is not None:
            self._transport.close()
            await self._lost.wait()

    def abort(self) -> None:
        """End at once; what was not sent yet is dropped."""
        self._ending = True
        self._unsent.clear()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)
        if self._unsent:
            self._flush()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        try:
            if self._unread:
                self._unread += data
                del self._unread[: self._take(self._unread)]
            else:
                taken = self._take(data)
                if taken < len(data):
                    self._unread += data[taken:]
        except Exception:  # noqa: BLE001 - see the module
            _log.exception("link_broken")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's
        """See `asyncio.Protocol`."""
        self._ending = True
        self._unsent.clear()
        self._unread.clear()
        self._lost.set()
        self._on_lost()

    def _take(self, data: bytes | bytearray) -> int:
        """Deal with all frames that are whole; returns how many bytes they were."""
        start, end = 0, len(data)
        while end - start >= _LENGTH_BYTES and not self._ending:
            begin = start + _LENGTH_BYTES
            size = int.from_bytes(data[start:begin], "big")
            if size > FRAME_BYTES_MAX:
                raise LinkError(f"a frame of {size} bytes; legal are {FRAME_BYTES_MAX}")
            if end - begin < size:
                break
            start = begin + size
            with memoryview(data) as view:
                messages = self._decode(view[begin:start])
            for message in messages:
                self._on_message(message)
                if self._ending:
                    break
        return start

    def _flush(self) -> None:
        transport = self._transport
        if transport is None or not self._unsent:
            # Before it is open, all of it waits for that.
            return
        messages, self._unsent = self._unsent, []
        frame = bytearray(_LENGTH_BYTES)
        try:
            encoder.encode_into(messages, frame, _LENGTH_BYTES)
            size = len(frame) - _LENGTH_BYTES
            if size > FRAME_BYTES_MAX:
                raise LinkError(f"a frame of {size} bytes is to be sent; legal are {FRAME_BYTES_MAX}")
            unsent = transport.get_write_buffer_size()
            if unsent > UNSENT_BYTES_MAX:
                raise LinkError(
                    f"{unsent} bytes are not read by the other side; legal are {UNSENT_BYTES_MAX}"
                )
        except Exception:  # noqa: BLE001 - one that is not told has another idea of who has which slot
            _log.exception("link_broken")
            self.abort()
            return
        frame[:_LENGTH_BYTES] = size.to_bytes(_LENGTH_BYTES, "big")
        transport.write(frame)
