"""Tasks with an owner, who can wait for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

_log = structlog.get_logger()
_T = TypeVar("_T")


class Tasks:
    """Background work of one owner; a failure is logged and ends nothing else."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[object, object, _T], name: str) -> asyncio.Task[_T | None]:
        """Run something; the task returns None when that failed."""
        task = asyncio.create_task(_logged(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def whole(self, work: Coroutine[object, object, _T], name: str) -> _T | None:
        """Do something to its end, also when the caller is cancelled; None when it failed."""
        return await asyncio.shield(self.spawn(work, name))

    @property
    def pending(self) -> list[asyncio.Task[Any]]:
        """What is under way."""
        return list(self._tasks)


async def _logged(work: Coroutine[object, object, _T], name: str) -> _T | None:
    try:
        return await work
    except Exception:  # noqa: BLE001 - the end of a task: nobody above could know
        _log.exception("background_work_failed", work=name)
        return None
