"""Telling a person what a command waits for.

`Waiting` is one line on standard error: renewed in place on a terminal, one line per change elsewhere.
`StartWatch` asks for an endpoint's workers in a second thread while the main thread holds a request, and
keeps that line true.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pilotlight.cli.output import clean, size
from pilotlight.client import AccessError
from pilotlight.client.models import Failure, Progress, Worker
from pilotlight.errors import PilotlightError

if TYPE_CHECKING:
    from rich.status import Status

    from pilotlight.client import PilotlightClient

POLL_S = 0.5
QUIET_S = 0.3
"""A worker that is ready answers sooner; nothing is said by then."""

REPEAT_S = 10.0
"""Pause between two lines of one step, where no terminal renews a line in place."""

_ORDER = ("starting", "downloading", "importing", "loading_weights", "warming_up", "ready")


class Waiting:
    """One line that says what is going on, and for how long already."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._started = time.monotonic()
        self._step = ""
        self._written = self._started
        self._status: Status | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def say(self, text: str, *, step: str | None = None) -> None:
        """Show this text.

        Args:
            text: What is going on.
            step: What must change for another line where no terminal is; None takes the text. Within one step
                there is still a line every ten seconds.
        """
        now = time.monotonic()
        with self._lock:
            if self._closed:
                return
            if self._stream.isatty():
                self._draw(f"{clean(text)} ({now - self._started:.0f} s)")
            elif (step or text) != self._step or (step is not None and now - self._written >= REPEAT_S):
                self._stream.write(f"{text}\n")
                self._stream.flush()
                self._step, self._written = step or text, now

    def close(self) -> None:
        """Clear the line; nothing is shown any more."""
        with self._lock:
            self._closed = True
            if self._status is not None:
                self._status.stop()
                self._status = None

    def _draw(self, text: str) -> None:
        from rich.console import Console  # noqa: PLC0415 - not needed where no terminal is
        from rich.text import Text  # noqa: PLC0415

        if self._status is None:
            self._status = Console(file=self._stream).status(Text(text))
            self._status.start()
        else:
            self._status.update(Text(text))


class StartWatch:
    """Shows the stage of an endpoint's start until it is left.

    Args:
        client: Shared with the main thread.
        endpoint_id: Whose workers are watched.
        waiting: Where the stage is shown.
    """

    def __init__(self, client: PilotlightClient, endpoint_id: str, waiting: Waiting) -> None:
        self._client = client
        self._endpoint_id = endpoint_id
        self._waiting = waiting
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="start watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Show nothing any more; may be called more than once."""
        self._over.set()
        self._waiting.close()

    def _watch(self) -> None:
        pause = QUIET_S
        text, may_look = "waiting for a worker", True
        while not self._over.wait(pause):
            try:
                if may_look:
                    text = describe_start(self._client.workers(self._endpoint_id))
            except AccessError:
                # A run-only key. Asking again would only fill the gateway's log.
                may_look = False
            except PilotlightError:
                # The request that the main thread holds reports what is really wrong.
                text = "waiting for a worker"
            except Exception:  # noqa: BLE001 - the client is closed under us when the command ends
                return
            if not self._over.is_set():
                self._waiting.say(text)
            pause = POLL_S


@contextlib.contextmanager
def watch_start(client: PilotlightClient, endpoint_id: str) -> Iterator[Callable[[], None]]:
    """Show what the endpoint's start is doing while the block waits; gives what ends the show sooner."""
    with Waiting() as waiting, StartWatch(client, endpoint_id, waiting) as watch:
        yield watch.stop


def describe_start(workers: Sequence[Worker]) -> str:
    """What a caller of an endpoint with these workers waits for, in a few words."""
    states = [worker.get("state", "") for worker in workers]
    starting = [worker for worker in workers if worker.get("state") == "starting"]
    if "ready" in states:
        return "waiting for the answer"
    if starting:
        furthest = max(starting, key=_position)
        stage = describe_stage(furthest)
        return "starting" if stage in {"", "starting"} else f"starting: {stage}"
    failures: list[Any] = [worker.get("failure") for worker in workers if worker.get("state") == "failed"]
    if failures and failures[-1]:
        return f"the last start failed ({failures[-1].get('cause', 'unknown')}); waiting for another"
    return "waiting for a worker"


def _position(worker: Worker) -> int:
    stage = worker.get("stage", "")
    return _ORDER.index(stage) if stage in _ORDER else -1


def describe_stage(worker: Worker) -> str:
    """The step that a worker has reached; of a download also how far it is."""
    stage = worker.get("stage", "").replace("_", " ")
    if (progress := worker.get("progress")) is None:
        return stage
    return f"{stage} {_share(progress['done_bytes'], progress['total_bytes'])}"


def _share(done: int, total: int | None) -> str:
    return f"{size(done)} of {size(total)} ({100 * done // total} %)" if total else size(done)


def describe_failure(failure: Failure) -> str:
    """Why a worker could not start: the cause, what to do about it, and its class for those who search."""
    cause = failure.get("cause", "unknown").removesuffix(".")
    kind = f"[{failure['kind']}]" if failure.get("kind") else ""
    return " ".join(part for part in (f"{cause}.", failure.get("advice", ""), kind) if part)


def describe_progress(progress: Progress) -> str:
    """One line for a step of a deployment."""
    text = ": ".join(part for part in (progress.get("stage"), progress.get("message")) if part)
    done, total = progress.get("done"), progress.get("total")
    return text if done is None else f"{text}: {_share(done, total)}"
