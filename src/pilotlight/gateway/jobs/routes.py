"""The job API: `/v2/{endpoint_id}/run` and its relatives (serverless-api.md §2)."""

from __future__ import annotations

from starlette.responses import Response
from starlette.routing import BaseRoute

from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.job import Job
from pilotlight.domain.key import ApiKey
from pilotlight.errors import InvalidInputError, NotFoundError
from pilotlight.gateway.directory import Directory, secret_of
from pilotlight.gateway.errors import (
    AccessDeniedError,
    PayloadTooLargeError,
    QueueFullError,
    UnauthorizedError,
)
from pilotlight.gateway.jobs.http import Call, Handler, Operation, SegmentRoute, json_answer
from pilotlight.gateway.jobs.service import JobService
from pilotlight.gateway.jobs.submission import WAIT_MS, parse_milliseconds
from pilotlight.gateway.jobs.views import cancelled_view, health_view, job_view, stream_view, submitted_view
from pilotlight.gateway.jobs.waiting import watched
from pilotlight.gateway.slots import SlotTable
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet
from pilotlight.settings import LimitSettings

_POST = frozenset({"POST"})
_GET = frozenset({"GET"})
_BOTH = frozenset({"GET", "POST"})

_WAIT_DEFAULT_MS = 90_000
_STREAM_WAIT_DEFAULT_MS = 8_000
"""Python's client gives up reading a stream answer after 10 s (serverless-api.md §2.8)."""

_TTL_MAX_MS = 604_800_000


def job_routes(
    service: JobService,
    directory: Directory,
    *,
    slots: SlotTable,
    fleet: Fleet,
    clock: Clock,
    limits: LimitSettings,
) -> list[BaseRoute]:
    """Routes for clients. Put them behind REST v2's own roots below `/v2/`, which they leave alone.

    Args:
        service: Jobs.
        directory: Endpoints and keys.
        slots: For `/health`.
        fleet: For `/health`.
        clock: Time.
        limits: Sizes of bodies.
    """
    api = _JobApi(service, directory, slots, fleet, clock, limits)
    table: dict[tuple[str, int], tuple[frozenset[str], Handler]] = {
        ("run", 0): (_POST, api.run),
        ("runsync", 0): (_POST, api.runsync),
        ("run_sync", 0): (_POST, api.runsync),
        ("status", 1): (_BOTH, api.status),
        ("status-sync", 1): (_BOTH, api.status_sync),
        ("stream", 1): (_BOTH, api.stream),
        ("cancel", 1): (_POST, api.cancel),
        ("health", 0): (_GET, api.health),
    }
    return [SegmentRoute({key: Operation(*value) for key, value in table.items()})]


def authorize(call: Call, directory: Directory) -> tuple[Endpoint, ApiKey]:
    """The endpoint and the key of a client's call (serverless-api.md §10, §12 item 43).

    Raises:
        UnauthorizedError: No key, or an unknown one.
        NotFoundError: No such endpoint.
        AccessDeniedError: The key is for other endpoints.
    """
    key = directory.key(secret_of(call.headers))
    if key is None:
        raise UnauthorizedError
    endpoint = directory.endpoint(call.endpoint_id)
    if endpoint is None:
        raise NotFoundError("endpoint not found")
    if not key.may_call(endpoint.id):
        raise AccessDeniedError
    return endpoint, key


