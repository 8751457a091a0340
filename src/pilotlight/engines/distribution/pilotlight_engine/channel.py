"""One end of a connection between worker program and launcher: lines of JSON, and a descriptor beside one."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

MESSAGE_BYTES_MAX = 1 << 20
SEND_SECONDS = 5.0

_CREDENTIALS = struct.Struct("iii")
_DESCRIPTORS_MAX = 8


class ChannelError(Exception):
    """The other side does not keep to the protocol; the message can be told to it."""


class Channel:
    """Reads and writes whole messages; holds what has arrived of the next one.

    Args:
        connection: A connected Unix socket.

    Attributes:
        descriptors: What has arrived; whoever takes one out closes it, `close` closes the rest.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pending = bytearray()
        self.descriptors: list[int] = []

    def fileno(self) -> int:
        """The socket's descriptor, for a selector."""
        return self._connection.fileno()

    def peer_uid(self) -> int:
        """The user who runs the other side, as the kernel noted when it connected."""
        data = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(data)[1])

    def send(self, message: Mapping[str, Any]) -> None:
        """Writes one message; raises OSError if the other side is gone or does not read."""
        self._connection.settimeout(SEND_SECONDS)
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Any:
        """What is there now: a message, or None if it is not complete yet.

        Raises:
            EOFError: The other side has closed the connection.
            ChannelError: What came is no message.
            OSError: The connection is broken.
        """
        size = socket.CMSG_SPACE(_DESCRIPTORS_MAX * array.array("i").itemsize)
        self._connection.settimeout(None)
        try:
            data, extra, _, _ = self._connection.recvmsg(
                65536, size, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        for level, kind, content in extra:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self.descriptors.extend(numbers)
        if not data:
            raise EOFError
        self._pending += data
        line, end, rest = self._pending.partition(b"\n")
        if len(line) + 1 > MESSAGE_BYTES_MAX:
            raise ChannelError(f"the message is longer than {MESSAGE_BYTES_MAX} bytes")
        if not end:
            return None
        self._pending = rest
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ChannelError(f"the message is no JSON: {error}") from error

    def close(self) -> None:
        """Closes the connection and the descriptors that nobody took."""
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.descriptors.clear()
        self._connection.close()
