"""Which of the engine's HTTP routes a caller may reach, decided before anything is forwarded.

Called by the gateway's data path and by the worker program (jobs with `openai_route` or `route`, and its own
HTTP listener), so that every road has the same guard: `vllm-worker.md` §1.10 rules 1 to 4 over the allow-list
of §6.1. The engine serves many more routes than that, some of which change its state; whatever is not in the
table below does not exist for callers. A new route of the engine is one more line in `ROUTES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final
from urllib.parse import unquote_to_bytes

MAX_ROUTE_CHARS: Final = 2048
"""Longest route, query included; `vllm-worker.md` §1.10 rule 1."""

METHODS: Final = ("GET", "POST", "DELETE")
"""Methods a caller may use at all; §1.10 rule 2."""


class RouteKind(StrEnum):
    """What travels over a route."""

    JSON = "json"
    MULTIPART = "multipart"
    WEBSOCKET = "websocket"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One row of the allow-list."""

    methods: tuple[str, ...]
    kind: RouteKind = RouteKind.JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDecision:
    """Whether a request may go to the engine, and if not, the HTTP answer to give.

    Attributes:
        allowed: Forward it.
        status: 200 when allowed, else 400 (malformed), 403 (administration), 404 (unknown) or 405 (method).
        error_type: OpenAI error type that goes with `status`; "" when allowed.
        message: One sentence for the caller; "" when allowed.
        kind: Body kind of the route.
        path: Percent-decoded path, safe to send as it is; "" when not allowed.
        query: Raw query string without `?`.
        methods: Methods the route accepts, for an `Allow` header; empty where no route matched.
    """

    allowed: bool
    status: int = 200
    error_type: str = ""
    message: str = ""
    kind: RouteKind = RouteKind.JSON
    path: str = ""
    query: str = ""
    methods: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The request target for the engine: path and query."""
        return f"{self.path}?{self.query}" if self.query else self.path


_GET = Route(methods=("GET",))
_POST = Route(methods=("POST",))
_FORM = Route(methods=("POST",), kind=RouteKind.MULTIPART)

ROUTES: Final = MappingProxyType(
    {
        "/v1/models": _GET,
        "/v1/models/{name}": _GET,
        "/v1/chat/completions": _POST,
        "/v1/completions": _POST,
        "/v1/responses": _POST,
        "/v1/responses/{id}": _GET,
        "/v1/responses/{id}/cancel": _POST,
        "/v1/messages": _POST,
        "/v1/messages/count_tokens": _POST,
        "/v1/embeddings": _POST,
        "/v2/embed": _POST,
        "/pooling": _POST,
        "/classify": _POST,
        "/score": _POST,
        "/v1/score": _POST,
        "/rerank": _POST,
        "/v1/rerank": _POST,
        "/v2/rerank": _POST,
        "/tokenize": _POST,
        "/detokenize": _POST,
        "/v1/audio/transcriptions": _FORM,
        "/v1/audio/translations": _FORM,
        "/v1/realtime": Route(methods=("GET",), kind=RouteKind.WEBSOCKET),
        "/health": _GET,
        "/version": _GET,
        "/metrics": _GET,
        "/load": _GET,
        "/ping": Route(methods=("GET", "POST")),
    }
)
"""The allow-list of `vllm-worker.md` §6.1: path template to accepted methods and body kind."""

STREAM_USAGE_ROUTES: Final = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Routes whose streams carry token counts only when `stream_options.include_usage` asks for them (§6.3)."""

REWRITTEN_FIELDS: Final = frozenset(
    {
        "best_of",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "guided_whitespace_pattern",
        "guided_decoding_backend",
        "guided_decoding",
    }
)
"""Body fields that the worker program honours and the engine would silently ignore (§1.7)."""

_FALSE_TEXTS: Final = frozenset({"false", "0", "no", "off", "f", "n"})
"""Texts that the engine reads as false."""

ADMIN_PATHS: Final = frozenset(
    {
        "/sleep", "/wake_up", "/is_sleeping", "/release_kv_cache_memory",
        "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache",
        "/pause", "/resume", "/is_paused", "/abort_requests", "/inference/v1/abort_requests",
        "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine",
        "/start_weight_update", "/start_draft_weight_update", "/update_weights", "/finish_weight_update",
        "/update_weight_version", "/weight_info", "/weight_checker", "/get_world_size",
        "/start_profile", "/stop_profile", "/collective_rpc",
        "/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance/apply", "/fault_tolerance/status",
        "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
        "/server_info", "/tokenizer_info", "/kv_event_sources",
        "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json",
    }
)  # fmt: skip
"""Routes that change or describe the engine itself; denied unless the operator allows them (§1.10 rule 3)."""

# A value inside a path: what ids and model names are made of. A name may hold slashes, an id may not; neither
# can be a dot segment, because those are refused before.
_PLACEHOLDERS = {"{id}": r"[A-Za-z0-9_.:-]+", "{name}": r"[A-Za-z0-9_.:@/-]+"}


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for name, expression in _PLACEHOLDERS.items():
        pattern = pattern.replace(name, expression)
    return re.compile(pattern)