class _JobApi:
    def __init__(
        self,
        service: JobService,
        directory: Directory,
        slots: SlotTable,
        fleet: Fleet,
        clock: Clock,
        limits: LimitSettings,
    ) -> None:
        self._service = service
        self._directory = directory
        self._slots = slots
        self._fleet = fleet
        self._clock = clock
        self._limits = limits

    async def run(self, call: Call) -> Response:
        endpoint, key = authorize(call, self._directory)
        job = await self._submit(call, endpoint, key, sync=False)
        return json_answer(submitted_view(job), _paused(endpoint))

    async def runsync(self, call: Call) -> Response:
        endpoint, key = authorize(call, self._directory)
        wait_ms = _wait(call, _WAIT_DEFAULT_MS)
        submitted = await self._submit(call, endpoint, key, sync=True)
        async with watched(call.receive) as gone:
            job = await self._service.wait(endpoint.id, submitted.id, timeout_s=wait_ms / 1000, gone=gone)
        return json_answer(job_view(job), _paused(endpoint))

    async def status(self, call: Call) -> Response:
        endpoint, _ = authorize(call, self._directory)
        ttl_ms = parse_milliseconds("ttl", call.query.get("ttl"), default=-1, lowest=0, highest=_TTL_MAX_MS)
        if ttl_ms >= 0:
            await self._service.shorten(endpoint.id, call.ids[0], ttl_ms=ttl_ms)
        return json_answer(job_view(await self._service.job(endpoint.id, call.ids[0])))

    async def status_sync(self, call: Call) -> Response:
        endpoint, _ = authorize(call, self._directory)
        wait_ms = _wait(call, _WAIT_DEFAULT_MS)
        async with watched(call.receive) as gone:
            job = await self._service.wait(endpoint.id, call.ids[0], timeout_s=wait_ms / 1000, gone=gone)
        return json_answer(job_view(job))

    async def stream(self, call: Call) -> Response:
        endpoint, _ = authorize(call, self._directory)
        wait_ms = _wait(call, _STREAM_WAIT_DEFAULT_MS)
        async with watched(call.receive) as gone:
            status, chunks = await self._service.stream(
                endpoint.id, call.ids[0], hold_s=wait_ms / 1000, gone=gone
            )
        return json_answer(stream_view(status, chunks))

    async def cancel(self, call: Call) -> Response:
        endpoint, _ = authorize(call, self._directory)
        return json_answer(cancelled_view(await self._service.cancel(endpoint.id, call.ids[0])))

    async def health(self, call: Call) -> Response:
        endpoint, _ = authorize(call, self._directory)
        counts = await self._service.counts(endpoint.id)
        traffic = await self._slots.traffic(endpoint.id, overdue_before_ms=0)
        workers = []
        for worker in self._fleet.workers(endpoint.id):
            slots = self._slots.worker(worker.id)
            workers.append((worker.state, slots.occupied if slots else 0, slots.free if slots else 0))
        health = self._fleet.health(endpoint.id)
        body = health_view(
            counts,
            held=traffic.held,
            in_flight=traffic.requests_in_flight,
            workers=workers,
            unhealthy=health.failures,
            throttled=health.throttled is not None,
        )
        return json_answer(body)

    async def _submit(self, call: Call, endpoint: Endpoint, key: ApiKey, *, sync: bool) -> Job:
        limit = self._limits.body_bytes if sync else self._limits.run_body_bytes
        given_ms = _wait(call, 0) if sync else 0
        try:
            body, _ = await call.body(limit=limit)
            if body is None:
                raise PayloadTooLargeError(f"request body exceeds {limit / 1_048_576:g} MB limit")
            return await self._service.submit(endpoint, key, body, sync=sync, wait_ms=given_ms)
        except InvalidInputError:
            self._service.refused(endpoint.id, key, sync=sync, status=400)
            raise
        except QueueFullError:
            self._service.refused(endpoint.id, key, sync=sync, status=429)
            raise


def _wait(call: Call, default: int) -> int:
    lowest, highest = WAIT_MS
    return parse_milliseconds("wait", call.query.get("wait"), default=default, lowest=lowest, highest=highest)


def _paused(endpoint: Endpoint) -> dict[str, str] | None:
    # Jobs of a paused endpoint queue until their time to live ends (serverless-api.md §12 item 40).
    return {"X-Endpoint-Paused": "1"} if endpoint.workers_max == 0 else None
