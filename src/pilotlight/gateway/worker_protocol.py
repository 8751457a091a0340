"""The HTTP protocol of workers (worker-protocol.md), and the state URL of our own worker program.

Whatever the worker's library cannot survive is avoided here: a quick empty answer or refusal makes it ask
thousands of times a second, so takes are held and only 429 refuses, which is held, too; an answer of 4xx to a
result loses the result, so posts are answered 200 unless the caller is not the worker it says it is, and 503
when their body does not arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import msgspec
import structlog

from pilotlight.domain.job import Job
from pilotlight.domain.worker import (
    Address,
    DownloadProgress,
    Failure,
    Registration,
    Stage,
    Worker,
)
from pilotlight.errors import InvalidInputError, PilotlightError
from pilotlight.gateway.asgi import Response
from pilotlight.gateway.errors import (
    BodyTimeoutError,
    PayloadTooLargeError,
    UnauthorizedError,
    native_error,
)
from pilotlight.gateway.jobs.desk import WorkerDesk
from pilotlight.gateway.jobs.http import Call, Operation, SegmentRoute, json_answer
from pilotlight.gateway.jobs.service import JobService
from pilotlight.gateway.jobs.submission import parse_number
from pilotlight.gateway.jobs.views import taken_view
from pilotlight.ports.fleet import Fleet, StageReport
from pilotlight.settings import LimitSettings

_log = structlog.get_logger()

_BATCH_MAX = 1000
"""Jobs in one answer; arbitrary, above the concurrency of any engine."""

_REFUSED_HOLD_S = 5.0
_REFUSED_MAX = 256
"""Refused calls are held, so that they cannot become a storm, but not more than this many: libraries before
1.7 ask again at once even after 429 (worker-protocol.md §11)."""

_CLOSING_HOLD_S = 1.0
"""Hold of takes while the gateway stops: longer would delay the exit of workers, and of the gateway."""

_POST_BODY_S = 600.0
"""How long the body of a result may take: as long as the library itself waits (worker-protocol.md §3.4)."""

_JOB_IDS_COMPLETE = 60_000
"""The library cuts a heartbeat's list at 64 KiB; a longer one may be incomplete (§3.6)."""

_STATE_BODY_MAX = 64 * 1024

_GET = frozenset({"GET"})
_POST = frozenset({"POST"})


class _Server(msgspec.Struct):
    address: str
    key: str = ""


class _State(msgspec.Struct):
    """Body of a stage report."""

    stage: Stage
    detail: dict[str, object] | None = None
    engine: _Server | None = None
    listener: _Server | None = None
    models: list[str] = []
    max_concurrency: int = 1
    versions: dict[str, str] = {}


class _Item(msgspec.Struct, rename="camel"):
    """One result in the body of `job-done-batch`."""

    id: str
    body: msgspec.Raw
    is_stream: bool = False


class _ItemAnswer(msgspec.Struct, omit_defaults=True):
    id: str
    status: int
    error: str | None = None


_states = msgspec.json.Decoder(_State)
_lists = msgspec.json.Decoder(list[msgspec.Raw])
_items = msgspec.json.Decoder(_Item)


def worker_routes(service: JobService, fleet: Fleet, *, limits: LimitSettings) -> list[SegmentRoute]:
    """Routes for workers.

    Args:
        service: Jobs.
        fleet: Who is a worker, and takes their stage reports.
        limits: Sizes of bodies.
    """
    api = _WorkerApi(service, fleet, limits)
    table = {
        path: Operation(methods, partial(api.post, handler) if methods == _POST else partial(handler, api))
        for path, (methods, handler) in _OPERATIONS.items()
    }
    return [
        SegmentRoute(table),
        SegmentRoute(
            {("", 1): Operation(_POST, api.state)},
            prefix=("pilotlight", "v1", "worker-state"),
            verbless=True,
        ),
    ]


