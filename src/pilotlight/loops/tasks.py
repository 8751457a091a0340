"""Tasks with an owner, who can wait for all of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
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


class Endless:
    """Work that goes on until it is told to end, such as a loop; at most one of it at a time.

    Args:
        work: Makes what goes on; asked at each start.
        name: Of the task.
    """

    def __init__(self, work: Callable[[], Coroutine[object, object, None]], name: str) -> None:
        self._work = work
        self._name = name
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether it was begun and has not been stopped."""
        return self._task is not None

    def start(self) -> None:
        """Begin; idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name=self._name)

    async def stop(self) -> None:
        """Cancel it; returns when it has ended. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None


async def _logged(work: Coroutine[object, object, _T], name: str) -> _T | None:
    try:
        return await work
    except Exception:  # noqa: BLE001 - the end of a task: nobody above could know
        _log.exception("background_work_failed", work=name)
        return None
