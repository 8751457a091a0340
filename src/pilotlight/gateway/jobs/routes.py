"""The job API: `/v2/{endpoint_id}/run` and its relatives (serverless-api.md §2)."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

import structlog

from pilotlight.core.rate_limits import OperationGroup
from pilotlight.core.worker_counts import count_workers, service_status
from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.domain.job import Job, JobStatus
from pilotlight.domain.key import ApiKey
from pilotlight.domain.worker import WorkerState
from pilotlight.errors import ConflictError, InvalidInputError, NotFoundError, StoreError
from pilotlight.gateway.asgi import Response
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.errors import (
    AccessDeniedError,
    QueueFullError,
    RateLimitedError,
    UnauthorizedError,
)
from pilotlight.gateway.jobs.http import Call, Handler, Operation, SegmentRoute, json_answer
from pilotlight.gateway.jobs.rates import RateTable
from pilotlight.gateway.jobs.service import JobService, Submitted
from pilotlight.gateway.jobs.submission import (
    NOT_FOR_QUEUES,
    WAIT_MS,
    parse_flag,
    parse_idempotency_key,
    parse_milliseconds,
    parse_number,
)
from pilotlight.gateway.jobs.views import (
    cancelled_view,
    decode_cursor,
    health_view,
    job_view,
    purged_view,
    replay_view,
    requests_view,
    stream_view,
    submitted_view,
    timeline_view,
)
from pilotlight.gateway.key_limits import KeyLimits
from pilotlight.gateway.slots import SlotTable
from pilotlight.ports.fleet import Fleet
from pilotlight.settings import LimitSettings

_log = structlog.get_logger()

_POST = frozenset({"POST"})
_GET = frozenset({"GET"})
_BOTH = frozenset({"GET", "POST"})

_WAIT_DEFAULT_MS = 90_000
_STREAM_WAIT_DEFAULT_MS = 8_000
"""Python's client gives up reading a stream answer after 10 s (serverless-api.md §2.8)."""

_TTL_MAX_MS = 604_800_000

_PAGE = (50, 100)
"""Jobs on a page of `/requests`: by default, and at most."""

_CURSOR_MAX = 2**31 - 1
"""No job has that many chunks: each takes at least a byte of `limits.stream_bytes`."""

_Serve = Callable[[Call, Endpoint, ApiKey], Awaitable[Response]]


def job_routes(
    service: JobService,
    directory: Directory,
    *,
    slots: SlotTable,
    fleet: Fleet,
    limits: LimitSettings,
    key_limits: KeyLimits,
) -> list[SegmentRoute]:
    """Routes for clients. Put them behind REST v2's own roots below `/v2/`, which they leave alone.

    Args:
        service: Jobs.
        directory: Endpoints and keys.
        slots: For `/health`.
        fleet: For `/health`.
        limits: Sizes of bodies.
        key_limits: What keys may ask for; submitting jobs counts.
    """
    api = _JobApi(service, slots, fleet, limits, key_limits)
    group = OperationGroup
    table: dict[tuple[str, int], tuple[frozenset[str], OperationGroup, _Serve]] = {
        ("run", 0): (_POST, group.RUN, api.run),
        ("runsync", 0): (_POST, group.RUNSYNC, api.runsync),
        ("run_sync", 0): (_POST, group.RUNSYNC, api.runsync),
        ("status", 1): (_BOTH, group.READ, api.status),
        ("status-sync", 1): (_BOTH, group.READ, api.status_sync),
        ("stream", 1): (_BOTH, group.READ, api.stream),
        ("cancel", 1): (_POST, group.CANCEL, api.cancel),
        ("retry", 1): (_POST, group.RETRY, api.retry),
        ("purge-queue", 0): (_POST, group.PURGE, api.purge),
        ("health", 0): (_GET, group.HEALTH, api.health),
        ("requests", 0): (_GET, group.REQUESTS, api.requests),
    }
    operations = {
        key: Operation(methods, admitted(group, serve, directory, service.rates))
        for key, (methods, group, serve) in table.items()
    }
    if service.rates is None:
        status = operations["status", 1]

        def at_once(call: Call) -> Response | None:
            endpoint, _ = authorize(call, directory)
            return api.status_at_hand(call, endpoint)

        operations["status", 1] = replace(status, at_once=at_once)
    return [SegmentRoute(operations)]


def admitted(group: OperationGroup, serve: _Serve, directory: Directory, rates: RateTable | None) -> Handler:
    """A handler that lets in who may: key, endpoint, kind of endpoint, and, with `rates`, how often."""
    for_queues = group is not OperationGroup.HEALTH

    async def handle(call: Call) -> Response:
        endpoint, key = authorize(call, directory, for_queues=for_queues)
        if rates is None:
            return await serve(call, endpoint, key)
        with rates.admitted(group, endpoint, key):
            return await serve(call, endpoint, key)

    return handle


