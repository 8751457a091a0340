"""The WebSocket of the OpenAI routes, `/v2/{endpoint}/openai/v1/realtime`: straight to an engine, too.

`gateway.app` calls it for handshakes. Key, endpoint and route are checked as on the data path, a slot is
taken or waited for, and then client and engine talk through `gateway.tunnel` until one of them leaves. The
slot is the session's for as long as it lasts. A worker that cannot be reached is passed over for another one;
once the handshake may have reached an engine, there is no second try.

OpenAI's packages send the key as a header. Browsers cannot set headers, so OpenAI's own server takes it as a
subprotocol, too, `openai-insecure-api-key.KEY` beside `realtime`, and so do we. The engine sees neither of
the two, but its own key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import structlog

from pilotlight.core.deadlines import Deadline, hold_bound, request_deadline
from pilotlight.core.fair_queue import cost_of, expected_tokens
from pilotlight.core.openai_routes import check_route
from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Address
from pilotlight.errors import InvalidInputError
from pilotlight.gateway.asgi import Headers, Scope
from pilotlight.gateway.data_path import DataPath
from pilotlight.gateway.data_path.desk import Slot, Use, Wish, hold
from pilotlight.gateway.directory import secret_of
from pilotlight.gateway.elsewhere import FOLLOWER_RETRY_S, FOLLOWS
from pilotlight.gateway.exchange import Exchange
from pilotlight.gateway.openai_access import called_endpoint, route_refusal, stranger
from pilotlight.gateway.openai_rates import count_in
from pilotlight.gateway.refusal import RequestRefusedError
from pilotlight.gateway.request_ids import client_id, for_engine, shown
from pilotlight.gateway.slots import Ask
from pilotlight.gateway.tunnel import Handshake, TunnelBounds, WebSocketTunnel, attended, carry
from pilotlight.gateway.upstream import UpstreamError, request_bytes
from pilotlight.gateway.worker_slots import SUSPENSION_S

_log = structlog.get_logger()

_TRIES_MAX = 3
"""Workers that are tried when one cannot be reached."""

_ANSWER_S = 60.0
"""Longest wait for an engine's answer to a handshake, for which it need not think."""

_ANSWER_BYTES = 1024 * 1024
"""Largest body of an answer that is no WebSocket."""

_PASSED_ON: Final = (
    b"sec-websocket-key",
    b"sec-websocket-version",
    b"sec-websocket-extensions",
    b"user-agent",
    b"openai-beta",
    b"tracestate",
)
"""Headers the engine sees, beside subprotocols, ids and `traceparent`. Never the client's key."""

_PROTOCOLS = b"sec-websocket-protocol"
_KEY_PROTOCOL = "openai-insecure-api-key."
_REALTIME = "realtime"


