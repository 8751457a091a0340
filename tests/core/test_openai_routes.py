"""The guard of vllm-worker.md §1.10 and the allow-list of §6.1."""

from __future__ import annotations

import pytest

from pilotlight.core.openai_routes import ADMIN_PATHS, ROUTES, RouteKind, check_route, usual_method


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("get", "/v1/models/org/name"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/responses/resp_1?include=x"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/v1/embeddings"),
        ("POST", "/tokenize"),
        ("GET", "/metrics"),
    ],
)
def test_routes_of_the_contract_are_allowed(method: str, path: str) -> None:
    decision = check_route(method, path)
    assert decision.allowed
    assert decision.status == 200
    assert decision.target == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "v1/models",
        "@host/x",
        "//h/v1/models",
        "/%2fh/v1/models",
        "/v1/../sleep",
        "/a/../b",
        "/%2e%2e/sleep",
        "/v1/%2E%2E/sleep",
        "/v1/./models",
        "/v1\\models",
        "/v1/%5cmodels",
        "/v1/models\r\nHost: x",
        "/v1/models%0d%0a",
        "/v1/models?x=\n",
        "/v1/models#frag",
        "/v1/models%3fx",
        "/v1/mod els",
        "/v1/modèles",
        "/v1/models?" + "x" * 3000,
    ],
)
def test_malformed_routes_are_refused(path: str) -> None:
    """§10 item 1: the route-guard set."""
    decision = check_route("GET", path)
    assert not decision.allowed
    assert decision.status == 400
    assert decision.message
    assert decision.path == ""


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_administration_is_denied_unless_the_operator_allows_it(method: str, path: str) -> None:
    assert check_route(method, path).status == 403
    assert check_route(method, path + "/").status == 403
    assert check_route(method, path.upper()).status == 403
    assert check_route(method, path, allow_admin=True).allowed


def test_an_encoded_spelling_does_not_hide_a_route() -> None:
    assert check_route("POST", "/%73leep").status == 403
    assert check_route("POST", "/v1/chat/%63ompletions").target == "/v1/chat/completions"


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/invocations", "/v1/chat/completions/render", "/inference/v1/generate", "/v1/models/"],
)
def test_what_is_not_listed_is_not_served(path: str) -> None:
    decision = check_route("POST", path)
    assert (decision.status, decision.error_type) == (404, "NotFoundError")


def test_wrong_methods_name_the_right_ones() -> None:
    decision = check_route("GET", "/v1/chat/completions")
    assert (decision.status, decision.methods) == (405, ("POST",))
    assert check_route("PUT", "/v1/models").status == 405


def test_websocket_routes_are_open_to_handshakes_and_nothing_else_is() -> None:
    decision = check_route("GET", "/v1/realtime")
    assert (decision.allowed, decision.status, decision.kind) == (False, 400, RouteKind.WEBSOCKET)
    decision = check_route("GET", "/v1/realtime?model=org/model", upgrade=True)
    assert (decision.allowed, decision.target) == (True, "/v1/realtime?model=org/model")
    for path, status in (("/v1/models", 400), ("/v1/chat/completions", 400), ("/sleep", 403), ("/v1", 404)):
        decision = check_route("GET", path, upgrade=True)
        assert (decision.allowed, decision.status) == (False, status)


def test_forms_are_marked() -> None:
    assert check_route("POST", "/v1/audio/transcriptions").kind is RouteKind.MULTIPART


def test_no_allowed_route_is_an_administration_route() -> None:
    assert not ADMIN_PATHS & set(ROUTES)


@pytest.mark.parametrize(
    ("route", "method"),
    [
        ("/v1/models", "GET"),
        ("/v1/models/org/name", "GET"),
        ("/v1/responses/r_1?stream=true", "GET"),
        ("/ping", "GET"),
        ("/v1/chat/completions", "POST"),
        ("/v1/responses/r_1/cancel", "POST"),
        ("/unknown", "POST"),
        ("@host/x", "POST"),
        ("/\N{SNOWMAN}%ff", "POST"),
    ],
)
def test_the_usual_method_of_a_call_without_a_body(route: str, method: str) -> None:
    """vllm-worker.md §1.1: what can be read is read, the rest is sent to."""
    assert usual_method(route) == method
