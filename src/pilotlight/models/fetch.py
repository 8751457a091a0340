"""`python -m pilotlight.models.fetch`: one download in a process of its own, told about in JSON lines.

The worker program runs it where something is missing: the hub's client library would more than double the
worker program's memory, and it is wanted only for the time of a download. It is `hub.fetch`, so whoever
fetches, the gateway or a worker, takes the same lock and leaves the same files.

The token comes by the environment (`HF_TOKEN`), never by the command line. The end of standard input means
that whoever started this is gone, or does not want the files any more; so does SIGTERM. On standard output:

    {"event": "waiting", "holder": "process 7 on host"}     somebody else downloads; repeated once per second
    {"event": "progress", "done": 1048576, "total": 4194304}     bytes, a few times per second
    {"event": "done", "path": "/…/snapshots/…"}     the last line; exit code 0
    {"event": "failed", "kind": "unauthorized", "cause": "…", "advice": "…"}     the last line; exit code 1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pilotlight.domain.repository import WEIGHT_PATTERNS, Repository, RepositoryKind
from pilotlight.errors import InvalidInputError, PilotlightError
from pilotlight.models import hub
from pilotlight.models.cache import FetchCancelledError
from pilotlight.models.catalog import check_hub_name
from pilotlight.models.problems import HubRefusedError

EVENT_INTERVAL_S = 0.25
"""Shortest time between two lines of progress, unless `EVENT_BYTES` have come."""

EVENT_BYTES = 10_000_000
"""So many bytes are told of at once."""

WAIT_INTERVAL_S = 1.0
"""Shortest time between two lines that say that this waits."""


ORPHAN_S = 5.0
"""How long a download may take to stop by itself once nobody wants it any more."""


class EventWriter:
    """Writes events, the frequent ones not more often than their reader can use them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest = {"progress": float("-inf"), "waiting": float("-inf")}
        self._told = 0

    def progress(self, done: int, total: int) -> None:
        """Bytes so far; many at once, and the last of them, are always told."""
        always = done == total or done - self._told >= EVENT_BYTES
        if self._seldom("progress", EVENT_INTERVAL_S, {"done": done, "total": total}, always=always):
            self._told = done

    def waiting(self, holder: str) -> None:
        """Somebody else downloads."""
        self._seldom("waiting", WAIT_INTERVAL_S, {"holder": holder}, always=False)

    def write(self, event: str, **fields: object) -> None:
        """One line; a reader that is gone is no failure, the end of standard input tells it too."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
            sys.stdout.flush()

    def _seldom(self, event: str, interval: float, fields: dict[str, object], *, always: bool) -> bool:
        with self._lock:
            now = time.monotonic()
            if not always and now - self._latest[event] < interval:
                return False
            self._latest[event] = now
        self.write(event, **fields)
        return True


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 the files are here, 1 they are not, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threading.Thread(target=_watch_stdin, args=(stop,), name="standard input", daemon=True).start()
    events = EventWriter()
    try:
        repository = Repository(
            name=options.name,
            revision=options.revision,
            kind=RepositoryKind(options.kind),
            variable=options.variable,
            patterns=tuple(options.pattern or WEIGHT_PATTERNS),
            ignore=tuple(options.ignore),
        )
        check_hub_name(repository.name)
        path = hub.fetch(
            repository,
            cache=options.cache,
            token=os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or None,
            on_progress=events.progress,
            on_wait=events.waiting,
            cancelled=stop,
        )
    except PilotlightError as error:
        events.write("failed", **describe(error))
        return 1
    events.write("done", path=str(path))
    return 0


def describe(error: PilotlightError) -> dict[str, str]:
    """A failure for a report: its class, what is the matter, what to do about it."""
    match error:
        case HubRefusedError():
            return {"kind": error.kind, "cause": error.cause, "advice": error.advice}
        case FetchCancelledError():
            return {"kind": "cancelled", "cause": str(error), "advice": ""}
        case InvalidInputError():
            return {"kind": "model_not_found", "cause": str(error), "advice": "Check the name."}
    advice = (
        "Try again; the download goes on where it stopped. Without a network, fetch the model beforehand."
    )
    return {"kind": "hub_unreachable", "cause": str(error), "advice": advice}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pilotlight.models.fetch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("name", help="repository id")
    parser.add_argument("--cache", type=Path, required=True, help="the hub cache")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--kind", choices=[str(kind) for kind in RepositoryKind], default="model")
    parser.add_argument("--variable", default="MODEL_NAME", help="which variable names the repository")
    parser.add_argument("--pattern", action="append", help="weight format; repeat in the order of preference")
    parser.add_argument("--ignore", action="append", default=[], help="pattern of paths to leave out")
    return parser


def _watch_stdin(stop: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    stop.set()
    # Nobody is left who would end this if the network has gone silent.
    time.sleep(ORPHAN_S)
    os._exit(1)


if __name__ == "__main__":
    # The worker program keeps what it writes to itself; a cache is also for those who come after it.
    os.umask(0o022)
    # Everything that cannot be cut short is safe to leave: files are put in place whole.
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