@dataclass(frozen=True, slots=True)
class Offer:
    """The subprotocols that a client offers.

    Attributes:
        key: The key among them; "" for none.
        others: The rest, in order.
    """

    key: str
    others: tuple[str, ...]

    @classmethod
    def of(cls, scope: Scope) -> Offer:
        """Those of a handshake."""
        values = [value.decode("latin-1") for name, value in scope["headers"] if name == _PROTOCOLS]
        tokens = [token.strip() for value in values for token in value.split(",")]
        keys = [token.removeprefix(_KEY_PROTOCOL) for token in tokens if token.startswith(_KEY_PROTOCOL)]
        others = tuple(token for token in tokens if token and not token.startswith(_KEY_PROTOCOL))
        return cls(keys[0] if keys else "", others)

    def missed(self, handshake: Handshake) -> list[tuple[bytes, bytes]]:
        """The header that an engine's answer lacks: browsers leave if none of what they offer is chosen.

        vLLM chooses none, and speaks what `realtime` names.
        """
        if _REALTIME in self.others and handshake.accepted and not handshake.named(_PROTOCOLS):
            return [(_PROTOCOLS, _REALTIME.encode())]
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A client that may have its WebSocket.

    Attributes:
        exchange: What is noted of it.
        tunnel: Its connection.
        headers: Of its handshake.
        offer: Its subprotocols.
        target: Path and query for the engine.
        wish: What its slot is asked for with.
        deadline: How long it waits, and how long the session may be.
    """

    exchange: Exchange
    tunnel: WebSocketTunnel
    headers: Headers
    offer: Offer
    target: str
    wish: Wish
    deadline: Deadline


class RealtimeRoad:
    """Serves the handshakes of one gateway's OpenAI routes.

    Args:
        road: The data path, whose parts and bounds these are.
        serves_directly: Whether an endpoint's engines are reached from here, by its id.
    """

    def __init__(self, road: DataPath, serves_directly: Callable[[str], bool]) -> None:
        self._road = road
        self._serves_directly = serves_directly

    async def __call__(self, scope: Scope, tunnel: WebSocketTunnel, *, endpoint_id: str, path: str) -> None:
        """Serve one WebSocket to its end.

        Args:
            scope: The handshake (ASGI).
            tunnel: The client.
            endpoint_id: From the path.
            path: What follows `/openai`, percent-encoded, with the query.
        """
        road = self._road
        exchange = Exchange.begin(endpoint_id, path, clock=road.clock, entropy=road.entropy)
        try:
            with attended(tunnel, exchange):
                await self._serve(exchange, scope, tunnel, path)
        except RequestRefusedError as refusal:
            _refuse(exchange, tunnel, refusal)
        except Exception:  # noqa: BLE001 - logged whole and answered
            _log.exception("realtime_failed", request=exchange.request_id, endpoint=endpoint_id)
            message = f"internal server error, request {exchange.request_id}"
            _refuse(exchange, tunnel, RequestRefusedError(500, message, outcome=Outcome.FAILED))
        finally:
            road.record(exchange.row(road.clock.monotonic_ns()))

    async def _serve(self, exchange: Exchange, scope: Scope, tunnel: WebSocketTunnel, path: str) -> None:
        road, headers, offer = self._road, Headers(scope["headers"]), Offer.of(scope)
        exchange.client_id = client_id(headers.get(b"x-request-id"))
        key = road.directory.key(secret_of(headers) or offer.key)
        if key is None:
            raise stranger()
        exchange.key_id = key.id
        endpoint = called_endpoint(road.directory, key, exchange.endpoint_id)
        decision = check_route("GET", path, upgrade=True)
        if not decision.allowed:
            raise route_refusal(decision)
        exchange.route = decision.path
        self._check_reached(endpoint)
        if road.tracer is not None:
            exchange.context = road.tracer.begin(headers.get(b"traceparent"), headers.get(b"tracestate"))
        try:
            deadline = request_deadline(headers, longest_s=road.limits.data_path_s)
        except InvalidInputError as error:
            raise RequestRefusedError(400, str(error)) from error
        ask = Ask(
            0,
            key.id,
            key.share,
            cost=cost_of(*expected_tokens(0, None)),
            session=headers.get(b"x-session-id").decode("latin-1"),
        )
        # Its tokens are between client and engine.
        wish = Wish(endpoint, key, ask, tokens=0)
        with self._admitted(wish):
            await self._converse(
                Session(
                    exchange=exchange, tunnel=tunnel, headers=headers, offer=offer, target=decision.target,
                    wish=wish, deadline=deadline,
                )
            )  # fmt: skip

    def _check_reached(self, endpoint: Endpoint) -> None:
        """Refuse a WebSocket to an endpoint that has no engine, or none that is reached from here."""
        if endpoint.kind is EndpointKind.LOAD_BALANCER:
            raise RequestRefusedError(
                400, f"endpoint {endpoint.id} is a load balancer: its WebSockets are at /lb/{endpoint.id}/…"
            )
        if endpoint.kind is EndpointKind.QUEUE:
            raise RequestRefusedError(
                400,
                f"the workers of endpoint {endpoint.id} only take jobs, so it has no WebSockets;"
                " deploy a model or an engine_url for them",
            )
        if not self._serves_directly(endpoint.id):
            raise RequestRefusedError(
                503, FOLLOWS, code="not_leading", retry_after_s=FOLLOWER_RETRY_S, outcome=Outcome.SHED
            )

    @contextlib.contextmanager
    def _admitted(self, wish: Wish) -> Iterator[None]:
        """Count a session for as long as it lasts."""
        road = self._road
        with contextlib.ExitStack() as stack:
            if road.rates is not None:
                stack.push(count_in(road.rates, wish.endpoint, wish.key, outcome=Outcome.SHED))
            stack.callback(road.desk.end, wish, None)
            yield

    async def _converse(self, session: Session) -> None:
        """Join a client and an engine; where a worker is not reached, another one's."""
        for left in reversed(range(_TRIES_MAX)):
            slot = await self._slot(session)
            try:
                await self._join(session, slot)
            except UpstreamError as error:
                if error.sent or not left:
                    raise _failure(error) from error
            else:
                return

    async def _slot(self, session: Session) -> Slot:
        """A slot, waited for if need be; it must be given back."""
        road, exchange = self._road, session.exchange
        bound = hold_bound(session.deadline, elapsed_s=self._elapsed_s(session), hold_s=road.limits.hold_s)
        slot = await hold(road.desk, session.wish, bound)
        exchange.worker_id = slot.worker_id
        exchange.wait_ns = road.clock.monotonic_ns() - exchange.started_ns
        return slot

    def _elapsed_s(self, session: Session) -> float:
        return (self._road.clock.monotonic_ns() - session.exchange.started_ns) / 1e9

    async def _join(self, session: Session, slot: Slot) -> None:
        """Let a client talk to the engine of a worker, whose slot is given back at the end.

        Raises:
            UpstreamError: The engine cannot be reached, or gave no answer.
        """
        road, exchange = self._road, session.exchange
        assert slot.registration is not None
        address = slot.registration.engine
        bounds = TunnelBounds(
            life_s=max(0.0, session.deadline.whole_s - self._elapsed_s(session)),
            answer_s=_ANSWER_S,
            answer_bytes=_ANSWER_BYTES,
        )
        failed = False
        try:
            head = _head(session, address)
            await carry(exchange, session.tunnel, address, head, lambda answer: _own(session, answer), bounds)
            failed = exchange.status >= 500
        except UpstreamError as error:
            failed = True
            if not error.sent:
                road.desk.suspend(slot.worker_id, SUSPENSION_S)
            raise
        finally:
            # Only who has talked to the engine has cost anything, and nobody knows how much.
            talked = exchange.status == HTTPStatus.SWITCHING_PROTOCOLS
            road.desk.give_back(session.wish, slot, Use(failed, cost=None if talked else 0))


