"""The rate limit of the OpenAI routes, in front of whatever serves them (serverless-api.md §2.2 row 11).

Made by `bootstrap` where the profile `runpod` is on; elsewhere nothing stands in the way of a request.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from pilotlight.core.rate_limits import OperationGroup
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import Outcome
from pilotlight.gateway.asgi import Headers, Receive, Scope, Send, send_json
from pilotlight.gateway.directory import Directory, secret_of
from pilotlight.gateway.errors import RateLimitedError
from pilotlight.gateway.jobs.rates import RateTable
from pilotlight.gateway.refusal import RequestRefusedError


def count_in(
    rates: RateTable, endpoint: Endpoint, key: ApiKey, *, outcome: Outcome = Outcome.REJECTED
) -> AbstractContextManager[None]:
    """Count a call until what this returns, which has been entered, is left.

    Args:
        rates: Counts.
        endpoint: Whom it calls.
        key: Whose it is.
        outcome: What the request log says of one that is over the limit.

    Raises:
        RequestRefusedError: It is, and was not counted.
    """
    admission = rates.admitted(OperationGroup.OPENAI, endpoint, key)
    try:
        admission.__enter__()
    except RateLimitedError as error:
        raise RequestRefusedError(
            429, str(error), retry_after_s=error.retry_after_s, outcome=outcome
        ) from error
    return admission


class _Road(Protocol):
    """What serves the OpenAI routes of an endpoint."""

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, *, endpoint_id: str, path: str
    ) -> None:
        """Serve one request (ASGI)."""
        ...


class LimitedOpenAI:
    """Serves what is within the limit, and answers 429 to the rest.

    Args:
        road: Serves.
        rates: Counts.
        directory: Endpoints and keys.
    """

    def __init__(self, road: _Road, rates: RateTable, directory: Directory) -> None:
        self._road = road
        self._rates = rates
        self._directory = directory

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, *, endpoint_id: str, path: str
    ) -> None:
        """Serve one request (ASGI); a caller who may not call is left to the road, which says so."""
        key = self._directory.key(secret_of(Headers(scope["headers"])))
        endpoint = self._directory.endpoint(endpoint_id)
        if key is None or endpoint is None or not key.may_call(endpoint.id):
            await self._road(scope, receive, send, endpoint_id=endpoint_id, path=path)
            return
        try:
            with self._rates.admitted(OperationGroup.OPENAI, endpoint, key):
                await self._road(scope, receive, send, endpoint_id=endpoint_id, path=path)
        except RateLimitedError as error:
            refusal = RequestRefusedError(429, str(error), retry_after_s=error.retry_after_s)
            anthropic = path.startswith("/v1/messages")
            body = refusal.anthropic_body() if anthropic else refusal.body()
            await send_json(send, refusal.status, body, refusal.headers)
