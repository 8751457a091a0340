"""`pilotlight logs`: what workers wrote, stored and live."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from pilotlight.cli.output import JsonOption, connect, note, print_json, print_json_line, write
from pilotlight.client import PilotlightClient
from pilotlight.client.models import LogLine
from pilotlight.errors import NotFoundError, PilotlightError

REFRESH_S = 2.0
"""How soon a new worker's log joins when an endpoint is followed."""

PENDING_MAX = 10_000
"""Lines read ahead of what the terminal takes."""

STORED_LINES_MAX = 5000
"""Largest `tail` (serverless-api.md §7.4): a worker that comes while we follow is shown from its start."""

SEARCH_STARTS = 100
"""Past starts per endpoint that are searched for an ended worker."""


def logs_command(
    target: Annotated[
        str,
        typer.Argument(metavar="WORKER|ENDPOINT", help="Id of a worker, or id or name of an endpoint."),
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")
    ] = False,
    tail: Annotated[
        int, typer.Option("--tail", min=0, max=STORED_LINES_MAX, help="Stored lines per worker.")
    ] = 100,
    as_json: JsonOption = False,
) -> None:
    """Show what workers wrote.

    For an endpoint: all its workers, or the last one when none lives. With --json one array, and with
    --follow one object per line.

    Examples:
      pilotlight logs qwen --tail 20
      pilotlight logs qwen -f
    """
    with connect() as client:
        endpoint_id, worker_id = find_target(client, target)
        workers = [worker_id] if worker_id else [worker["id"] for worker in client.workers(endpoint_id)]
        if follow:
            source = Follower(client, endpoint_id, workers, whole=worker_id is None, tail=tail)
            for worker, line in source.lines():
                _print(worker, line, prefix=worker_id is None, as_json=as_json)
            return
        if not workers:
            workers = [start["worker_id"] for start in client.starts(endpoint_id, limit=1)]
        stored = [
            (worker, line)
            for worker in workers
            for line in client.worker_logs(endpoint_id, worker, tail=tail)
        ]
    if len(workers) > 1:
        stored.sort(key=lambda item: item[1]["ts"])
    if as_json:
        print_json([{"worker_id": worker, **line} for worker, line in stored])
        return
    for worker, line in stored:
        _print(worker, line, prefix=len(workers) > 1, as_json=False)
    if not workers:
        note("no worker of this endpoint has started yet")


def find_target(client: PilotlightClient, target: str) -> tuple[str, str | None]:
    """The endpoint, and the worker if the user named one.

    Raises:
        NotFoundError: Neither an endpoint nor a worker has this name.
    """
    endpoints = client.endpoints()
    found = [one for one in endpoints if one["id"] == target] or [
        one for one in endpoints if one["name"] == target
    ]
    if len(found) == 1:
        return found[0]["id"], None
    for one in endpoints:
        if any(worker["id"] == target for worker in client.workers(one["id"])):
            return one["id"], target
    for one in endpoints:
        if any(start["worker_id"] == target for start in client.starts(one["id"], limit=SEARCH_STARTS)):
            return one["id"], target
    names = ", ".join(one["name"] for one in endpoints[:8]) or "none"
    raise NotFoundError(
        f"{target!r} is neither a worker (see `pilotlight ps`) nor an endpoint; endpoints: {names}"
    )


class Follower:
    """Merges the live logs of an endpoint's workers, those that start later included.

    Args:
        client: Shared by one thread per worker.
        endpoint_id: Whose workers.
        workers: The first ones.
        whole: Also follow workers that come later; otherwise the end of the first log ends it.
        tail: Stored lines to begin each of the first logs with.
    """

    def __init__(
        self, client: PilotlightClient, endpoint_id: str, workers: list[str], *, whole: bool, tail: int
    ) -> None:
        self._client = client
        self._endpoint_id = endpoint_id
        self._first = workers
        self._whole = whole
        self._tail = tail
        self._refreshed = 0.0
        self._seen: set[str] = set()
        self._queue: queue.Queue[tuple[str, LogLine | PilotlightError | None]] = queue.Queue(PENDING_MAX)

    def lines(self) -> Iterator[tuple[str, LogLine]]:
        """Worker and line, as they come."""
        for worker in self._first:
            self._start(worker, self._tail)
        if not self._first:
            note("no worker is running; waiting for one")
        self._refreshed = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                worker, item = self._queue.get(timeout=REFRESH_S)
                if isinstance(item, PilotlightError):
                    if not self._whole:
                        raise item
                    note(f"{worker}: {item}")
                elif item is not None:
                    yield worker, item
                elif not self._whole:
                    return
            self._refresh()

    def _refresh(self) -> None:
        """Join the logs of workers that have come since."""
        if self._whole and time.monotonic() - self._refreshed >= REFRESH_S:
            self._refreshed = time.monotonic()
            for one in self._client.workers(self._endpoint_id):
                self._start(one["id"], STORED_LINES_MAX)

    def _start(self, worker: str, tail: int) -> None:
        if worker not in self._seen:
            self._seen.add(worker)
            # A daemon: Ctrl-C must not wait for a log that is silent.
            threading.Thread(
                target=self._read, args=(worker, tail), name=f"log {worker}", daemon=True
            ).start()

    def _read(self, worker: str, tail: int) -> None:
        end: PilotlightError | None = None
        try:
            for line in self._client.worker_logs(self._endpoint_id, worker, tail=tail, follow=True):
                self._queue.put((worker, line))
        except PilotlightError as error:
            end = error
        except RuntimeError:
            # The command has ended and closed the client.
            return
        self._queue.put((worker, end))


def _print(worker: str, line: LogLine, *, prefix: bool, as_json: bool) -> None:
    if as_json:
        entry: dict[str, Any] = {"worker_id": worker, **line}
        print_json_line(entry)
        return
    source = "[pilotlight] " if line["source"] == "system" else ""
    write(f"{f'{worker}  ' if prefix else ''}{source}{line['line']}\n")
