"""Asks workers to freeze and thaw, and servers for their health; implements the port `WorkerDoor`."""

from __future__ import annotations

import asyncio

import msgspec

from pilotlight.domain.worker import Address
from pilotlight.gateway.upstream import UpstreamError, UpstreamPool
from pilotlight.ports.door import DoorError, DoorRefusedError, Kept, Refusal

_HEADERS = ((b"connection", b"close"), (b"user-agent", b"pilotlight-fleet"))
_BODY_MAX = 64 * 1024


class _Kept(msgspec.Struct):
    memory_bytes: int
    slept: bool = False


class _Said(msgspec.Struct):
    reason: str = ""
    message: str = ""


class _Error(msgspec.Struct):
    error: _Said = msgspec.field(default_factory=_Said)


_kept = msgspec.json.Decoder(_Kept)
_errors = msgspec.json.Decoder(_Error)

_REFUSALS = {"busy": Refusal.BUSY, "not_serving": Refusal.BUSY, "unable": Refusal.UNABLE}


class HttpDoor:
    """Implements `WorkerDoor`, each time on a connection of its own: it is asked seldom."""

    async def freeze(self, listener: Address, *, timeout_s: float) -> Kept:
        """See the port."""
        status, body = await ask_once(listener, "POST", "/worker/freeze", timeout_s=timeout_s)
        if status == 200:
            try:
                kept = _kept.decode(body)
            except msgspec.DecodeError as error:
                raise DoorError(f"the worker program's answer to /worker/freeze: {error}") from error
            return Kept(memory_bytes=kept.memory_bytes, slept=kept.slept)
        said = _said(body)
        if status == 409 and said.reason in _REFUSALS:
            raise DoorRefusedError(said.message or said.reason, _REFUSALS[said.reason])
        raise DoorError(f"the worker program answered {status} to /worker/freeze: {said.message}")

    async def thaw(self, listener: Address, *, answers_s: float, timeout_s: float) -> None:
        """See the port."""
        path = f"/worker/thaw?timeout_s={answers_s:g}"
        status, body = await ask_once(listener, "POST", path, timeout_s=timeout_s)
        if status != 200:
            raise DoorError(f"the worker program answered {status} to /worker/thaw: {_said(body).message}")

    async def look(self, server: Address, path: str, *, timeout_s: float) -> None:
        """See the port."""
        status, _ = await ask_once(server, "GET", path, timeout_s=timeout_s)
        if status != 200:
            raise DoorError(f"GET {path} was answered {status}")


async def ask_once(
    address: Address, method: str, path: str, *, timeout_s: float, bytes_max: int = _BODY_MAX
) -> tuple[int, bytes]:
    """Status and body of an answer, on a connection of its own.

    Args:
        address: Where to.
        method: HTTP method.
        path: Path and query.
        timeout_s: Longest time for all of it.
        bytes_max: What is read of the body at least, if there is so much; the rest is not waited for.

    Raises:
        DoorError: There is none, or not in time.
    """
    pool = UpstreamPool(idle_s=1)
    try:
        async with asyncio.timeout(timeout_s):
            response = await pool.request(address, method, path, _HEADERS, b"", timeout_s=timeout_s)
            try:
                body = b""
                while (piece := await response.read(timeout_s)) is not None and len(body) < bytes_max:
                    body += piece
                return response.status, body
            finally:
                response.close()
    except TimeoutError as error:
        raise DoorError(f"no answer to {path} within {timeout_s:g} s") from error
    except UpstreamError as error:
        raise DoorError(f"{path}: {error}") from error


def _said(body: bytes) -> _Said:
    """What an answer that is no success tells; whatever it is, it must not hide that."""
    try:
        return _errors.decode(body).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _Said(message=body[:200].decode("utf-8", "replace"))