class _WorkerApi:
    def __init__(self, service: JobService, fleet: Fleet, limits: LimitSettings) -> None:
        self._service = service
        self._desk: WorkerDesk = service.workers
        self._fleet = fleet
        self._limits = limits
        self._refused = 0

    async def take(self, call: Call) -> Response:
        return await self._take(call, count=1, single=True)

    async def take_batch(self, call: Call) -> Response:
        size = call.query.get("batch_size", "1")
        count = int(size) if size.isascii() and size.isdigit() and len(size) < 10 else 1
        return await self._take(call, count=max(1, min(_BATCH_MAX, count)), single=False)

    async def _take(self, call: Call, *, count: int, single: bool) -> Response:
        worker = self._worker(call)
        if worker is None:
            return await self._refuse(call, "unauthorized")
        if self._service.closing:
            # Not 429: the pause that follows it is longer than the grace of workers that end with us (§6.3).
            await _hold(call, _CLOSING_HOLD_S)
            return Response(status_code=204)
        try:
            async with call.client_gone() as gone:
                jobs = await self._desk.take(
                    worker,
                    count=count,
                    holding=call.query.get("job_in_progress") != "0",
                    gone=gone,
                    connection=call.connection,
                )
        except PilotlightError as error:
            # Anything but 429 would make the worker ask again at once (§9).
            _log.warning("take_refused", worker_id=worker.id, error=str(error))
            return await self._refuse(call, str(error))
        except Exception:  # noqa: BLE001 - a defect of ours must not become a storm of takes
            _log.exception("take_failed", worker_id=worker.id)
            return await self._refuse(call, "internal server error")
        return json_answer(taken_view(jobs, single=single)) if jobs else Response(status_code=204)

    async def stop(self, call: Call) -> Response:
        worker = self._worker(call)
        if worker is None:
            return await self._refuse(call, "unauthorized")
        async with call.client_gone() as gone:
            ids = await self._desk.stop_poll(worker, gone=gone)
        if not ids:
            return Response(status_code=204)
        return json_answer(msgspec.json.encode({"jobsToStop": ids}))

    async def ping(self, call: Call) -> Response:
        worker = self._worker(call)
        if worker is None:
            raise UnauthorizedError
        query = call.query
        if query.get("status") == "unhealthy":
            await self._desk.unhealthy(
                worker, check=query.get("check", "")[:100], reason=query.get("reason", "")[:256]
            )
            return json_answer(b"{}")
        listed = query.get("job_id", "")
        job_ids = [job_id for job_id in listed.split(",") if job_id]
        await self._desk.ping(
            worker,
            job_ids,
            complete=len(listed) < _JOB_IDS_COMPLETE,
            library=query.get("runpod_version", "")[:100],
        )
        return json_answer(b"{}")

    async def post(self, handler: Callable[[_WorkerApi, Call], Awaitable[Response]], call: Call) -> Response:
        """Take a post, whose body may be slow: 503, as the library tries again after nothing else (§3.4)."""
        try:
            return await handler(self, call)
        except BodyTimeoutError as error:
            _log.warning("post_too_slow", worker_id=call.ids[0][:100], error=str(error))
            return native_error(503, str(error))

    async def done(self, call: Call) -> Response:
        worker, job_id = self._poster(call), call.ids[1]
        link = self._desk.link(worker) if worker is not None else None
        if worker is not None and link is not None:
            with link.posting(job_id):
                body, size = await self._body(call)
                final_stream = call.query.get("isStream") == "true"
                await self._desk.result(worker, job_id, body, size, final_stream=final_stream)
        return json_answer(b"{}")

    async def done_batch(self, call: Call) -> Response:
        """Many `job-done` posts in one: an addition of ours, which only our worker program uses.

        The body is a list of `{"id", "isStream", "body"}`; the answer has one `{"id", "status"}` for each,
        in the same order, with the status that `job-done` would have answered. With `take=N` in the query it
        is `{"results": […], "jobs": […]}`: that list, and up to N jobs as `job-take-batch` hands them out.
        """
        worker = self._poster(call)
        if worker is None:
            # Not even read, as nobody knows who it is from: posted one by one, each is answered 200.
            return json_answer(b"[]")
        link = self._desk.link(worker)
        with link.receiving() if link is not None else contextlib.nullcontext():
            body, _ = await self._body(call)
        if body is None:
            limit = self._limits.worker_body_bytes
            raise PayloadTooLargeError(f"a list of results may have {limit} bytes; post them one by one")
        answers, items = parse_done_batch(body)
        count = parse_number("take", call.query.get("take"), default=-1, lowest=0, highest=_BATCH_MAX)
        jobs: Sequence[Job] = []
        if link is not None:
            with link.posting_all([job_id for job_id, _, _ in items]):
                if count > 0:
                    jobs = await self._results_and_take(call, worker, items, count)
                else:
                    await self._desk.results(worker, items)
        if count < 0:
            return json_answer(msgspec.json.encode(answers))
        view = {"results": answers, "jobs": msgspec.Raw(taken_view(jobs, single=False))}
        return json_answer(msgspec.json.encode(view))

    async def _results_and_take(
        self, call: Call, worker: Worker, items: Sequence[tuple[str, bytes, bool]], count: int
    ) -> Sequence[Job]:
        async with call.client_gone() as gone:
            return await self._desk.results_and_take(
                worker, items, count=count, gone=gone, connection=call.connection
            )

    async def stream(self, call: Call) -> Response:
        worker, job_id = self._poster(call), call.ids[1]
        link = self._desk.link(worker) if worker is not None else None
        if worker is not None and link is not None:
            with link.posting(job_id):
                body, size = await self._body(call)
                number = call.query.get("seq", "")
                sequence = int(number) if number.isascii() and number.isdigit() and len(number) < 10 else None
                await self._desk.chunk(worker, job_id, body, size, sequence=sequence)
        return json_answer(b"{}")

    async def state(self, call: Call) -> Response:
        worker = self._worker(call)
        if worker is None:
            if self._fleet.worker(call.ids[0]) is None:
                return native_error(410, "this worker has ended or was never started")
            raise UnauthorizedError
        body, _ = await call.body(limit=_STATE_BODY_MAX)
        if body is None:
            raise PayloadTooLargeError(f"a stage report may have {_STATE_BODY_MAX} bytes")
        await self._fleet.reported(worker.id, parse_state(body))
        # A worker that registers brings slots.
        self._service.slots_freed(worker.endpoint_id)
        return json_answer(b"{}")

    async def _body(self, call: Call) -> tuple[bytes | None, int]:
        return await call.body(limit=self._limits.worker_body_bytes, within_s=_POST_BODY_S)

    def _worker(self, call: Call) -> Worker | None:
        worker_id = call.ids[0]
        worker = self._fleet.authenticate(call.endpoint_id, worker_id, call.secret_hash)
        if worker is None:
            self._warn_of_key(worker_id)
        return worker

    def _poster(self, call: Call) -> Worker | None:
        """Who posts; None for a worker that has ended, whose posts are late: 200 and no more (§7.2, §14)."""
        worker = self._worker(call)
        if worker is not None:
            return worker
        if self._fleet.worker(call.ids[0]) is not None:
            raise UnauthorizedError
        _log.info("late_post", worker_id=call.ids[0][:100], reason="its worker has ended")
        return None

    def _warn_of_key(self, worker_id: str) -> None:
        """Tell the operator, once per worker, that a living worker is refused."""
        living = self._fleet.worker(worker_id)
        link = self._desk.link(living) if living else None
        if link is not None and not link.key_warned:
            link.key_warned = True
            _log.warning(
                "worker_key_refused",
                worker_id=worker_id,
                endpoint_id=link.endpoint_id,
                advice="a file ~/.runpod/config.toml in the worker's image replaces its key; remove it",
            )

    async def _refuse(self, call: Call, why: str) -> Response:
        # Only 429 slows a worker down, and it comes from dead workers' orphans, too (§8, §13).
        if self._refused < _REFUSED_MAX:
            self._refused += 1
            try:
                await _hold(call, _CLOSING_HOLD_S if self._service.closing else _REFUSED_HOLD_S)
            finally:
                self._refused -= 1
        return native_error(429, why, {"Retry-After": "5"})


