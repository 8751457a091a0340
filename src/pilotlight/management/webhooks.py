"""Routes about webhooks below `/pilotlight/v1`: secrets of endpoints, and deliveries that were given up."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from pydantic import BaseModel

from pilotlight.core.webhooks import revived
from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.errors import ConflictError
from pilotlight.management.routes import BEARER, PREFIX, PROBLEMS, EndpointFilter, Limit
from pilotlight.management.service import EndpointService
from pilotlight.management.views import timestamp
from pilotlight.ports.clock import Clock
from pilotlight.ports.store import WebhookStore


class WebhookSecret(BaseModel):
    """What signs an endpoint's webhooks."""

    endpoint_id: str
    secret: str


class WebhookView(BaseModel):
    """A delivery, without its body."""

    id: str
    job_id: str
    endpoint_id: str
    url: str
    bytes: int
    tries: int
    last_status: int | None
    last_error: str
    created_at: str
    next_at: str | None


class WebhookList(BaseModel):
    """Deliveries."""

    webhooks: list[WebhookView]


class WebhookDesk:
    """What an operator may ask of webhooks.

    Args:
        store: Deliveries.
        clock: Time.
        secret: The webhook secret of an endpoint.
        wake: Tells the sender that something is due.
    """

    def __init__(
        self,
        *,
        store: WebhookStore,
        clock: Clock,
        secret: Callable[[str], str],
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._wake = wake
        self.secret = secret

    async def dead(self, *, endpoint_id: str | None, limit: int) -> list[WebhookView]:
        """Dead letters, newest first."""
        found = await self._store.dead_webhooks(endpoint_id=endpoint_id, limit=limit)
        return [_view(delivery) for delivery in found]

    async def resend(self, delivery_id: str) -> WebhookView:
        """Make a dead letter due, with all its tries.

        Raises:
            NotFoundError: No such delivery.
            ConflictError: It is not a dead letter, or has lost its body.
        """
        dead = await self._dead(delivery_id)
        if not dead.body:
            raise ConflictError(f"webhook {delivery_id} cannot be sent again: its body is not kept any more")
        again = revived(dead, now_ms=self._clock.now_ms())
        await self._store.put_webhook(again)
        self._wake()
        return _view(again)

    async def remove(self, delivery_id: str) -> None:
        """Forget a dead letter. Errors as `resend`."""
        await self._dead(delivery_id)
        await self._store.delete_webhook(delivery_id)

    async def _dead(self, delivery_id: str) -> WebhookDelivery:
        delivery = await self._store.webhook(delivery_id)
        if delivery.next_ms is not None:
            raise ConflictError(
                f"webhook {delivery_id} is not a dead letter: it is still being sent by itself"
            )
        return delivery


def webhook_routes(service: EndpointService, desk: WebhookDesk) -> APIRouter:
    """Routes that show webhook secrets and deal with dead letters."""
    router = APIRouter(prefix=PREFIX, tags=["webhooks"], dependencies=[Depends(BEARER)], responses=PROBLEMS)

    @router.get("/endpoints/{endpoint_id}/webhook-secret")
    async def read_webhook_secret(endpoint_id: str) -> WebhookSecret:
        """The secret with which an endpoint's webhooks are signed."""
        found = service.endpoint(endpoint_id)
        return WebhookSecret(endpoint_id=found.id, secret=desk.secret(found.id))

    @router.get("/webhooks/dead")
    async def list_dead_webhooks(endpoint: EndpointFilter = None, limit: Limit = 100) -> WebhookList:
        """Webhooks that could not be delivered, newest first; the latest 1,000 are kept."""
        return WebhookList(webhooks=await desk.dead(endpoint_id=endpoint, limit=limit))

    @router.post("/webhooks/{webhook_id}/resend")
    async def resend_webhook(webhook_id: str) -> WebhookView:
        """Send a dead letter again, now, with all its tries and the same id."""
        return await desk.resend(webhook_id)

    @router.delete("/webhooks/{webhook_id}", status_code=204)
    async def remove_webhook(webhook_id: str) -> Response:
        """Forget a dead letter."""
        await desk.remove(webhook_id)
        return Response(status_code=204)

    return router


def _view(delivery: WebhookDelivery) -> WebhookView:
    return WebhookView(
        id=delivery.id,
        job_id=delivery.job_id,
        endpoint_id=delivery.endpoint_id,
        url=delivery.url,
        bytes=_size(delivery),
        tries=delivery.tries,
        last_status=delivery.last_status,
        last_error=delivery.last_error,
        created_at=timestamp(delivery.created_ms),
        next_at=None if delivery.next_ms is None else timestamp(delivery.next_ms),
    )


def _size(delivery: WebhookDelivery) -> int:
    return len(delivery.body) if delivery.size is None else delivery.size
