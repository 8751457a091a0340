"""HTTP plumbing of the job road: routes found by path segments, bodies with a limit, one error border.

Segments instead of patterns, because clients send doubled and trailing slashes (serverless-api.md §2.1)
and because REST v2 shares the prefix `/v2/`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

import structlog

from pilotlight.domain.endpoint import RESERVED_ENDPOINT_IDS
from pilotlight.errors import PilotlightError
from pilotlight.gateway.asgi import GONE, JSON, ClientGoneError, Message, Receive, Response, Scope, Send
from pilotlight.gateway.directory import secret_hash_of
from pilotlight.gateway.errors import BodyTimeoutError, PayloadTooLargeError, native_error, native_error_of
from pilotlight.gateway.jobs.waiting import Gone, watched
from pilotlight.gateway.protocol import EXTENSION, ClientStream
from pilotlight.gateway.repeated import WholeRequest

_log = structlog.get_logger()

_DISCARDED_MAX = 64 * 1024 * 1024
"""Bytes of an oversize body that are read and thrown away where its size matters, as a worker's result does,
whose job fails by it."""

BODY_S = 120.0
"""How long a body may take where nothing else is said; the default of `limits.body_s`."""

_NO_QUERY: Mapping[str, str] = {}


class Call:
    """One request below `/v2/{endpoint_id}/…`, as ASGI gives it.

    Attributes:
        scope: The connection (ASGI).
        receive: Its incoming events.
        endpoint_id: From the path.
        ids: Path segments after the verb.
        method: HTTP method, in capitals.
        headers: By lower-case name; of repeated ones the last counts.
    """

    __slots__ = ("_body_s", "_query", "endpoint_id", "headers", "ids", "method", "receive", "scope")

    def __init__(
        self, scope: Scope, receive: Receive, endpoint_id: str, ids: tuple[str, ...], body_s: float = BODY_S
    ) -> None:
        self.scope = scope
        self.receive = receive
        self.endpoint_id = endpoint_id
        self.ids = ids
        self.method: str = scope["method"]
        self.headers: Mapping[bytes, bytes] = dict(scope["headers"])
        self._query: Mapping[str, str] | None = None
        self._body_s = body_s

    @property
    def query(self) -> Mapping[str, str]:
        """Query parameters; of repeated ones the last counts."""
        if self._query is None:
            raw = self._raw_query()
            self._query = parse_query(raw) if raw else _NO_QUERY
        return self._query

    def _raw_query(self) -> str:
        raw: bytes = self.scope["query_string"]
        return raw.decode("latin-1")

    @property
    def secret_hash(self) -> str:
        """The hash of the key that it came with; "" for none."""
        return secret_hash_of(self.headers)

    @property
    def connection(self) -> ClientStream | None:
        """The client's connection, which may serve more requests; None where the server does not show it."""
        connection: ClientStream | None = (self.scope.get("extensions") or {}).get(EXTENSION)
        return connection

    def client_gone(self) -> watched:
        """`async with` it to have a future that is done when the client has gone; after the body was read."""
        return watched(self.scope, self.receive)

    async def body(
        self, *, limit: int, within_s: float | None = None, discarded_max: int = _DISCARDED_MAX
    ) -> tuple[bytes | None, int]:
        """The body and its size; None for the body when it is over the limit.

        Args:
            limit: Bytes.
            within_s: How long it may take; None means as long as the road gives everybody, `body_s`.
            discarded_max: Bytes over the limit that are read to learn the size.

        Raises:
            ClientGoneError: The client went away before the end.
            BodyTimeoutError: It did not send all of it in time.
        """
        if within_s is None:
            within_s = self._body_s
        try:
            async with asyncio.timeout(within_s):
                return await self._read(limit, discarded_max)
        except TimeoutError as error:
            raise BodyTimeoutError(f"the request body did not arrive within {within_s:g} s") from error

    async def whole_body(self, *, limit: int) -> bytes:
        """The body of a client's request; one that is too large is not read to its end.

        Raises:
            PayloadTooLargeError: It is over the limit (serverless-api.md §2.13).
            ClientGoneError: The client went away before the end.
            BodyTimeoutError: It did not send all of it within `body_s`.
        """
        announced = self.headers.get(b"content-length", b"")
        body = None
        if not announced.isdigit() or int(announced) <= limit:
            body, _ = await self.body(limit=limit, discarded_max=0)
        if body is None:
            raise PayloadTooLargeError(f"request body exceeds {limit / 1_048_576:g} MB limit")
        return body

    async def _read(self, limit: int, discarded_max: int) -> tuple[bytes | None, int]:
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
                if size > limit:
                    return None, size
                return (chunks[0] if len(chunks) == 1 else b"".join(chunks)), size
            if size > limit + discarded_max:
                return None, size


class WholeCall(Call):
    """A request that has arrived completely (`gateway.repeated`).

    Args:
        request: The request.
        connection: Where it came from.
        gone: Makes a future that is done when the client has gone.
        endpoint_id: From the path.
        ids: Path segments after the verb.
    """

    __slots__ = ("_connection", "_gone", "_request")

    def __init__(
        self,
        request: WholeRequest,
        connection: ClientStream,
        gone: Callable[[], Gone],
        endpoint_id: str,
        ids: tuple[str, ...],
    ) -> None:
        self.endpoint_id = endpoint_id
        self.ids = ids
        self.method = request.method
        self.headers = request.fields.headers
        self._query = None
        self._request = request
        self._connection = connection
        self._gone = gone

    def _raw_query(self) -> str:
        return self._request.query

    @property
    def secret_hash(self) -> str:
        """See `Call`; made once for all requests with these fields."""
        fields = self._request.fields
        if fields.secret_hash is None:
            fields.secret_hash = secret_hash_of(self.headers)
        return fields.secret_hash

    @property
    def connection(self) -> ClientStream:
        """The client's connection."""
        return self._connection

    def client_gone(self) -> watched:
        """See `Call`; nothing runs meanwhile."""
        return watched({"extensions": {GONE: self._gone}}, never_received)

    async def body(
        self,
        *,
        limit: int,
        within_s: float | None = None,  # noqa: ARG002 - the body has arrived already
        discarded_max: int = 0,  # noqa: ARG002 - the same
    ) -> tuple[bytes | None, int]:
        """The body and its size; None for the body when it is over the limit."""
        body = self._request.body
        return (body if len(body) <= limit else None), len(body)


