"""`PilotlightClient`: every call of the gateway that the command line needs, blocking, typed.

Errors of the gateway become `PilotlightError`s with the gateway's own words. A client may be shared by
threads. Loopback URLs never go through a proxy. All timeouts are explicit: short for questions, an hour where
the gateway holds a request while a worker starts.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self, cast
from urllib.parse import quote, urlsplit

import httpx

from pilotlight.client.discovery import Access, check_url
from pilotlight.client.errors import (
    AccessError,
    GatewayError,
    GatewayUnreachableError,
    StreamError,
    describe_problem,
    error_for,
    error_of,
)
from pilotlight.client.lines import ServerEvent, parse_events, split_lines
from pilotlight.client.models import (
    FINAL_STATES,
    Chunks,
    Endpoint,
    Job,
    Key,
    LogLine,
    Progress,
    Start,
    Usage,
    Worker,
)

CONNECT_S = 5.0
ANSWER_S = 30.0
"""Longest silence after an ordinary question."""
DEPLOY_S = 900.0
"""Longest silence while the gateway checks a model and fetches its weights."""
HELD_S = 3600.0
"""Longest silence of a request that may be held for a worker, or of a model that thinks."""
BACKLOG_S = 2.0
"""Silence after which the stored part of a log counts as read, where the gateway keeps the stream open."""
JOB_WAIT_MS_MAX = 300_000
JOB_WAIT_MS_MIN = 1_000
"""Range of `wait` on the job API (serverless-api.md §2.5)."""

Query = Mapping[str, str | int]


class PilotlightClient:
    """A connection to one gateway.

    Args:
        url: Base URL, such as `http://127.0.0.1:8400`.
        key: API key; None sends none, which the gateway will refuse.
        key_source: Where the key came from, for the message of a refused key.

    Raises:
        InvalidInputError: The URL cannot be used.
    """

    def __init__(self, url: str, key: str | None = None, *, key_source: str = "") -> None:
        check_url(url, "url")
        self.url = url.rstrip("/")
        self._key_source = key_source
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=_timeout(ANSWER_S),
            trust_env=not is_loopback(self.url),
            follow_redirects=False,
        )

    @classmethod
    def of(cls, access: Access) -> Self:
        """A client for what `find_access` found."""
        return cls(access.url, access.key, key_source=access.key_source)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; calls in other threads end with an error."""
        self._http.close()

    # --- endpoints ---

    def endpoints(self) -> list[Endpoint]:
        """Every endpoint."""
        return cast("list[Endpoint]", self._list("/pilotlight/v1/endpoints", "endpoints"))

    def endpoint(self, endpoint_id: str) -> Endpoint:
        """One endpoint.

        Raises:
            NotFoundError: There is none with this id.
        """
        return cast("Endpoint", self._json("GET", f"/pilotlight/v1/endpoints/{_part(endpoint_id)}"))

    def create_endpoint(
        self, spec: Mapping[str, Any], *, on_progress: Callable[[Progress], None] | None = None
    ) -> Endpoint:
        """A new endpoint; returns when its model is checked and its weights are here.

        Args:
            spec: `model` or `engine_url`, and any of the other fields.
            on_progress: Told where the work is.

        Raises:
            InvalidInputError: The model, a field or the machine's memory forbids it; nothing was stored.
            ConflictError: The name is taken.
        """
        return self._deploy("POST", "/pilotlight/v1/endpoints", spec, on_progress)

    def revise_endpoint(
        self,
        endpoint_id: str,
        changes: Mapping[str, Any],
        *,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Endpoint:
        """The endpoint after the changes; fields that are not named stay as they are.

        Raises:
            InvalidInputError: As for `create_endpoint`.
            NotFoundError: There is no such endpoint.
        """
        return self._deploy("PATCH", f"/pilotlight/v1/endpoints/{_part(endpoint_id)}", changes, on_progress)

    def delete_endpoint(self, endpoint_id: str) -> None:
        """Remove an endpoint with its workers and jobs (serverless-api.md §7.2)."""
        self._request("DELETE", f"/v2/serverless/{_part(endpoint_id)}")

    def workers(self, endpoint_id: str) -> list[Worker]:
        """The endpoint's workers (serverless-api.md §7.4)."""
        return cast("list[Worker]", self._list(f"/v2/serverless/{_part(endpoint_id)}/workers", "workers"))

    def starts(self, endpoint_id: str, *, limit: int = 20) -> list[Start]:
        """The endpoint's latest starts, stage by stage."""
        path = f"/pilotlight/v1/endpoints/{_part(endpoint_id)}/starts"
        return cast("list[Start]", self._list(path, "starts", {"limit": limit}))

    def worker_logs(
        self, endpoint_id: str, worker_id: str, *, tail: int = 100, follow: bool = False, after: str = ""
    ) -> Iterator[LogLine]:
        """Lines of a worker's log, oldest first.

        Args:
            endpoint_id: Whose worker it is.
            worker_id: The worker, living or ended.
            tail: How many stored lines to begin with, 0 to 5000.
            follow: Go on with new lines until the log ends. Without it the stream is left after the stored
                lines: when the gateway closes it, sends a comment, or is silent for two seconds.
            after: `id` of the last line read; wins over `tail`.

        Raises:
            NotFoundError: There is no such worker.
        """
        path = f"/v2/serverless/{_part(endpoint_id)}/workers/{_part(worker_id)}/logs"
        query: Query = {"tail": tail} if follow else {"tail": tail, "follow": "false"}
        headers = {"accept": "text/event-stream"} | ({"last-event-id": after} if after else {})
        with self._stream(
            "GET", path, query=query, headers=headers, read_s=HELD_S if follow else BACKLOG_S
        ) as response:
            try:
                for event in self._events(response, path):
                    if event.data:
                        yield _log_line(event.id, event.data)
                    elif not follow:
                        return
            except httpx.ReadTimeout:
                return

    def _events(self, response: httpx.Response, path: str) -> Iterator[ServerEvent]:
        try:
            yield from parse_events(response.iter_bytes())
        except httpx.ReadTimeout:
            raise
        except httpx.HTTPError as error:
            message = f"the connection to {self.url} broke during {path}: {error or type(error).__name__}"
            raise GatewayUnreachableError(message) from error

    # --- keys, usage, status ---

    def keys(self) -> list[Key]:
        """Every key, without the secrets."""
        return cast("list[Key]", self._list("/pilotlight/v1/keys", "keys"))

    def create_key(
        self, *, name: str | None = None, scope: Literal["admin", "run"] = "run", endpoint_ids: list[str]
    ) -> Key:
        """A new key; its secret is in `key`, here and never again."""
        body: dict[str, Any] = {"scope": scope, "endpoints": endpoint_ids}
        if name is not None:
            body["name"] = name
        return cast("Key", self._json("POST", "/pilotlight/v1/keys", body))

    def delete_key(self, key_id: str) -> None:
        """Revoke a key."""
        self._request("DELETE", f"/pilotlight/v1/keys/{_part(key_id)}")

    def usage(self, *, endpoint_id: str | None = None, since_ms: int | None = None) -> Usage:
        """Usage intervals and their sums.

        Args:
            endpoint_id: Only this endpoint's.
            since_ms: Only from this moment on, in milliseconds since the epoch.
        """
        query: dict[str, str | int] = {}
        if endpoint_id is not None:
            query["endpoint"] = endpoint_id
        if since_ms is not None:
            query["since_ms"] = since_ms
        return cast("Usage", self._json("GET", "/pilotlight/v1/usage", query=query))

    def status(self) -> dict[str, Any]:
        """What the gateway says about itself, its engine and its machine."""
        return self._json("GET", "/pilotlight/v1/status")

    # --- jobs (serverless-api.md §2) ---

    def run(self, endpoint_id: str, body: Mapping[str, Any]) -> Job:
        """A queued job.

        Args:
            endpoint_id: Where it goes.
            body: `input` and what §2.3 allows beside it.
        """
        return self._job("POST", f"/v2/{_part(endpoint_id)}/run", body)

    def run_sync(self, endpoint_id: str, body: Mapping[str, Any], *, wait_ms: int) -> Job:
        """A job, finished or after `wait_ms` (1 000 to 300 000) still under way."""
        path = f"/v2/{_part(endpoint_id)}/runsync"
        return self._job("POST", path, body, query={"wait": wait_ms}, read_s=wait_ms / 1000 + ANSWER_S)

    def job(self, endpoint_id: str, job_id: str) -> Job:
        """A job as it stands."""
        return self._job("GET", f"/v2/{_part(endpoint_id)}/status/{_part(job_id)}")

    def wait_job(
        self,
        endpoint_id: str,
        job_id: str,
        *,
        on_change: Callable[[Job], None] | None = None,
        hold_ms: int = 20_000,
    ) -> Job:
        """A job once it is finished; a job's own time limits bound the wait.

        Args:
            endpoint_id: Where it was submitted.
            job_id: The job.
            on_change: Told of it each time the gateway answers that it is still under way.
            hold_ms: How long the gateway may hold each question.
        """
        path = f"/v2/{_part(endpoint_id)}/status-sync/{_part(job_id)}"
        while True:
            asked = time.monotonic()
            job = self._job("GET", path, query={"wait": hold_ms}, read_s=hold_ms / 1000 + ANSWER_S)
            if job["status"] in FINAL_STATES:
                return job
            if on_change is not None:
                on_change(job)
            # A gateway that answers at once must not be asked in a tight loop.
            time.sleep(max(0.0, min(hold_ms / 1000, 0.5) - (time.monotonic() - asked)))

    def stream_job(self, endpoint_id: str, job_id: str) -> Iterator[Chunks]:
        """What a job yields, as it yields it; the last item holds the final state and no chunk (§2.8)."""
        path = f"/v2/{_part(endpoint_id)}/stream/{_part(job_id)}"
        while True:
            asked = time.monotonic()
            answer = self._json("GET", path)
            chunks = answer.get("stream")
            if not isinstance(chunks, list) or not isinstance(answer.get("status"), str):
                raise GatewayError(f"{self.url}{path} answered without a list `stream` and a text `status`")
            yield cast("Chunks", answer)
            if answer["status"] in FINAL_STATES and not chunks:
                return
            if not chunks:
                time.sleep(max(0.0, 0.2 - (time.monotonic() - asked)))

    def cancel(self, endpoint_id: str, job_id: str) -> Job:
        """The job after cancelling it; a finished job is not changed."""
        return self._job("POST", f"/v2/{_part(endpoint_id)}/cancel/{_part(job_id)}")

    def health(self, endpoint_id: str) -> dict[str, Any]:
        """Counters of jobs and workers (§2.15); wakes nothing."""
        return self._json("GET", f"/v2/{_part(endpoint_id)}/health")

    # --- OpenAI route ---

    def wake(self, endpoint_id: str) -> None:
        """Return when a worker of the endpoint is ready; starts one if need be.

        Raises:
            BusyError: The gateway gave up holding the request, or the start failed.
        """
        with self._stream("GET", f"/v2/{_part(endpoint_id)}/openai/health", read_s=HELD_S):
            return

    def model_names(self, endpoint_id: str) -> list[str]:
        """Names under which the endpoint's model may be called; wakes nothing."""
        data = self._list(f"/v2/{_part(endpoint_id)}/openai/v1/models", "data")
        return [str(entry["id"]) for entry in data if isinstance(entry, dict) and entry.get("id")]

    @contextlib.contextmanager
    def chat(self, endpoint_id: str, body: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a streamed chat completion, once the gateway has begun to answer.

        Leaving the block closes the connection, which ends the generation.

        Args:
            endpoint_id: Who answers.
            body: OpenAI's request; `stream` is set here.

        Raises:
            StreamError: From the iterator: the answer ended with an error event, or without its end.
        """
        path = f"/v2/{_part(endpoint_id)}/openai/v1/chat/completions"
        with self._stream("POST", path, body={**body, "stream": True}, read_s=HELD_S) as response:
            yield _chat_events(response)

    # --- transport ---

    def _list(self, path: str, name: str, query: Query | None = None) -> list[Any]:
        items = self._json("GET", path, query=query).get(name)
        if not isinstance(items, list):
            raise GatewayError(
                f"{self.url}{path} answered without a list `{name}`; is this a Pilotlight gateway?"
            )
        return items

    def _json(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Query | None = None,
        read_s: float = ANSWER_S,
    ) -> dict[str, Any]:
        response = self._request(method, path, body, query=query, read_s=read_s)
        return self._object(response.content, path)

    def _job(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Query | None = None,
        read_s: float = ANSWER_S,
    ) -> Job:
        job = self._json(method, path, body, query=query, read_s=read_s)
        if not isinstance(job.get("id"), str) or not isinstance(job.get("status"), str):
            raise GatewayError(f"{self.url}{path} answered without the `id` and `status` of a job")
        return cast("Job", job)

    def _object(self, content: bytes, path: str) -> dict[str, Any]:
        try:
            value = json.loads(content)
        except ValueError as error:
            raise GatewayError(
                f"{self.url}{path} did not answer with JSON; is this a Pilotlight gateway?"
            ) from error
        if not isinstance(value, dict):
            raise GatewayError(
                f"{self.url}{path} did not answer with a JSON object; is this a Pilotlight gateway?"
            )
        return value

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Query | None = None,
        read_s: float = ANSWER_S,
    ) -> httpx.Response:
        with self._translated(path):
            response = self._http.request(method, path, json=body, params=query, timeout=_timeout(read_s))
        self._check(response)
        return response

    @contextlib.contextmanager
    def _stream(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        read_s: float,
    ) -> Iterator[httpx.Response]:
        request = self._http.build_request(
            method, path, json=body, params=query, headers=headers, timeout=_timeout(read_s)
        )
        with self._translated(path):
            response = self._http.send(request, stream=True)
        try:
            if response.status_code >= 300:
                with self._translated(path):
                    response.read()
                self._check(response)
            yield response
        finally:
            response.close()

    def _deploy(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any],
        on_progress: Callable[[Progress], None] | None,
    ) -> Endpoint:
        headers = {"accept": "application/x-ndjson"}
        with (
            self._stream(method, path, body=body, headers=headers, read_s=DEPLOY_S) as response,
            self._translated(path),
        ):
            if "ndjson" not in response.headers.get("content-type", ""):
                return cast("Endpoint", self._object(response.read(), path))
            for line in split_lines(response.iter_bytes()):
                if not line.strip():
                    continue
                event = self._object(line, path)
                if event.get("event") == "done":
                    return cast("Endpoint", event.get("endpoint", {}))
                if event.get("event") == "error":
                    reason = describe_problem(line, int(event.get("status", 500)))
                    raise error_for(int(event.get("status", 500)), reason)
                if event.get("event") == "progress" and on_progress is not None:
                    on_progress(cast("Progress", event))
        raise StreamError(f"the gateway at {self.url} ended its answer before the work was done; see its log")

    def _check(self, response: httpx.Response) -> None:
        if response.status_code < 300:
            return
        if response.status_code < 400:
            where = response.headers.get("location", "elsewhere")
            raise GatewayError(f"{self.url} redirects to {where}; set the URL to where the gateway really is")
        if response.status_code == 401 and "authorization" not in self._http.headers:
            raise AccessError(
                f"the gateway at {self.url} wants a key, and there is {self._key_source or 'none'}"
            )
        raise error_of(response, key_source=self._key_source)

    @contextlib.contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        """Turn transport errors into ours, with the advice that fits."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            message = f"no gateway at {self.url}; start one with `pilotlight up`"
            raise GatewayUnreachableError(message) from error
        except httpx.TimeoutException as error:
            raise GatewayUnreachableError(
                f"the gateway at {self.url} did not answer {path} in time"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            message = f"the connection to {self.url} broke during {path}: {error or type(error).__name__}"
            raise GatewayUnreachableError(message) from error


def is_loopback(url: str) -> bool:
    """Whether a URL points to this machine, so that no proxy may come between."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _timeout(read_s: float) -> httpx.Timeout:
    return httpx.Timeout(connect=CONNECT_S, read=read_s, write=ANSWER_S, pool=ANSWER_S)


def _part(value: str) -> str:
    return quote(value, safe="")


def _log_line(event_id: str, data: str) -> LogLine:
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        content = {"line": data}
    return {
        "id": event_id,
        "ts": str(content.get("ts", "")),
        "source": str(content.get("source", "container")),
        "line": str(content.get("line", "")),
    }


def _chat_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    try:
        for event in parse_events(response.iter_bytes()):
            if event.data == "[DONE]":
                return
            if not event.data:
                continue
            try:
                content = json.loads(event.data)
            except ValueError as error:
                raise StreamError(
                    f"the stream holds an event that is not JSON: {event.data[:100]!r}"
                ) from error
            if isinstance(content, dict) and content.get("error"):
                raise StreamError(describe_problem(event.data.encode(), 500))
            if isinstance(content, dict):
                yield content
    except httpx.TimeoutException as error:
        raise StreamError(f"the stream went silent for {HELD_S:g} s") from error
    except httpx.HTTPError as error:
        raise StreamError(f"the stream was cut: {error or type(error).__name__}") from error
    raise StreamError("the stream ended before the answer was complete")