def limited(
    group: OperationGroup, handler: Handler, directory: Directory, rates: RateTable | None
) -> Handler:
    """A handler that checks its caller itself, with the limit of its group in front where there is one."""
    if rates is None:
        return handler

    async def serve(call: Call, _: Endpoint, __: ApiKey) -> Response:
        return await handler(call)

    return admitted(group, serve, directory, rates)


def authorize(call: Call, directory: Directory, *, for_queues: bool = True) -> tuple[Endpoint, ApiKey]:
    """The endpoint and the key of a client's call (serverless-api.md §10, §12 item 43).

    Args:
        call: The request.
        directory: Endpoints and keys.
        for_queues: Whether it is a call that only endpoints with a queue answer (§2.14).

    Raises:
        UnauthorizedError: No key, or an unknown one.
        NotFoundError: No such endpoint.
        AccessDeniedError: The key is for other endpoints.
        InvalidInputError: The endpoint has no queue.
    """
    key = directory.key_of_hash(call.secret_hash)
    if key is None:
        raise UnauthorizedError
    endpoint = directory.endpoint(call.endpoint_id)
    if endpoint is None:
        raise NotFoundError("endpoint not found")
    if not key.may_call(endpoint.id):
        raise AccessDeniedError
    if for_queues and endpoint.kind is EndpointKind.LOAD_BALANCER:
        raise InvalidInputError(NOT_FOR_QUEUES)
    return endpoint, key


