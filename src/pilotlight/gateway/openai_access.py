"""Who may call which OpenAI routes of an endpoint, and what needs no worker; both roads ask here."""

from __future__ import annotations

from http import HTTPStatus

import msgspec

from pilotlight.core.openai_routes import RouteDecision
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.key import ApiKey
from pilotlight.gateway.directory import Directory, HeaderValues, secret_hash_of
from pilotlight.gateway.model_cards import model_cards
from pilotlight.gateway.refusal import RequestRefusedError


def caller_of(directory: Directory, headers: HeaderValues) -> ApiKey:
    """The key of a request. RequestRefusedError (401) without a known one."""
    key = directory.key_of_hash(secret_hash_of(headers))
    if key is None:
        raise stranger()
    return key


def stranger() -> RequestRefusedError:
    """The answer to a request without a known key."""
    return RequestRefusedError(
        401, "invalid or missing API key; send `Authorization: Bearer rpa_…`",
        type="authentication_error", code="invalid_api_key", headers=[(b"www-authenticate", b"Bearer")],
    )  # fmt: skip


def living_endpoint(directory: Directory, endpoint_id: str) -> Endpoint:
    """An endpoint by its id. RequestRefusedError (404) for an unknown or deleted one."""
    endpoint = directory.endpoint(endpoint_id)
    if endpoint is None:
        raise no_endpoint()
    return endpoint


def no_endpoint() -> RequestRefusedError:
    """The answer to a request for an endpoint that does not exist, or not any more."""
    return RequestRefusedError(404, "endpoint not found", type="not_found_error", code="endpoint_not_found")


def called_endpoint(directory: Directory, key: ApiKey, endpoint_id: str) -> Endpoint:
    """The endpoint a key calls. RequestRefusedError: 404 for an unknown one, 403 outside the key's scope."""
    endpoint = living_endpoint(directory, endpoint_id)
    if not key.may_call(endpoint.id):
        raise RequestRefusedError(
            403, f"access denied: this key may not call endpoint {endpoint.id}", type="permission_error",
            code="access_denied",
        )  # fmt: skip
    return endpoint


def route_refusal(decision: RouteDecision) -> RequestRefusedError:
    """The answer for a route that is not served, or not by this method."""
    headers = [(b"allow", ", ".join(decision.methods).encode())] if decision.status == 405 else []
    return RequestRefusedError(
        decision.status, decision.message, type=decision.error_type or HTTPStatus(decision.status).phrase,
        headers=headers,
    )  # fmt: skip


def models_answer(endpoint: Endpoint, path: str) -> bytes:
    """The body that answers `/v1/models` or `/v1/models/{name}`, for which no worker is woken.

    Raises:
        RequestRefusedError: 404, no model has this name.
    """
    cards = model_cards(endpoint)
    wanted = path.removeprefix("/v1/models").strip("/")
    if not wanted:
        return msgspec.json.encode({"object": "list", "data": cards})
    answer = next((card for card in cards if card["id"] == wanted), None)
    if answer is None:
        raise RequestRefusedError(404, f"The model `{wanted}` does not exist.", type="NotFoundError")
    return msgspec.json.encode(answer)
