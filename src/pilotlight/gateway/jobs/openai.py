"""OpenAI routes of endpoints whose workers only take jobs (serverless-api.md §2.15, `/openai/{path…}`).

So it is with queue endpoints, and with those of vLLM on a gateway that follows, from which no engine can be
reached. The latter keep the rules of the data path: the same routes, the same list of models, token counts.

A bare ASGI callable like the data path, with the same refusals; each call becomes a synchronous job, whose
stream chunks are the answer's bytes. The client's going away cancels the job. Here, too, a stream that waits
gets comments for keys that ask for them: from the beginning where no worker is ready, else after a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import structlog

from pilotlight.core.openai_jobs import (
    Answer,
    Failure,
    failure_of,
    job_input,
    stream_text,
    wants_stream,
    whole_answer,
)
from pilotlight.core.openai_routes import RouteDecision, check_route, speaks_anthropic
from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.domain.job import Job, JobStatus
from pilotlight.domain.key import ApiKey
from pilotlight.errors import InvalidInputError, NotFoundError, StoreError
from pilotlight.gateway.asgi import ClientGoneError, Headers, Receive, Scope, Send, read_body, send_json
from pilotlight.gateway.body import BodyPlan, plan_body
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.errors import RETRY_AFTER_STORE_S, QueueFullError
from pilotlight.gateway.events import EventStream, TokenCount, data_event, error_event, stream_end
from pilotlight.gateway.heartbeats import STREAM_HEADERS, STREAMED_ROUTES, Heartbeats
from pilotlight.gateway.jobs.readers import StreamPart
from pilotlight.gateway.jobs.service import JobService
from pilotlight.gateway.jobs.submission import NOT_FOR_QUEUES, Submission, check_readable
from pilotlight.gateway.jobs.waiting import Gone, watched
from pilotlight.gateway.key_limits import KeyLimits
from pilotlight.gateway.openai_access import called_endpoint, caller_of, models_answer, route_refusal
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.refusal import RequestRefusedError, error_object
from pilotlight.settings import LimitSettings

_log = structlog.get_logger()

_WAIT_S = 300.0
"""How long a call that is not streamed waits for its job (§2.15)."""

_HOLD_S = 8.0
"""Length of one wait for stream chunks; the next follows at once."""


_PAUSED = "endpoint is paused (max workers 0)"
_RETRY_PAUSED_S = 10

_STOPPING = Failure(status=503, message="the gateway is stopping")
_LOST = Failure(status=502, message="the worker was lost after part of the answer had been sent")


class JobOpenAI:
    """ASGI callable for the OpenAI routes of one installation's job-only endpoints.

    Args:
        service: Jobs.
        directory: Endpoints and keys.
        limits: Bounds.
        outlook: Asked what callers that wait are told.
        key_limits: What keys may ask for.
    """

    def __init__(
        self,
        service: JobService,
        directory: Directory,
        limits: LimitSettings,
        outlook: Outlook,
        key_limits: KeyLimits,
    ) -> None:
        self._service = service
        self._directory = directory
        self._limits = limits
        self._outlook = outlook
        self._key_limits = key_limits

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, *, endpoint_id: str, path: str
    ) -> None:
        """Serve one request.

        Args:
            scope: The connection (ASGI).
            receive: Its incoming events.
            send: Takes its outgoing events.
            endpoint_id: From the path.
            path: What follows `/openai`, with the query, which only our own worker program gets.
        """
        route = path.partition("?")[0]
        try:
            await self._serve(scope, receive, send, endpoint_id, path)
        except RequestRefusedError as refusal:
            await _refuse(send, route, refusal)
        except ClientGoneError:
            return
        except Exception:  # noqa: BLE001 - the border: the client gets an answer, the log the error
            _log.exception("openai_job_failed", endpoint_id=endpoint_id)
            await _refuse(send, route, RequestRefusedError(500, "internal server error"))

    async def _serve(self, scope: Scope, receive: Receive, send: Send, endpoint_id: str, path: str) -> None:
        headers = Headers(scope["headers"])
        key = caller_of(self._directory, headers)
        endpoint = called_endpoint(self._directory, key, endpoint_id)
        if endpoint.kind is EndpointKind.LOAD_BALANCER:
            raise RequestRefusedError(400, NOT_FOR_QUEUES)
        decision = check_route(scope["method"], path) if endpoint.kind is EndpointKind.VLLM else None
        if decision is not None:
            if not decision.allowed:
                raise route_refusal(decision)
            if decision.path.startswith("/v1/models"):
                await send_json(send, 200, models_answer(endpoint, decision.path), [])
                return
            if endpoint.workers_max == 0:
                raise RequestRefusedError(503, _PAUSED, code="no_worker", retry_after_s=_RETRY_PAUSED_S)
        call = _plan(decision, path, await self._body(headers, receive))
        taken = self._key_limits.take(key, 0)
        if taken.refused is not None:
            raise taken.refused
        try:
            await self._call(scope, receive, send, endpoint, key, call)
        finally:
            self._key_limits.give_back(key, taken, None)

    async def _call(
        self, scope: Scope, receive: Receive, send: Send, endpoint: Endpoint, key: ApiKey, call: _Call
    ) -> None:
        job = await self._submit(endpoint, key, call)
        async with watched(scope, receive) as gone:
            answered = False
            try:
                if call.streamed:
                    heartbeats = self._heartbeats(endpoint, key, job, call, send)
                    await self._streamed(endpoint, job, call, _Reply(send, call.route, job, heartbeats), gone)
                else:
                    await self._whole(endpoint, job, send, gone)
                answered = True
            except StoreError as error:
                raise RequestRefusedError(503, str(error), retry_after_s=RETRY_AFTER_STORE_S) from error
            finally:
                # Nobody can ask for its result any more; one that has ended stays as it is.
                if gone.done() or not answered:
                    await self._cancel(endpoint, job)

    async def _submit(self, endpoint: Endpoint, key: ApiKey, call: _Call) -> Job:
        submission = Submission(input=call.input)
        try:
            return await self._service.enqueue(
                endpoint, key, submission, sync=True, wait_ms=int(_WAIT_S * 1000)
            )
        except InvalidInputError as error:
            raise RequestRefusedError(400, str(error)) from error
        except QueueFullError as error:
            raise RequestRefusedError(429, str(error), retry_after_s=error.retry_after_s) from error
        except StoreError as error:
            raise RequestRefusedError(503, str(error), retry_after_s=RETRY_AFTER_STORE_S) from error

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        content_type = headers.get(b"content-type").partition(b";")[0].strip().lower()
        if content_type.startswith(b"multipart/"):
            raise RequestRefusedError(
                400,
                "this endpoint's workers take jobs, which carry JSON; multipart bodies cannot be sent to it",
            )
        try:
            async with asyncio.timeout(self._limits.body_s):
                return await read_body(headers, receive, limit=self._limits.body_bytes)
        except TimeoutError as error:
            message = f"the request body did not arrive within {self._limits.body_s} s"
            raise RequestRefusedError(408, message) from error

    async def _whole(self, endpoint: Endpoint, job: Job, send: Send, gone: Gone) -> None:
        done = await self._service.wait(endpoint.id, job.id, timeout_s=_WAIT_S, gone=gone)
        if gone.done():
            return
        if not done.status.terminal:
            await self._cancel(endpoint, job)
            if self._service.closing:
                raise _refusal(_STOPPING)
            raise RequestRefusedError(504, f"no answer within {_WAIT_S:g} s; the job was cancelled")
        if done.status is not JobStatus.COMPLETED:
            raise _refusal(_failure(done))
        chunks: Sequence[bytes] = ()
        if done.output in {None, b"null", b"[]"}:
            chunks = (await self._service.streams.read(endpoint.id, job.id, hold_s=0)).chunks
        answer = whole_answer(done.output, chunks)
        await send_json(send, answer.status, answer.body, [_names(job)])

    def _heartbeats(
        self, endpoint: Endpoint, key: ApiKey, job: Job, call: _Call, send: Send
    ) -> Heartbeats | None:
        """The comments that a caller gets, under way; None where it gets none."""
        if key.heartbeat_s is None or call.route not in STREAMED_ROUTES:
            return None
        now = asyncio.get_running_loop().time
        since = now()

        def comment() -> bytes:
            current = self._directory.endpoint(endpoint.id) or endpoint
            return self._outlook.comment(current, int((now() - since) * 1000))

        heartbeats = Heartbeats(send, comment, period_s=key.heartbeat_s, headers=[_names(job)])
        # Whether it will have to wait is not known where workers are ready: they take it soon, or are busy.
        heartbeats.start(after_s=key.heartbeat_s if self._outlook.ready(endpoint.id) else 0)
        return heartbeats

    async def _streamed(self, endpoint: Endpoint, job: Job, call: _Call, reply: _Reply, gone: Gone) -> None:
        """The whole stream, whose last event tells of a fault of ours where its status cannot."""
        try:
            await self._stream(endpoint, job, call, reply, gone)
        except (RequestRefusedError, StoreError):
            raise
        except Exception:
            if not await reply.committed():
                raise
            _log.exception("openai_job_failed", endpoint_id=endpoint.id)
            await self._cancel(endpoint, job)
            await reply.fail(Failure(status=500, message="internal server error"))
        finally:
            await reply.committed()

    async def _stream(self, endpoint: Endpoint, job: Job, call: _Call, reply: _Reply, gone: Gone) -> None:
        events = EventStream(TokenCount(), hide_usage=True) if call.hide_usage else None
        begun_by = 0
        deadline = asyncio.get_running_loop().time() + self._limits.data_path_s
        while not gone.done():
            try:
                part = await self._service.streams.read(endpoint.id, job.id, hold_s=_HOLD_S, gone=gone)
            except NotFoundError:
                # Its time to live ended while it ran.
                part = StreamPart(JobStatus.TIMED_OUT, (), begun_by)
            except StoreError as error:
                if not await reply.committed():
                    raise
                await self._cancel(endpoint, job)
                await reply.fail(Failure(status=503, message=str(error)))
                return
            if reply.begun and (part.status is JobStatus.IN_QUEUE or part.attempt != begun_by):
                # What another worker would say does not go on from what was said.
                await self._cancel(endpoint, job)
                await reply.fail(_LOST)
                return
            if part.chunks and not reply.begun:
                begun_by = part.attempt
                await reply.begin()
            for chunk in part.chunks:
                data = stream_text(chunk)
                if events is not None:
                    data = events.feed(data)
                await reply.write(data)
            if part.status.terminal:
                if reply.begun and events is not None:
                    await reply.write(events.rest())
                await self._end(endpoint, job, reply)
                return
            if self._service.closing:
                await self._cancel(endpoint, job)
                await reply.fail(_STOPPING)
                return
            if asyncio.get_running_loop().time() > deadline:
                await self._cancel(endpoint, job)
                await reply.fail(Failure(status=504, message="the request took too long"))
                return

    async def _end(self, endpoint: Endpoint, job: Job, reply: _Reply) -> None:
        try:
            done = await self._service.job(endpoint.id, job.id)
        except NotFoundError:
            await reply.fail(Failure(status=504, message="the job's time to live is over"))
            return
        except StoreError as error:
            if not await reply.committed():
                raise
            await reply.fail(Failure(status=503, message=str(error)))
            return
        if done.status is not JobStatus.COMPLETED:
            await reply.fail(_failure(done))
        elif reply.begun:
            await reply.end(b"")
        else:
            # It yielded nothing and returned its answer, or an error object, as a whole.
            await reply.whole(whole_answer(done.output, ()))

    async def _cancel(self, endpoint: Endpoint, job: Job) -> None:
        try:
            await self._service.cancel(endpoint.id, job.id)
        except (NotFoundError, StoreError) as error:
            _log.info("abandoned_job_not_cancelled", job_id=job.id, error=str(error))


@dataclass(frozen=True, slots=True)
class _Call:
    """What becomes of a request.

    Attributes:
        route: Path of the engine's route.
        input: Of the job.
        streamed: Whether its stream chunks are the answer.
        hide_usage: Whether the usage in them was asked for by us alone.
    """

    route: str
    input: bytes
    streamed: bool
    hide_usage: bool = False


def _plan(decision: RouteDecision | None, path: str, body: bytes) -> _Call:
    """What becomes of a request; RequestRefusedError (400) for a body that no engine could read.

    Args:
        decision: What is known of the route; None where that is the worker's own business.
        path: As it was called.
        body: The request's.
    """
    try:
        if decision is None:
            route = path.partition("?")[0]
            streamed = bool(body) and wants_stream(body)
            check_readable(body)
            return _Call(route, job_input(route, body), streamed)
        check_readable(body)
        plan = plan_body(decision.path, body) if body else BodyPlan(b"")
    except (ValueError, InvalidInputError) as error:
        raise RequestRefusedError(400, str(error)) from error
    single = job_input(decision.target, plan.body, single_pieces=True)
    return _Call(decision.path, single, plan.stream, plan.hide_usage)


def _failure(job: Job) -> Failure:
    match job.status:
        case JobStatus.CANCELLED:
            return Failure(status=500, message="the job was cancelled")
        case JobStatus.TIMED_OUT:
            return Failure(status=504, message=job.error or "the job's time to live is over")
        case _:
            return failure_of(job.error or "the worker gave no reason")


def _refusal(failure: Failure) -> RequestRefusedError:
    return RequestRefusedError(failure.status, failure.message, type="worker_error")


class _Reply:
    """The answer to a call that asked for a stream, from its head to its end.

    Args:
        send: Takes the outgoing events (ASGI).
        route: Path of the engine's route.
        job: What the call became.
        heartbeats: Comments that go out until the answer begins; None for none.

    Attributes:
        begun: Whether the worker's words have begun.
    """

    __slots__ = ("_heartbeats", "_job", "_route", "_send", "begun")

    def __init__(self, send: Send, route: str, job: Job, heartbeats: Heartbeats | None) -> None:
        self._send = send
        self._route = route
        self._job = job
        self._heartbeats = heartbeats
        self.begun = False

    async def committed(self) -> bool:
        """Send no more comments; whether the status is out, and only an event can tell of a failure."""
        if self._heartbeats is not None:
            await self._heartbeats.stop()
        return self.begun or (self._heartbeats is not None and self._heartbeats.begun)

    async def begin(self) -> None:
        """Send the head where it has not been sent, and be ready for the worker's words."""
        if not await self.committed():
            headers = [*STREAM_HEADERS, _names(self._job)]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self.begun = True

    async def write(self, data: bytes) -> None:
        """Send a piece of the stream."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes) -> None:
        """Send the last piece of the stream."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def whole(self, answer: Answer) -> None:
        """Send an answer that is no stream."""
        if not await self.committed():
            await send_json(self._send, answer.status, answer.body, [_names(self._job)])
        elif answer.status < 400:
            await self.end(data_event(answer.body) + stream_end(self._route))
        else:
            body = error_object(self._route, answer.status, answer.body)
            await self.end(error_event(self._route, body) + stream_end(self._route))

    async def fail(self, failure: Failure) -> None:
        """Tell of a failure as the last event. RequestRefusedError while the status can tell it."""
        refusal = _refusal(failure)
        if not await self.committed():
            raise refusal
        # What was cut off does not get the end that whole streams have.
        end = b"" if self.begun else stream_end(self._route)
        await self.end(error_event(self._route, _body_of(refusal, self._route)) + end)


def _names(job: Job) -> tuple[bytes, bytes]:
    """The header that says which job an answer is of."""
    return b"x-job-id", job.id.encode()


async def _refuse(send: Send, route: str, refusal: RequestRefusedError) -> None:
    await send_json(send, refusal.status, _body_of(refusal, route), refusal.headers)


def _body_of(refusal: RequestRefusedError, route: str) -> bytes:
    if refusal.type == "worker_error" and not speaks_anthropic(route):
        # The error object that §2.15 gives for a failed job.
        return msgspec.json.encode({"error": {"message": str(refusal), "type": refusal.type, "code": None}})
    return refusal.body_for(route)