async def _hold(call: Call, seconds: float) -> None:
    """Keep a call that will get nothing, until its client goes at most."""
    async with call.client_gone() as gone:
        await asyncio.wait({gone}, timeout=seconds)


_OPERATIONS: Mapping[
    tuple[str, int], tuple[frozenset[str], Callable[[_WorkerApi, Call], Awaitable[Response]]]
] = {
    ("job-take", 1): (_GET, _WorkerApi.take),
    ("job-take-batch", 1): (_GET, _WorkerApi.take_batch),
    ("job-stop", 1): (_GET, _WorkerApi.stop),
    ("ping", 1): (_GET, _WorkerApi.ping),
    ("job-done", 2): (_POST, _WorkerApi.done),
    ("job-done-batch", 1): (_POST, _WorkerApi.done_batch),
    ("job-stream", 2): (_POST, _WorkerApi.stream),
}

WORKER_OPERATIONS = frozenset(verb.encode() for verb, _ in _OPERATIONS)
"""What workers may call until the end of a gateway that stops: refusing a result would lose it."""


def parse_done_batch(body: bytes) -> tuple[list[_ItemAnswer], list[tuple[str, bytes, bool]]]:
    """Read the body of `job-done-batch`.

    Returns:
        The answer to each item, and (job id, body, `isStream`) of those that are well formed; one that is not
        does no harm to the others.

    Raises:
        InvalidInputError: Not a list, or too long.
    """
    try:
        raws = _lists.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidInputError("the body must be a JSON list of {id, isStream, body}") from error
    if len(raws) > _BATCH_MAX:
        raise InvalidInputError(f"a list may have {_BATCH_MAX} results, got {len(raws)}")
    answers, items = [], []
    for raw in raws:
        try:
            item = _items.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            answers.append(_ItemAnswer(id="", status=400, error=f"bad item: {error}"))
            continue
        if not item.id:
            answers.append(_ItemAnswer(id="", status=400, error="bad item: id must not be empty"))
            continue
        answers.append(_ItemAnswer(id=item.id, status=200))
        items.append((item.id, bytes(item.body), item.is_stream))
    return answers, items