def _head(session: Session, address: Address) -> bytes:
    """The handshake as the engine gets it."""
    exchange, given = session.exchange, session.headers
    headers = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
    headers += [(name, given.get(name)) for name in _PASSED_ON if given.get(name)]
    if session.offer.others:
        headers.append((_PROTOCOLS, ", ".join(session.offer.others).encode("latin-1")))
    trace = given.get(b"traceparent") if exchange.context is None else exchange.context.trace.encode()
    if trace:
        headers.append((b"traceparent", trace))
    headers.append((b"x-request-id", for_engine(exchange.request_id, exchange.client_id).encode()))
    return request_bytes(address, "GET", session.target, headers, b"")


def _own(session: Session, answer: Handshake) -> list[tuple[bytes, bytes]]:
    """Our headers in an engine's answer.

    Raises:
        RequestRefusedError: 404, the engine has no such route. A server of Starlette's, as vLLM is one, says
            403 to that, which a client would take for a word about its key.
    """
    if answer.status == 403:
        route = session.exchange.route
        raise RequestRefusedError(
            404, f"the engine of endpoint {session.wish.endpoint.id} does not serve {route} with its model",
            type="not_found_error", code="route_not_served",
        )  # fmt: skip
    exchange = session.exchange
    request_id = shown(exchange.request_id, exchange.client_id).encode()
    taken = session.wish.taken
    limits = () if taken is None else taken.headers
    return [(b"x-request-id", request_id), *session.offer.missed(answer), *limits]


def _failure(error: UpstreamError) -> RequestRefusedError:
    """What a client is told whose engine gave no answer."""
    status, outcome = (504, Outcome.TIMED_OUT) if error.timed_out else (502, Outcome.FAILED)
    return RequestRefusedError(status, f"the worker failed: {error}", outcome=outcome, retry_after_s=1)


def _refuse(exchange: Exchange, tunnel: WebSocketTunnel, refusal: RequestRefusedError) -> None:
    """Answer a handshake that was not answered yet with an error in OpenAI's shape."""
    exchange.outcome, exchange.status = refusal.outcome, refusal.status
    request_id = shown(exchange.request_id, exchange.client_id).encode()
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id), *refusal.headers]
    tunnel.refuse(refusal.status, refusal.body_for(exchange.route), headers)
