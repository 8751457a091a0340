"""Long requests answered as they go: one JSON object per line, progress first, the outcome last."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import structlog
from pydantic import BaseModel

from pilotlight.errors import PilotlightError
from pilotlight.management.checks import Progress, ProgressStage
from pilotlight.management.problems import problem_of

MEDIA_TYPE = "application/x-ndjson"

STEPS_MAX = 200
"""Steps kept for a slow reader; byte counts replace each other and never fill this."""

_log = structlog.get_logger(__name__)


def wants_ndjson(accept: str) -> bool:
    """Whether an Accept header asks for lines."""
    return any(part.partition(";")[0].strip().lower() == MEDIA_TYPE for part in accept.split(","))


async def progress_lines(work: Callable[[Progress], Awaitable[BaseModel]]) -> AsyncIterator[bytes]:
    """The lines of one request: its progress, then `done` with the endpoint or `error`.

    A reader that goes away cancels the work.

    Args:
        work: Does it, telling its progress.
    """
    steps = _Steps()
    task = asyncio.ensure_future(work(steps))
    task.add_done_callback(steps.wake)
    try:
        while not task.done():
            await steps.changed.wait()
            for step in steps.take():
                yield _line({"event": "progress", **step})
        for step in steps.take():
            yield _line({"event": "progress", **step})
        yield _line(_outcome(task))
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


def _outcome(task: asyncio.Future[BaseModel]) -> dict[str, Any]:
    error = task.exception()
    if error is None:
        return {"event": "done", "endpoint": task.result().model_dump(mode="json")}
    if not isinstance(error, Exception):
        raise error
    if not isinstance(error, PilotlightError):
        _log.error("management.request_failed", exc_info=error)
    return {"event": "error", **problem_of(error)}


class _Steps:
    """Collects progress between two reads; of several byte counts in a row only the newest is kept."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._waiting: list[dict[str, Any]] = []

    def __call__(
        self, stage: ProgressStage, message: str, done: int | None = None, total: int | None = None
    ) -> None:
        step = {"stage": stage, "message": message, "done": done, "total": total}
        last = self._waiting[-1] if self._waiting else None
        if last is not None and done is not None and last["stage"] == stage and last["message"] == message:
            self._waiting[-1] = step
        elif len(self._waiting) < STEPS_MAX:
            self._waiting.append(step)
        self.changed.set()

    def wake(self, _task: asyncio.Future[BaseModel]) -> None:
        self.changed.set()

    def take(self) -> list[dict[str, Any]]:
        self.changed.clear()
        taken, self._waiting = self._waiting, []
        return taken


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