def parse_state(body: bytes) -> StageReport:
    """Read a stage report.

    Raises:
        InvalidInputError: Names the field and what is legal.
    """
    try:
        state = _states.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInputError(f"bad stage report: {error}") from error
    if not 1 <= state.max_concurrency <= _BATCH_MAX:
        raise InvalidInputError(
            f"max_concurrency must be between 1 and {_BATCH_MAX}, got {state.max_concurrency}",
            field="max_concurrency",
        )
    detail = state.detail or {}
    failure = None
    if state.stage is Stage.FAILED:
        kind, cause, advice = (str(detail.get(name) or "") for name in ("kind", "cause", "advice"))
        failure = Failure(kind=kind or "unknown", cause=cause or "no cause given", advice=advice)
    registration = None
    if state.engine is not None:
        registration = Registration(
            engine=_address("engine", state.engine),
            listener=_address("listener", state.listener) if state.listener else None,
            models=tuple(state.models),
            max_concurrency=state.max_concurrency,
            versions=state.versions,
        )
    return StageReport(
        stage=state.stage,
        detail=detail,
        progress=_progress(detail) if state.stage is Stage.DOWNLOADING else None,
        failure=failure,
        registration=registration,
    )


def _progress(detail: Mapping[str, object]) -> DownloadProgress | None:
    done, total = detail.get("done_bytes"), detail.get("total_bytes")
    if not isinstance(done, int):
        return None
    return DownloadProgress(done_bytes=done, total_bytes=total if isinstance(total, int) else None)


def _address(name: str, server: _Server) -> Address:
    url = server.address
    if not (url.startswith(("unix:/", "http://")) and len(url) > len("http://")):
        raise InvalidInputError(
            f"{name}.address must be unix:/path or http://host:port, got {url[:100]!r}",
            field=f"{name}.address",
        )
    return Address(url=url, key=server.key)
