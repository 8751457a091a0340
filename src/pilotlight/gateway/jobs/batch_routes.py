"""The batch API: `/v2/{endpoint_id}/batch…` (serverless-api.md §2.16)."""

from __future__ import annotations

import msgspec

from pilotlight.core.rate_limits import OperationGroup
from pilotlight.domain.batch import Batch, BatchDraft, BatchStatus
from pilotlight.domain.job import Job
from pilotlight.gateway.asgi import Response
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.errors import native_error
from pilotlight.gateway.jobs.batches import BatchService, RequestPage
from pilotlight.gateway.jobs.http import Call, Handler, Operation, SegmentRoute, json_answer
from pilotlight.gateway.jobs.rates import RateTable
from pilotlight.gateway.jobs.routes import authorize, limited
from pilotlight.gateway.jobs.submission import parse_number
from pilotlight.gateway.jobs.views import moment
from pilotlight.settings import LimitSettings

PAGE = (50, 100)
"""Requests on a page: by default, and at most."""


def batch_routes(
    service: BatchService, directory: Directory, *, limits: LimitSettings, rates: RateTable | None = None
) -> list[SegmentRoute]:
    """Routes for clients; they go beside the job routes.

    Args:
        service: Batches.
        directory: Endpoints and keys.
        limits: Sizes of bodies.
        rates: Counts requests where they are limited.
    """
    api = _BatchApi(service, directory, limits)
    table: dict[tuple[str, int], tuple[frozenset[str], Handler]] = {
        ("batch", 0): (frozenset({"GET", "POST"}), api.batches),
        ("batch", 1): (frozenset({"GET", "PUT"}), api.batch),
        ("batch", 2): (frozenset({"GET", "POST"}), api.part),
        ("batch", 3): (frozenset({"DELETE"}), api.request),
    }
    group = OperationGroup.BATCH
    return [
        SegmentRoute(
            {
                key: Operation(methods, limited(group, handler, directory, rates))
                for key, (methods, handler) in table.items()
            }
        )
    ]


class _BatchApi:
    def __init__(self, service: BatchService, directory: Directory, limits: LimitSettings) -> None:
        self._service = service
        self._directory = directory
        self._limits = limits

    async def batches(self, call: Call) -> Response:
        endpoint, key = authorize(call, self._directory)
        if call.method == "GET":
            batches = await self._service.batches(endpoint.id)
            return json_answer(msgspec.json.encode({"batches": [summary(batch) for batch in batches]}))
        batch = await self._service.create(endpoint, key, await self._body(call))
        return json_answer(msgspec.json.encode({"id": batch.id, "status": batch.status}))

    async def batch(self, call: Call) -> Response:
        endpoint, _ = authorize(call, self._directory)
        (batch_id,) = call.ids
        if call.method == "GET":
            return _summary(await self._service.batch(endpoint.id, batch_id))
        return _summary(await self._service.rename(endpoint.id, batch_id, await self._body(call)))

    async def part(self, call: Call) -> Response:
        endpoint, _ = authorize(call, self._directory)
        batch_id, part = call.ids
        match call.method, part:
            case "POST", "requests":
                return _summary(await self._service.append(endpoint, batch_id, await self._body(call)))
            case "GET", "requests":
                default, most = PAGE
                query = call.query
                offset = parse_number(
                    "offset", query.get("offset") or None, default=0, lowest=0, highest=2**53
                )
                limit = parse_number(
                    "limit", query.get("limit") or None, default=default, lowest=1, highest=most
                )
                page = await self._service.requests(endpoint.id, batch_id, offset=offset, limit=limit)
                return json_answer(_page(page))
            case "POST", "finalize":
                return _summary(await self._service.finalize(endpoint, batch_id))
            case "POST", "cancel":
                return _summary(await self._service.cancel(endpoint.id, batch_id))
            case _, "requests" | "finalize" | "cancel":
                return native_error(405, "method not allowed", {"Allow": "POST"})
            case _:
                return native_error(404, "not found")

    async def request(self, call: Call) -> Response:
        endpoint, _ = authorize(call, self._directory)
        batch_id, part, request_id = call.ids
        if part != "requests":
            return native_error(404, "not found")
        await self._service.remove(endpoint.id, batch_id, request_id)
        return json_answer(b"{}")

    async def _body(self, call: Call) -> bytes:
        return await call.whole_body(limit=self._limits.batch_body_bytes)


def summary(batch: Batch) -> dict[str, object]:
    """A batch as clients see it; `createdAt` is in milliseconds.

    A batch is done when completed and failed requests are all there are (serverless-api.md §2.16), so those
    that were cancelled one by one, or purged, count as failed; those of a cancelled batch do not.
    """
    dropped = batch.cancelled if batch.cancel_ms is None else 0
    return {
        "id": batch.id,
        "endpointId": batch.endpoint_id,
        "name": batch.name,
        "status": batch.status,
        "requestTotal": batch.total,
        "requestInProgress": batch.in_progress,
        "requestCompleted": batch.completed,
        "requestFailed": batch.failed + dropped,
        "createdAt": batch.created_ms,
    }


def _summary(batch: Batch) -> Response:
    return json_answer(msgspec.json.encode(summary(batch)))


def _page(page: RequestPage) -> bytes:
    return msgspec.json.encode(
        {
            "requests": [_request(each) for each in page.requests],
            "total": page.batch.total,
            "offset": page.offset,
            "limit": page.limit,
            "hasMore": page.has_more,
        }
    )


def _request(request: Job | BatchDraft) -> dict[str, object]:
    if isinstance(request, BatchDraft):
        return {"id": request.id, "status": BatchStatus.DRAFT}
    view: dict[str, object] = {"id": request.id, "status": request.status}
    if request.output is not None:
        view["output"] = msgspec.Raw(request.output)
    if request.error is not None:
        view["error"] = request.error
    if request.started_ms is not None:
        view["startedAt"] = moment(request.started_ms)
    if request.finished_ms is not None:
        view["completedAt"] = moment(request.finished_ms)
    return view
