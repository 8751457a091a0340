"""What stands before every route of the management API: the key, and the size and duration of the body.

A plain ASGI wrapper and not a dependency, because a framework reads and parses a body before it asks its
dependencies, and a stranger's body is not worth reading.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotlight.domain.key import ApiKey
from pilotlight.domain.key import Scope as KeyScope
from pilotlight.management.problems import ProblemResponse, problem

BODY_BYTES_MAX = 1024 * 1024
"""Largest body of a management request; the largest legal environment fits four times."""

_TOO_LARGE = f"the body is larger than {BODY_BYTES_MAX} bytes"

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
        app: The application; turns Starlette's `HTTPException` into an answer.
        keys: Looks keys up.
        body_s: How long a body may take.
    """

    def __init__(self, app: ASGIApp, keys: KeyReader, *, body_s: float) -> None:
        self._app = app
        self._keys = keys
        self._body_s = body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, 403, 408 or 413, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = None if scope["path"] in OPEN_PATHS else self._check_key(scope)
        declared = _header(scope, b"content-length")
        if refused is None and declared.isdigit() and int(declared) > BODY_BYTES_MAX:
            refused = _refusal(413, _TOO_LARGE)
        if refused is not None:
            await refused(scope, receive, send)
            return
        await self._app(_as_json(scope), _limited(receive, self._body_s), send)

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


def _limited(receive: Receive, body_s: float) -> Receive:
    """The events of a request; 413 and 408 are raised where the application waits for its body."""
    total, complete = 0, False
    deadline: float | None = None

    async def limited() -> Message:
        nonlocal total, complete, deadline
        if complete:
            return await receive()
        deadline = deadline or asyncio.get_running_loop().time() + body_s
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not arrive within {body_s:g} s") from error
        total += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if total > BODY_BYTES_MAX:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return limited


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _refusal(status: int, detail: str) -> ProblemResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return ProblemResponse(problem(status, detail), status_code=status, headers=headers)
