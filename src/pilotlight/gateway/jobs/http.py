"""HTTP plumbing of the job road: routes found by path segments, bodies with a limit, one error border.

Segments instead of patterns, because clients send doubled and trailing slashes (serverless-api.md §2.1)
and because REST v2 shares the prefix `/v2/`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

import structlog
from starlette.datastructures import URLPath
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, NoMatchFound

from pilotlight.domain.endpoint import RESERVED_ENDPOINT_IDS
from pilotlight.errors import PilotlightError
from pilotlight.gateway.asgi import ClientGoneError, Receive, Scope, Send
from pilotlight.gateway.errors import native_error, native_error_of

_log = structlog.get_logger()

_DISCARDED_MAX = 64 * 1024 * 1024
"""Bytes of an oversize body that are read and thrown away, so that the client reads our answer instead of
meeting a closed connection."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request below `/v2/{endpoint_id}/…`.

    Attributes:
        scope: The connection (ASGI).
        receive: Its incoming events.
        endpoint_id: From the path.
        ids: Path segments after the verb.
        headers: By lower-case name; of repeated ones the last counts.
    """

    scope: Scope
    receive: Receive
    endpoint_id: str
    ids: tuple[str, ...]
    headers: Mapping[bytes, bytes]

    @property
    def query(self) -> Mapping[str, str]:
        """Query parameters; of repeated ones the last counts."""
        return dict(parse_qsl(self.scope["query_string"].decode("latin-1"), keep_blank_values=True))

    @property
    def peer(self) -> tuple[str, int] | None:
        """The client's end of the connection; None on a Unix socket, where it says nothing."""
        client = self.scope.get("client")
        return (client[0], client[1]) if client and client[1] else None

    async def body(self, *, limit: int) -> tuple[bytes | None, int]:
        """The body and its size; None for the body when it is over the limit.

        Raises:
            ClientGoneError: The client went away before the end.
        """
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            else:
                chunks.clear()
            if not message.get("more_body", False):
                return (b"".join(chunks) if size <= limit else None), size
            if size > limit + _DISCARDED_MAX:
                return None, size


Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Operation:
    """What a verb of the path does.

    Attributes:
        methods: HTTP methods it answers.
        handler: Serves it; may raise errors of our tree.
    """

    methods: frozenset[str]
    handler: Handler


class SegmentRoute(BaseRoute):
    """Routes of the form `/{prefix}/{endpoint_id}/{verb}[/{id}…]`, found in a table.

    Args:
        operations: By verb and number of ids after it.
        prefix: Segments before the endpoint's id.
        verbless: Whether there is no verb between the endpoint's id and the ids; its key is then "".
    """

    def __init__(
        self,
        operations: Mapping[tuple[str, int], Operation],
        *,
        prefix: tuple[str, ...] = ("v2",),
        verbless: bool = False,
    ) -> None:
        self._operations = operations
        self._prefix = prefix
        self._verbless = verbless

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """FULL for a path of the table, whatever the method: a wrong one is answered 405."""
        if scope["type"] != "http":
            return Match.NONE, {}
        segments = [segment for segment in scope["path"].split("/") if segment]
        start = len(self._prefix)
        if tuple(segments[:start]) != self._prefix or len(segments) < start + 2:
            return Match.NONE, {}
        endpoint_id, rest = segments[start], segments[start + 1 :]
        verb, ids = ("", rest) if self._verbless else (rest[0], rest[1:])
        operation = self._operations.get((verb, len(ids)))
        if operation is None or endpoint_id in RESERVED_ENDPOINT_IDS:
            return Match.NONE, {}
        return Match.FULL, {
            "path_params": {"endpoint_id": endpoint_id},
            "pilotlight.operation": (operation, endpoint_id, tuple(ids)),
        }

    def url_path_for(self, name: str, /, **path_params: object) -> URLPath:
        """Refused: nothing builds these paths by name."""
        raise NoMatchFound(name, dict(path_params))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; errors become answers here."""
        operation, endpoint_id, ids = scope["pilotlight.operation"]
        if scope["method"] not in operation.methods:
            allowed = {"Allow": ", ".join(sorted(operation.methods))}
            response = native_error(405, "method not allowed", allowed)
        else:
            call = Call(scope, receive, endpoint_id, ids, dict(scope["headers"]))
            try:
                response = await operation.handler(call)
            except ClientGoneError:
                return
            except PilotlightError as error:
                response = native_error_of(error)
            except Exception:  # noqa: BLE001 - the border: the client gets an answer, the log the error
                _log.exception("job_route_failed", path=scope["path"])
                response = native_error(500, "internal server error")
        await response(scope, receive, send)


def json_answer(body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """A success; always 200 (serverless-api.md §2.1)."""
    return Response(body, media_type="application/json", headers=headers)
