"""Who may call the OpenAI routes of an endpoint; both roads ask here, so that they refuse alike."""

from __future__ import annotations

from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.key import ApiKey
from pilotlight.gateway.asgi import Headers
from pilotlight.gateway.directory import Directory, secret_of
from pilotlight.gateway.refusal import RequestRefusedError


def caller_of(directory: Directory, headers: Headers) -> ApiKey:
    """The key of a request. RequestRefusedError (401) without a known one."""
    key = directory.key(secret_of(headers))
    if key is None:
        raise RequestRefusedError(
            401, "invalid or missing API key; send `Authorization: Bearer rpa_…`",
            type="authentication_error", code="invalid_api_key",
        )  # fmt: skip
    return key


def called_endpoint(directory: Directory, key: ApiKey, endpoint_id: str) -> Endpoint:
    """The endpoint a key calls. RequestRefusedError: 404 for an unknown one, 403 outside the key's scope."""
    endpoint = directory.endpoint(endpoint_id)
    if endpoint is None:
        raise RequestRefusedError(
            404, "endpoint not found", type="not_found_error", code="endpoint_not_found"
        )
    if not key.may_call(endpoint.id):
        raise RequestRefusedError(
            403, f"access denied: this key may not call endpoint {endpoint.id}", type="permission_error",
            code="access_denied",
        )  # fmt: skip
    return endpoint
