"""REST v2 as far as endpoints of models need it (serverless-api.md §7.2 to §7.4).

List, read, delete, workers, logs; endpoints are made and changed by `/pilotlight/v1`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import Response, StreamingResponse

from pilotlight.errors import InvalidInputError
from pilotlight.management import views
from pilotlight.management.routes import BEARER, PROBLEMS
from pilotlight.management.service import EndpointService
from pilotlight.ports.clock import Clock
from pilotlight.ports.logs import LogLine, WorkerLogs

PREFIX = "/v2/serverless"

TAIL_MAX = 5000
KEEP_ALIVE_S = 15.0
"""A comment is sent into a silent log stream this often, so that proxies do not close it."""

_SOURCES = frozenset({"container", "system"})
_EVENT_ID = re.compile(r"(?P<moment>[^/]+?)(?:/(?P<sequence>\d{1,18}))?")


class SlotReader(Protocol):
    """Gives the slots of ready workers."""

    def worker(self, worker_id: str) -> views.SlotCount | None:
        """The slots of one worker; None when it is not ready or has ended."""
        ...


def serverless_routes(
    service: EndpointService, *, slots: SlotReader, logs: WorkerLogs, clock: Clock
) -> APIRouter:
    """The routes of REST v2 that exist so far."""
    router = APIRouter(prefix=PREFIX, tags=["serverless"], dependencies=[Depends(BEARER)], responses=PROBLEMS)
    cpus = os.cpu_count() or 1

    @router.get("")
    async def list_endpoints() -> dict[str, Any]:
        """All endpoints."""
        host = await service.host()
        base_url = service.base_url()
        return {
            "endpoints": [
                views.v2_endpoint(endpoint, base_url=base_url, cpus=cpus, host=host)
                for endpoint in service.endpoints()
            ]
        }

    @router.get("/{endpoint_id}")
    async def read_endpoint(endpoint_id: str) -> dict[str, Any]:
        """One endpoint."""
        endpoint = service.endpoint(endpoint_id)
        host = await service.host()
        return views.v2_endpoint(endpoint, base_url=service.base_url(), cpus=cpus, host=host)

    @router.delete("/{endpoint_id}", status_code=204)
    async def delete_endpoint(endpoint_id: str) -> Response:
        """Delete an endpoint, cancel its jobs, end its workers."""
        await service.delete(endpoint_id)
        return Response(status_code=204)

    @router.get("/{endpoint_id}/workers")
    async def list_workers(endpoint_id: str) -> dict[str, Any]:
        """The workers of an endpoint and how many of them are in which state."""
        endpoint = service.endpoint(endpoint_id)
        host = await service.host()
        workers = service.workers(endpoint_id)
        counts = {worker.id: count for worker in workers if (count := slots.worker(worker.id)) is not None}
        health = service.health(endpoint_id)
        return views.v2_workers(endpoint, workers, counts, health, now_ms=clock.now_ms(), host=host)

    @router.get("/{endpoint_id}/workers/{worker_id}/logs", response_class=StreamingResponse)
    async def read_logs(
        endpoint_id: str,
        worker_id: str,
        source: Annotated[list[str] | None, Query()] = None,
        tail: Annotated[int, Query(ge=0, le=TAIL_MAX)] = 100,
        since: Annotated[str | None, Query(max_length=64)] = None,
        follow: Annotated[bool, Query()] = True,
        last_event_id: Annotated[str | None, Header(max_length=128)] = None,
    ) -> StreamingResponse:
        """A worker's log as server-sent events; with `follow=false` only what is there now."""
        await service.worker(endpoint_id, worker_id)
        sources = _parse_sources(source)
        after, since_ms = _parse_position(last_event_id, since)
        backlog = await _backlog(logs, worker_id, tail=tail, after=after, since_ms=since_ms)
        return StreamingResponse(
            _events(logs, worker_id, backlog, after=after or 0, sources=sources, follow=follow),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    return router


async def _backlog(
    logs: WorkerLogs, worker_id: str, *, tail: int, after: int | None, since_ms: int | None
) -> list[LogLine]:
    if after is not None:
        lines = await logs.tail(worker_id, TAIL_MAX)
        return [line for line in lines if line.sequence > after]
    if since_ms is not None:
        return list(await logs.tail(worker_id, TAIL_MAX, since_ms=since_ms))
    # One line more than nothing tells where "new" begins.
    lines = await logs.tail(worker_id, max(1, tail))
    return list(lines) if tail else [_Unseen(lines[-1])] if lines else []


class _Unseen:
    """A line that marks a position and is not shown."""

    def __init__(self, line: LogLine) -> None:
        self.sequence = line.sequence
        self.ts_ms = line.ts_ms
        self.source = ""
        self.text = ""
        self.timestamp = line.timestamp
        self.id = line.id


async def _events(
    logs: WorkerLogs,
    worker_id: str,
    backlog: list[LogLine],
    *,
    after: int,
    sources: frozenset[str],
    follow: bool,
) -> AsyncIterator[bytes]:
    for line in backlog:
        after = max(after, line.sequence)
        if line.source in sources:
            yield _frame(line)
    if not follow:
        return
    lines = aiter(logs.follow(worker_id, after))
    pending: asyncio.Task[LogLine] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(_next(lines))
            done, _ = await asyncio.wait([pending], timeout=KEEP_ALIVE_S)
            if not done:
                yield b": keep-alive\n\n"
                continue
            try:
                line = pending.result()
            except StopAsyncIteration:
                return
            finally:
                pending = None
            if line.source in sources:
                yield _frame(line)
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.wait([pending])
        close = getattr(lines, "aclose", None)
        if close is not None:
            await close()


async def _next(lines: AsyncIterator[LogLine]) -> LogLine:
    return await anext(lines)


def _frame(line: LogLine) -> bytes:
    data = {"ts": line.timestamp, "source": str(line.source), "line": line.text}
    return f"id: {line.id}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _parse_sources(values: list[str] | None) -> frozenset[str]:
    named = {name.strip() for value in values or () for name in value.split(",") if name.strip()}
    unknown = named - _SOURCES
    if unknown:
        msg = f"source is {', '.join(sorted(unknown))!r}; legal are container and system"
        raise InvalidInputError(msg, field="source")
    return frozenset(named) or _SOURCES


def _parse_position(last_event_id: str | None, since: str | None) -> tuple[int | None, int | None]:
    """Where to begin: after a sequence number, or at a moment; both None for neither.

    `Last-Event-ID` overrides `since`; its id is a timestamp, optionally with `/sequence` (§7.4).
    """
    if last_event_id:
        found = _EVENT_ID.fullmatch(last_event_id.strip())
        if found is None:
            raise InvalidInputError(f"Last-Event-ID {last_event_id!r} is no timestamp[/sequence]")
        if found["sequence"]:
            return int(found["sequence"]), None
        return None, _parse_moment(found["moment"], "Last-Event-ID") + 1
    return None, _parse_moment(since, "since") if since else None


def _parse_moment(text: str, name: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        msg = f"{name} is {text!r}; legal is a time by RFC 3339, such as 2026-06-01T12:05:04Z"
        raise InvalidInputError(msg, field=name) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0, int(moment.timestamp() * 1000))