class _JobApi:
    def __init__(
        self,
        service: JobService,
        slots: SlotTable,
        fleet: Fleet,
        limits: LimitSettings,
        key_limits: KeyLimits,
    ) -> None:
        self._service = service
        self._slots = slots
        self._fleet = fleet
        self._limits = limits
        self._key_limits = key_limits

    async def run(self, call: Call, endpoint: Endpoint, key: ApiKey) -> Response:
        with self._counted(endpoint, key, sync=False):
            submitted = await self._submit(call, endpoint, key, sync=False)
        return json_answer(submitted_view(submitted.job), _headers(endpoint, submitted))

    async def runsync(self, call: Call, endpoint: Endpoint, key: ApiKey) -> Response:
        wait_ms = _wait(call, _WAIT_DEFAULT_MS)
        with self._counted(endpoint, key, sync=True):
            submitted = await self._submit(call, endpoint, key, sync=True)
            job = await self._result(call, submitted.job, wait_ms)
        return json_answer(job_view(job), _headers(endpoint, submitted))

    async def status(self, call: Call, endpoint: Endpoint, _: ApiKey) -> Response:
        (job_id,) = call.ids
        if not call.query:
            return json_answer(job_view(await self._service.job(endpoint.id, job_id)))
        with_timeline = parse_flag("timeline", call.query.get("timeline"))
        ttl_ms = parse_milliseconds("ttl", call.query.get("ttl"), default=-1, lowest=0, highest=_TTL_MAX_MS)
        if ttl_ms >= 0:
            await self._service.shorten(endpoint.id, job_id, ttl_ms=ttl_ms)
        job = await self._service.job(endpoint.id, job_id)
        if not with_timeline:
            return json_answer(job_view(job))
        return json_answer(timeline_view(job, await self._service.waiting(endpoint, job)))

    def status_at_hand(self, call: Call, endpoint: Endpoint) -> Response | None:
        """The status of a job that the store has at hand, which is most of those that are asked for."""
        job = None if call.query else self._service.job_at_hand(endpoint.id, call.ids[0])
        return None if job is None else json_answer(job_view(job))

    async def status_sync(self, call: Call, endpoint: Endpoint, _: ApiKey) -> Response:
        wait_ms = _wait(call, _WAIT_DEFAULT_MS)
        async with call.client_gone() as gone:
            job = await self._service.wait(endpoint.id, call.ids[0], timeout_s=wait_ms / 1000, gone=gone)
        return json_answer(job_view(job))

    async def stream(self, call: Call, endpoint: Endpoint, _: ApiKey) -> Response:
        (job_id,) = call.ids
        hold_s = _wait(call, _STREAM_WAIT_DEFAULT_MS) / 1000
        cursor = parse_number("cursor", call.query.get("cursor"), default=-1, lowest=0, highest=_CURSOR_MAX)
        async with call.client_gone() as gone:
            if cursor < 0:
                part = await self._service.streams.read(endpoint.id, job_id, hold_s=hold_s, gone=gone)
                return json_answer(stream_view(part.status, part.chunks))
            status, chunks, following = await self._service.streams.replay(
                endpoint.id, job_id, cursor=cursor, hold_s=hold_s, gone=gone
            )
        return json_answer(replay_view(status, chunks, following))

    async def cancel(self, call: Call, endpoint: Endpoint, _: ApiKey) -> Response:
        return json_answer(cancelled_view(await self._service.cancel(endpoint.id, call.ids[0])))

    async def retry(self, call: Call, endpoint: Endpoint, _: ApiKey) -> Response:
        job = await self._service.retry(endpoint, call.ids[0])
        return json_answer(submitted_view(job), _paused(endpoint))

    async def purge(self, _: Call, endpoint: Endpoint, __: ApiKey) -> Response:
        return json_answer(purged_view(await self._service.purge(endpoint.id)))

    async def requests(self, call: Call, endpoint: Endpoint, _: ApiKey) -> Response:
        default, most = _PAGE
        limit = parse_number("limit", call.query.get("limit"), default=default, lowest=1, highest=most)
        before = decode_cursor(call.query.get("cursor"))
        status = _status(call.query.get("status"))
        jobs, position = await self._service.jobs(endpoint.id, status=status, before=before, limit=limit)
        return json_answer(requests_view(jobs, position))

    async def health(self, _: Call, endpoint: Endpoint, __: ApiKey) -> Response:
        counts = await self._service.counts(endpoint.id)
        traffic = await self._slots.traffic(endpoint.id, overdue_before_ms=0)
        statuses, ready = [], 0
        for worker in self._fleet.workers(endpoint.id):
            slots = self._slots.worker(worker.id)
            status = service_status(worker, occupied=slots.occupied if slots else 0)
            statuses.append(status)
            ready += worker.state is WorkerState.READY and slots is not None and slots.free > 0
        health = self._fleet.health(endpoint.id)
        workers = count_workers(
            statuses, failed_starts=health.failures, throttled=health.throttled is not None
        )
        body = health_view(
            counts,
            held=traffic.held,
            in_flight=traffic.requests_in_flight,
            workers=workers,
            ready=ready,
        )
        return json_answer(body)

    @contextlib.contextmanager
    def _counted(self, endpoint: Endpoint, key: ApiKey, *, sync: bool) -> Iterator[None]:
        with contextlib.ExitStack() as counted:
            try:
                counted.enter_context(self._key_limits.admitted(key))
            except RateLimitedError:
                self._service.refused(endpoint.id, key, sync=sync, status=429)
                raise
            yield

    async def _submit(self, call: Call, endpoint: Endpoint, key: ApiKey, *, sync: bool) -> Submitted:
        limit = self._limits.body_bytes if sync else self._limits.run_body_bytes
        given_ms = _wait(call, 0) if sync else 0
        try:
            body = await call.whole_body(limit=limit)
            repeatable = parse_idempotency_key(call.headers.get(b"idempotency-key"))
            return await self._service.submit(
                endpoint, key, body, sync=sync, wait_ms=given_ms, idempotency_key=repeatable
            )
        except InvalidInputError:
            self._service.refused(endpoint.id, key, sync=sync, status=400)
            raise
        except ConflictError:
            self._service.refused(endpoint.id, key, sync=sync, status=409)
            raise
        except QueueFullError:
            self._service.refused(endpoint.id, key, sync=sync, status=429, full=True)
            raise

    async def _result(self, call: Call, job: Job, wait_ms: int) -> Job:
        """The job when it is terminal or the wait is over."""
        async with call.client_gone() as gone:
            try:
                return await self._service.wait(job.endpoint_id, job.id, timeout_s=wait_ms / 1000, gone=gone)
            except StoreError as error:
                # The job is in the queue: a 503 would make the caller submit it once more.
                _log.warning("wait_failed", job_id=job.id, error=str(error))
                return job


def _wait(call: Call, default: int) -> int:
    lowest, highest = WAIT_MS
    return parse_milliseconds("wait", call.query.get("wait"), default=default, lowest=lowest, highest=highest)


def _status(text: str | None) -> JobStatus | None:
    if text is None or text == "":
        return None
    try:
        return JobStatus(text)
    except ValueError as error:
        legal = ", ".join(JobStatus)
        raise InvalidInputError(
            f"status must be one of {legal}, got {text[:40]!r}", field="status"
        ) from error


def _headers(endpoint: Endpoint, submitted: Submitted) -> dict[str, str] | None:
    headers = _paused(endpoint)
    return {**(headers or {}), "Idempotency-Replayed": "true"} if submitted.replayed else headers


def _paused(endpoint: Endpoint) -> dict[str, str] | None:
    # Jobs of a paused endpoint queue until their time to live ends (serverless-api.md §12 item 40).
    return {"X-Endpoint-Paused": "1"} if endpoint.workers_max == 0 else None
