"""What the head of a request says about it: worked out once for a head that repeats."""

from __future__ import annotations

import functools
from typing import Final

from pilotlight.core.deadlines import Deadline, request_deadline
from pilotlight.core.openai_routes import RouteDecision, check_route
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.key import ApiKey
from pilotlight.domain.worker import Address
from pilotlight.errors import InvalidInputError
from pilotlight.gateway.asgi import Headers
from pilotlight.gateway.data_path.answer import lines
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.head import Head
from pilotlight.gateway.openai_access import called_endpoint, route_refusal
from pilotlight.gateway.refusal import RequestRefusedError
from pilotlight.gateway.request_ids import client_id
from pilotlight.gateway.upstream import request_head
from pilotlight.settings import LimitSettings

_PASSED_ON: Final = (b"content-type", b"accept", b"user-agent", b"tracestate")
"""Request headers the engine sees, beside `traceparent`. Never the client's key; the hop's are ours."""

_TRACE: Final = (b"traceparent",)

_HEADS_MAX = 64
"""Heads of requests that are kept, one for each worker; a connection may outlive any number of workers."""

_check_route = functools.lru_cache(maxsize=1024)(check_route)
"""The same few routes are asked for all the time."""


class Opened:
    """A request that may be served.

    Attributes:
        epoch: Of the directory; another one means that all of this is to be asked again.
        key: Whose request it is.
        endpoint: Whom it calls.
        decision: What the engine is asked.
        deadline: How long its client waits.
        session: Requests of one session should meet the same worker; "" for none.
        client_id: The id that the client gave it; "" for none.
        survivable: Whether a stream may be asked for with what it needs to go on with another worker: not of
            an engine that is not ours to know, and might refuse a field that it does not know.
    """

    __slots__ = (
        "_heads", "_method", "_passed", "_traced", "client_id", "deadline", "decision", "endpoint", "epoch",
        "key", "session", "survivable",
    )  # fmt: skip

    def __init__(
        self,
        head: Head,
        *,
        epoch: int,
        key: ApiKey,
        endpoint: Endpoint,
        decision: RouteDecision,
        deadline: Deadline,
    ) -> None:
        headers = head.headers
        self.epoch = epoch
        self.key = key
        self.endpoint = endpoint
        self.decision = decision
        self.deadline = deadline
        self.survivable = endpoint.revision.engine_url is None
        self.session = headers.get(b"x-session-id", b"").decode("latin-1")
        self.client_id = client_id(headers.get(b"x-request-id", b""))
        self._method = head.method
        self._passed = lines((name, headers[name]) for name in _PASSED_ON if name in headers)
        self._traced = lines((name, headers[name]) for name in _TRACE if name in headers)
        self._heads: dict[tuple[Address, bool], bytes] = {}

    def request_head(self, address: Address, *, traced: bool) -> bytes:
        """Request line and headers for the engine, without the id and the length.

        Args:
            address: Whose; its key is among them.
            traced: Whether the client's place in a trace is left out, because the request has its own.
        """
        made = self._heads.get((address, traced))
        if made is None:
            made = request_head(address, self._method, self.decision.target) + self._passed
            if not traced:
                made += self._traced
            if len(self._heads) >= _HEADS_MAX:
                self._heads.clear()
            self._heads[address, traced] = made
        return made


def open_request(
    head: Head, key: ApiKey, endpoint_id: str, path: str, *, directory: Directory, limits: LimitSettings
) -> Opened:
    """What the head of a request says, if it may be served.

    Args:
        head: The head.
        key: Whose request it is.
        endpoint_id: From its path.
        path: What follows `/openai`, percent-encoded, with the query.
        directory: Endpoints and keys.
        limits: Bounds.

    Raises:
        RequestRefusedError: It may not.
    """
    epoch = directory.epoch
    endpoint = called_endpoint(directory, key, endpoint_id)
    decision = _check_route(head.method, path)
    if not decision.allowed:
        raise route_refusal(decision)
    try:
        deadline = request_deadline(Headers(head.fields), longest_s=limits.data_path_s)
    except InvalidInputError as error:
        raise RequestRefusedError(400, str(error)) from error
    return Opened(head, epoch=epoch, key=key, endpoint=endpoint, decision=decision, deadline=deadline)