_PATTERNS = tuple((_compile(path), route) for path, route in ROUTES.items() if "{" in path)


def check_route(method: str, path: str, *, allow_admin: bool = False, upgrade: bool = False) -> RouteDecision:
    """The answer to "may this request reach the engine?", with the HTTP status if it may not.

    Args:
        method: HTTP method, any case.
        path: Path and query as the caller wrote them, percent-encoding included: `/v1/responses/r_1?x=1`.
        allow_admin: Let routes that change engine state through (`ALLOW_ADMIN_ROUTES=1`).
        upgrade: Whether this is the handshake of a WebSocket; then only routes that are one are open.

    Returns:
        A decision whose `path` and `query` are to be used for the upstream URL instead of the caller's text.
        The path is matched and returned percent-decoded, so an encoded spelling cannot hide another route.
    """
    malformed = _malformed(path)
    if malformed:
        return _denied(400, "BadRequestError", malformed)
    raw_path, _, query = path.partition("?")
    decoded = unquote_to_bytes(raw_path).decode("ascii")
    method = method.upper()
    if method not in METHODS:
        return _denied(405, "MethodNotAllowed", f"method {method} is not accepted", methods=METHODS)
    if decoded.rstrip("/").casefold() in ADMIN_PATHS:
        if allow_admin:
            return RouteDecision(allowed=True, path=decoded, query=query, methods=METHODS)
        return _denied(
            403, "PermissionDeniedError", f"{decoded} administers the engine and is not open to callers"
        )
    route = find_route(decoded)
    if route is None:
        return _denied(404, "NotFoundError", f"{decoded} is not a route of this service")
    if upgrade is not (route.kind is RouteKind.WEBSOCKET):
        what = "no WebSocket route" if upgrade else "a WebSocket route, open to handshakes only"
        return _denied(400, "BadRequestError", f"{decoded} is {what}", kind=route.kind)
    if method not in route.methods:
        allowed = " or ".join(route.methods)
        return _denied(
            405, "MethodNotAllowed", f"{decoded} accepts {allowed}, not {method}", methods=route.methods
        )
    return RouteDecision(allowed=True, kind=route.kind, path=decoded, query=query, methods=route.methods)


def find_route(path: str) -> Route | None:
    """The row of the allow-list that a decoded path matches, or None."""
    route = ROUTES.get(path)
    if route is not None:
        return route if "{" not in path else None
    for pattern, candidate in _PATTERNS:
        if pattern.fullmatch(path):
            return candidate
    return None


def asks_to_stream(value: object) -> bool:
    """Whether a body's `stream`, parsed JSON, asks for a stream (§1.9).

    Engines read more than `true` as true, so it is written anew as `true` wherever a body is passed on.
    """
    return bool(value) and not (isinstance(value, str) and value.lower() in _FALSE_TEXTS)


def speaks_anthropic(route: str) -> bool:
    """Whether errors of a route take the form of `/v1/messages` (§3.7).

    Args:
        route: Path and query as the caller wrote them; anything.
    """
    return unquote_to_bytes(route.encode("utf-8", "replace")).startswith(b"/v1/messages")


def usual_method(route: str) -> str:
    """The method of a call that carries no body: GET where a route can be read, else POST (§1.1).

    Args:
        route: Path and query as the caller wrote them; anything.
    """
    raw_path = route.partition("?")[0]
    found = find_route(unquote_to_bytes(raw_path).decode("ascii", "replace"))
    return "GET" if found is not None and "GET" in found.methods else "POST"


def _malformed(path: str) -> str:
    """Why a route cannot be forwarded whatever it names, or "" if its form is fine (§1.10 rule 1)."""
    if len(path) > MAX_ROUTE_CHARS:
        return f"route of {len(path)} characters is longer than the limit of {MAX_ROUTE_CHARS}"
    if not path.startswith("/") or path.startswith("//"):
        return f"route {path[:80]!r} must start with exactly one '/'"
    raw_path, _, query = path.partition("?")
    decoded = unquote_to_bytes(raw_path)
    if decoded.startswith(b"//"):
        return f"route {path[:80]!r} must start with exactly one '/'"
    if b"\\" in decoded or "\\" in query:
        return "route must not contain a backslash"
    if any(byte <= 0x20 or byte >= 0x7F for byte in decoded + query.encode("utf-8", "replace")):
        return "route must not contain blanks, control characters or characters outside ASCII"
    if "#" in path or b"?" in decoded or b"#" in decoded:
        return "route must not contain a fragment or an encoded '?' or '#'"
    if any(segment in {b".", b".."} for segment in decoded.split(b"/")):
        return "route must not contain '.' or '..' segments"
    return ""


def _denied(
    status: int,
    error_type: str,
    message: str,
    *,
    kind: RouteKind = RouteKind.JSON,
    methods: tuple[str, ...] = (),
) -> RouteDecision:
    return RouteDecision(
        allowed=False, status=status, error_type=error_type, message=message, kind=kind, methods=methods
    )