async def never_received() -> Message:
    """Stands for the events of a request whose last one has been seen."""
    raise AssertionError("a request that has arrived has no more events")


Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Operation:
    """What a verb of the path does.

    Attributes:
        methods: HTTP methods it answers.
        handler: Serves it; may raise errors of our tree.
        at_once: Serves it where nothing has to be waited for, which spares a task; None, or an error of our
            tree, leaves it to `handler`.
    """

    methods: frozenset[str]
    handler: Handler
    at_once: Callable[[Call], Response | None] | None = None


@dataclass(frozen=True, slots=True)
class SegmentRoute:
    """Routes of the form `/{prefix}/{endpoint_id}/{verb}[/{id}…]`, found in a table.

    Attributes:
        operations: By verb and number of ids after it.
        prefix: Segments before the endpoint's id.
        verbless: Whether there is no verb between the endpoint's id and the ids; its key is then "".
    """

    operations: Mapping[tuple[str, int], Operation]
    prefix: tuple[str, ...] = ("v2",)
    verbless: bool = False

    def find(self, segments: list[str]) -> tuple[Operation, str, tuple[str, ...]] | None:
        """Operation, endpoint and ids of a path, whatever the method; None when it is not in the table."""
        start = len(self.prefix)
        if len(segments) < start + 2 or tuple(segments[:start]) != self.prefix:
            return None
        if self.verbless:
            verb, ids = "", segments[start + 1 :]
        else:
            verb, ids = segments[start + 1], segments[start + 2 :]
        operation = self.operations.get((verb, len(ids)))
        endpoint_id = segments[start]
        if operation is None or endpoint_id in RESERVED_ENDPOINT_IDS:
            return None
        return operation, endpoint_id, tuple(ids)


class JobRoad:
    """The ASGI application for all routes with segments; what none of them answers is 404.

    Args:
        routes: Tables; of two that know a path the first one counts.
        body_s: How long a request's body may take.
    """

    def __init__(self, routes: Iterable[SegmentRoute], *, body_s: float = BODY_S) -> None:
        self._body_s = body_s
        tables: dict[tuple[tuple[str, ...], bool], dict[tuple[str, int], Operation]] = {}
        for route in routes:
            table = tables.setdefault((route.prefix, route.verbless), {})
            for path, operation in route.operations.items():
                table.setdefault(path, operation)
        self._routes = tuple(
            SegmentRoute(table, prefix, verbless) for (prefix, verbless), table in tables.items()
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI); errors become answers here."""
        if scope["type"] != "http":
            return
        found = self._find(scope["path"])
        if found is None:
            response: Response | None = native_error(404, "not found")
        else:
            operation, endpoint_id, ids = found
            response = await _serve(operation, Call(scope, receive, endpoint_id, ids, self._body_s))
        if response is not None:
            await response(scope, receive, send)

    def serve_whole(
        self, request: WholeRequest, connection: ClientStream, gone: Callable[[], Gone]
    ) -> Response | Awaitable[Response] | None:
        """Answer a request that has arrived completely, or begin to; None for a path that is in no table."""
        found = self._find(request.path)
        if found is None:
            return None
        operation, endpoint_id, ids = found
        call = WholeCall(request, connection, gone, endpoint_id, ids)
        if operation.at_once is not None and call.method in operation.methods:
            # Whatever goes wrong goes wrong once more in the handler, and is answered and logged there.
            with contextlib.suppress(Exception):
                response = operation.at_once(call)
                if response is not None:
                    return response
        return _serve_whole(operation, call)

    def _find(self, path: str) -> tuple[Operation, str, tuple[str, ...]] | None:
        segments = [segment for segment in path.split("/") if segment]
        for route in self._routes:
            found = route.find(segments)
            if found is not None:
                return found
        return None


async def _serve_whole(operation: Operation, call: WholeCall) -> Response:
    response = await _serve(operation, call)
    assert response is not None, "a request that has arrived cannot break off"
    return response


async def _serve(operation: Operation, call: Call) -> Response | None:
    """The answer to a request, errors included; None when the client went away before it had sent it."""
    if call.method not in operation.methods:
        return native_error(405, "method not allowed", {"Allow": ", ".join(sorted(operation.methods))})
    try:
        return await operation.handler(call)
    except ClientGoneError:
        return None
    except PilotlightError as error:
        return native_error_of(error)
    except Exception:  # noqa: BLE001 - the border: the client gets an answer, the log the error
        _log.exception("job_route_failed", endpoint_id=call.endpoint_id, ids=call.ids)
        return native_error(500, "internal server error")


def parse_query(text: str) -> dict[str, str]:
    """Query parameters; of repeated ones the last counts, one without a value is empty."""
    if "%" in text or "+" in text:
        return dict(parse_qsl(text, keep_blank_values=True))
    # Most have nothing to decode; workers send one with every take and every result.
    pairs = (item.partition("=") for item in text.split("&") if item)
    return {name: value for name, _, value in pairs}


def json_answer(body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """A success; always 200 (serverless-api.md §2.1)."""
    return Response(body, headers=headers, media_type=JSON)
