"""What stands before every route of the management API: the key, and the size of the body.

A plain ASGI wrapper and not a dependency, because a framework reads and parses a body before it asks its
dependencies, and a stranger's body is not worth reading.
"""

from __future__ import annotations

from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotlight.domain.key import ApiKey
from pilotlight.domain.key import Scope as KeyScope
from pilotlight.management.problems import ProblemResponse, problem

BODY_BYTES_MAX = 1024 * 1024
"""Largest body of a management request; the largest legal environment fits four times."""

OPEN_PATHS = frozenset({"/pilotlight/v1/docs", "/pilotlight/v1/openapi.json"})
"""Readable without a key."""


class KeyReader(Protocol):
    """Looks keys up by their secret."""

    def key(self, secret: str) -> ApiKey | None:
        """The key with this secret; None when unknown."""
        ...


class Guard:
    """Lets admin keys through to the application, and bodies up to a limit.

    Args:
        app: The application.
        keys: Looks keys up.
    """

    def __init__(self, app: ASGIApp, keys: KeyReader) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 403 or 413, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = None if scope["path"] in OPEN_PATHS else self._check_key(scope)
        declared = _header(scope, b"content-length")
        if refused is None and declared.isdigit() and int(declared) > BODY_BYTES_MAX:
            refused = _too_large()
        if refused is not None:
            await refused(scope, receive, send)
            return
        await self._app(_as_json(scope), _limited(receive), send)

    def _check_key(self, scope: Scope) -> ProblemResponse | None:
        value = _header(scope, b"authorization").strip()
        scheme, _, rest = value.partition(b" ")
        if scheme.lower() != b"bearer" or not rest.strip():
            return _refusal(401, "missing bearer token")
        key = self._keys.key(rest.strip().decode("latin-1"))
        if key is None:
            return _refusal(401, "unknown API key")
        if key.scope is not KeyScope.ADMIN:
            return _refusal(403, "access denied: this key may only call endpoints; use an admin key")
        return None


def _as_json(scope: Scope) -> Scope:
    # Every body here is JSON, whatever it is called: `curl -d` calls it a form. Browsers' rule that a foreign
    # page may not send JSON protects nothing here, because such a page has no key.
    headers = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
    return {**scope, "headers": [*headers, (b"content-type", b"application/json")]}


def _limited(receive: Receive) -> Receive:
    total = 0

    async def limited() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > BODY_BYTES_MAX:
                # A body without a declared length looks like one that was cut off, and is answered 400.
                return {"type": "http.disconnect"}
        return message

    return limited


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _refusal(status: int, detail: str) -> ProblemResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return ProblemResponse(problem(status, detail), status_code=status, headers=headers)


def _too_large() -> ProblemResponse:
    detail = f"the body is larger than {BODY_BYTES_MAX} bytes"
    return ProblemResponse(problem(413, detail), status_code=413)
