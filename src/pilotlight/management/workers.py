"""The route that lists all living workers; REST v2 shows those only for which it has a status."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends

from pilotlight.management import views
from pilotlight.management.rest_v2 import SlotReader
from pilotlight.management.routes import BEARER, PREFIX, PROBLEMS
from pilotlight.management.service import EndpointService
from pilotlight.ports.clock import Clock


def worker_list_routes(service: EndpointService, *, slots: SlotReader, clock: Clock) -> APIRouter:
    """The route.

    Args:
        service: Endpoints and their workers.
        slots: Slots of ready workers.
        clock: Time.
    """
    router = APIRouter(prefix=PREFIX, tags=["endpoints"], dependencies=[Depends(BEARER)], responses=PROBLEMS)

    @router.get("/endpoints/{endpoint_id}/workers")
    async def list_living_workers(endpoint_id: str) -> dict[str, Any]:
        """All living workers of an endpoint, oldest first; `status` is null for frozen and leaving ones."""
        endpoint = service.endpoint(endpoint_id)
        host = await service.host()
        workers = service.workers(endpoint_id)
        counts = {worker.id: count for worker in workers if (count := slots.worker(worker.id)) is not None}
        return views.living_workers(endpoint, workers, counts, now_ms=clock.now_ms(), host=host)

    return router
