"""`PilotlightClient`: every call of the gateway that the command line needs, blocking, typed.

Errors of the gateway become `PilotlightError`s with the gateway's own words. A client may be shared by
threads. Loopback URLs never go through a proxy. All timeouts are explicit: short for questions, an hour where
the gateway holds a request while a worker starts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import httpx

from pilotlight.client.errors import (
    GatewayUnreachableError,
    StreamError,
    describe_problem,
    error_for,
)
from pilotlight.client.jobs import JobCalls
from pilotlight.client.lines import ServerEvent, parse_events, split_lines
from pilotlight.client.models import Endpoint, Key, Launcher, LogLine, Progress, Start, Usage, Worker
from pilotlight.client.transport import Query, path_part

DEPLOY_S = 900.0
"""Longest silence while the gateway checks a model and fetches its weights."""
HELD_S = 3600.0
"""Longest silence of a request that may be held for a worker, or of a model that thinks."""
BACKLOG_S = 2.0
"""Silence after which the stored part of a log counts as read, where the gateway keeps the stream open."""


class PilotlightClient(JobCalls):
    """Every call of one gateway.

    Args:
        url: Base URL, such as `http://127.0.0.1:8400`.
        key: API key; None sends none, which the gateway will refuse.
        key_source: Where the key came from, for the message of a refused key.

    Raises:
        InvalidInputError: The URL cannot be used.
    """

    # --- endpoints ---

    def endpoints(self) -> list[Endpoint]:
        """Every endpoint."""
        return cast("list[Endpoint]", self._list("/pilotlight/v1/endpoints", "endpoints"))

    def endpoint(self, endpoint_id: str) -> Endpoint:
        """One endpoint.

        Raises:
            NotFoundError: There is none with this id.
        """
        return cast("Endpoint", self._json("GET", f"/pilotlight/v1/endpoints/{path_part(endpoint_id)}"))

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
        return self._deploy(
            "PATCH", f"/pilotlight/v1/endpoints/{path_part(endpoint_id)}", changes, on_progress
        )

    def delete_endpoint(self, endpoint_id: str) -> None:
        """Remove an endpoint with its workers and jobs (serverless-api.md §7.2)."""
        self._request("DELETE", f"/v2/serverless/{path_part(endpoint_id)}")

    def workers(self, endpoint_id: str) -> list[Worker]:
        """The endpoint's living workers, in the words of serverless-api.md §7.4 and our own."""
        path = f"/pilotlight/v1/endpoints/{path_part(endpoint_id)}/workers"
        return cast("list[Worker]", self._list(path, "workers"))

    def starts(self, endpoint_id: str, *, limit: int = 20) -> list[Start]:
        """The endpoint's latest starts, stage by stage."""
        path = f"/pilotlight/v1/endpoints/{path_part(endpoint_id)}/starts"
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
        path = f"/v2/serverless/{path_part(endpoint_id)}/workers/{path_part(worker_id)}/logs"
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
        self,
        *,
        name: str | None = None,
        scope: Literal["admin", "run"] = "run",
        endpoint_ids: list[str],
        terms: Mapping[str, Any] | None = None,
    ) -> Key:
        """A new key; its secret is in `key`, here and never again.

        Args:
            name: A label; None for a general one.
            scope: What it may do.
            endpoint_ids: Whom a run-only key may call.
            terms: Fields that are not as usual: heartbeats, priority, limits.
        """
        body: dict[str, Any] = {"scope": scope, "endpoints": endpoint_ids, **(terms or {})}
        if name is not None:
            body["name"] = name
        return cast("Key", self._json("POST", "/pilotlight/v1/keys", body))

    def update_key(self, key_id: str, changes: Mapping[str, Any]) -> Key:
        """The key after the changes; fields that are not named stay as they are."""
        return cast("Key", self._json("PATCH", f"/pilotlight/v1/keys/{path_part(key_id)}", dict(changes)))

    def delete_key(self, key_id: str) -> None:
        """Revoke a key."""
        self._request("DELETE", f"/pilotlight/v1/keys/{path_part(key_id)}")

    def webhook_secret(self, endpoint_id: str) -> dict[str, Any]:
        """What signs an endpoint's webhooks, as `secret`."""
        return self._json("GET", f"/pilotlight/v1/endpoints/{path_part(endpoint_id)}/webhook-secret")

    def dead_webhooks(self, *, endpoint_id: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """Webhooks that could not be delivered, newest first."""
        query: dict[str, str | int] = {"limit": limit}
        if endpoint_id is not None:
            query["endpoint"] = endpoint_id
        return self._list("/pilotlight/v1/webhooks/dead", "webhooks", query)

    def resend_webhook(self, webhook_id: str) -> dict[str, Any]:
        """A dead letter that is being sent again."""
        return self._json("POST", f"/pilotlight/v1/webhooks/{path_part(webhook_id)}/resend")

    def delete_webhook(self, webhook_id: str) -> None:
        """Forget a dead letter."""
        self._request("DELETE", f"/pilotlight/v1/webhooks/{path_part(webhook_id)}")

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

    def launchers(self) -> list[Launcher]:
        """The gateway's launchers, those wanted most recently first."""
        return cast("list[Launcher]", self._list("/pilotlight/v1/launchers", "launchers"))

    # --- OpenAI route ---

    def wake(self, endpoint_id: str) -> None:
        """Return when a worker of the endpoint is ready; starts one if need be.

        Raises:
            BusyError: The gateway gave up holding the request, or the start failed.
        """
        with self._stream("GET", f"/v2/{path_part(endpoint_id)}/openai/health", read_s=HELD_S):
            return

    def model_names(self, endpoint_id: str) -> list[str]:
        """Names under which the endpoint's model may be called; wakes nothing."""
        data = self._list(f"/v2/{path_part(endpoint_id)}/openai/v1/models", "data")
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
        path = f"/v2/{path_part(endpoint_id)}/openai/v1/chat/completions"
        with self._stream("POST", path, body={**body, "stream": True}, read_s=HELD_S) as response:
            yield _chat_events(response)

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
