"""Routes below `/pilotlight/v1`: what RunPod's APIs cannot say, and what the CLI and the console read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Protocol

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer

import pilotlight
from pilotlight.domain.key import Scope
from pilotlight.errors import EngineEnvironmentError
from pilotlight.management import views
from pilotlight.management.checks import Progress
from pilotlight.management.key_schemas import CreateKey, KeyList, KeyView, NewKeyView, UpdateKey
from pilotlight.management.keys import KeyService
from pilotlight.management.ndjson import MEDIA_TYPE, progress_lines, wants_ndjson
from pilotlight.management.schemas import (
    CreateEndpoint,
    EndpointList,
    EndpointView,
    Problem,
    RequestList,
    ReviseEndpoint,
    StartList,
    StatusView,
    UsageView,
)
from pilotlight.management.service import EndpointService, no_progress
from pilotlight.ports.store import RequestLog, StartLog, UsageStore

PREFIX = "/pilotlight/v1"

Limit = Annotated[int, Query(ge=1, le=1000)]
Since = Annotated[int, Query(ge=0)]
EndpointFilter = Annotated[str | None, Query(max_length=64)]

# Checked by the guard before the application is asked; named here for the generated description.
BEARER = HTTPBearer(auto_error=False, description="An admin key.")
PROBLEMS: dict[int | str, dict[str, object]] = {
    status: {"model": Problem} for status in (401, 403, 404, 409, 422, 503)
}


class RecordStore(StartLog, UsageStore, RequestLog, Protocol):
    """What is recorded of the past."""


def endpoint_routes(service: EndpointService) -> APIRouter:
    """Routes that make, change and read endpoints."""
    router = APIRouter(prefix=PREFIX, tags=["endpoints"], dependencies=[Depends(BEARER)], responses=PROBLEMS)

    @router.post("/endpoints", status_code=201, response_model=EndpointView)
    async def create_endpoint(request: Request, body: CreateEndpoint) -> Response:
        """Make an endpoint; with `Accept: application/x-ndjson` progress is told line by line."""

        async def work(progress: Progress) -> EndpointView:
            return service.view(await service.create(body, progress))

        return await _answer(request, work, 201)

    @router.patch("/endpoints/{endpoint_id}", response_model=EndpointView)
    async def revise_endpoint(request: Request, endpoint_id: str, body: ReviseEndpoint) -> Response:
        """Change what is sent; what its workers run makes a new revision."""

        async def work(progress: Progress) -> EndpointView:
            return service.view(await service.revise(endpoint_id, body, progress))

        return await _answer(request, work, 200)

    @router.get("/endpoints")
    async def list_endpoints() -> EndpointList:
        """All endpoints, oldest first."""
        return EndpointList(endpoints=[service.view(endpoint) for endpoint in service.endpoints()])

    @router.get("/endpoints/{endpoint_id}")
    async def read_endpoint(endpoint_id: str) -> EndpointView:
        """One endpoint."""
        return service.view(service.endpoint(endpoint_id))

    return router


def key_routes(keys: KeyService) -> APIRouter:
    """Routes that make, list, change and forget keys."""
    router = APIRouter(prefix=PREFIX, tags=["keys"], dependencies=[Depends(BEARER)], responses=PROBLEMS)

    @router.get("/keys")
    async def list_keys() -> KeyList:
        """All keys, without their secrets."""
        return KeyList(keys=[views.key_view(key) for key in await keys.keys()])

    @router.post("/keys", status_code=201)
    async def create_key(body: CreateKey) -> NewKeyView:
        """A new key; its secret is in this answer and nowhere else."""
        key, secret = await keys.create(
            name=body.name,
            scope=Scope(body.scope),
            endpoint_ids=body.endpoints,
            terms=body.terms(),
        )
        return NewKeyView(**views.key_view(key).model_dump(), key=secret)

    @router.patch("/keys/{key_id}")
    async def update_key(key_id: str, body: UpdateKey) -> KeyView:
        """A key with another name, priority or limits, which count from now on."""
        return views.key_view(await keys.update(key_id, body.changes()))

    @router.delete("/keys/{key_id}", status_code=204)
    async def delete_key(key_id: str) -> Response:
        """Forget a key; it is refused from now on."""
        await keys.delete(key_id)
        return Response(status_code=204)

    return router


def record_routes(service: EndpointService, records: RecordStore, *, home: str) -> APIRouter:
    """Routes that read what has happened, and how the installation is."""
    router = APIRouter(prefix=PREFIX, tags=["records"], dependencies=[Depends(BEARER)], responses=PROBLEMS)

    @router.get("/endpoints/{endpoint_id}/starts")
    async def list_starts(endpoint_id: str, limit: Limit = 50) -> StartList:
        """Starts of an endpoint's workers, newest first, stage by stage, and why some failed."""
        service.endpoint(endpoint_id)
        starts = await records.starts(endpoint_id=endpoint_id, limit=limit)
        return StartList(starts=[views.start_view(record) for record in starts])

    @router.get("/usage")
    async def read_usage(endpoint: EndpointFilter = None, since_ms: Since = 0) -> UsageView:
        """Usage intervals that end after a moment, and their sums by endpoint and state."""
        return views.usage_view(await records.usage(endpoint_id=endpoint, since_ms=since_ms))

    @router.get("/requests")
    async def list_requests(endpoint: EndpointFilter = None, limit: Limit = 100) -> RequestList:
        """The request log, newest first."""
        rows = await records.requests(endpoint_id=endpoint, limit=limit)
        return RequestList(requests=[views.request_view(row) for row in rows])

    @router.get("/status")
    async def read_status() -> StatusView:
        """The installation at a glance."""
        endpoints = service.endpoints()
        try:
            manifest = await service.manifest()
            engine: dict[str, object] = {
                "version": manifest.version,
                "platform": manifest.platform,
                "home": str(service.engine_home),
            }
        except EngineEnvironmentError as error:
            engine = {"problem": str(error)}
        return StatusView(
            version=pilotlight.__version__,
            url=service.base_url(),
            home=home,
            engine=engine,
            host=views.host_view(await service.host()),
            endpoints=len(endpoints),
            workers=sum(len(service.workers(endpoint.id)) for endpoint in endpoints),
        )

    return router


async def _answer(
    request: Request, work: Callable[[Progress], Awaitable[EndpointView]], status: int
) -> Response:
    if wants_ndjson(request.headers.get("accept", "")):
        return StreamingResponse(
            progress_lines(work),
            media_type=MEDIA_TYPE,
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    view = await work(no_progress)
    return JSONResponse(view.model_dump(mode="json"), status_code=status)
