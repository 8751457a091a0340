"""Groups of changes: what is asked for during one commit is done together in the next.

Making a commit durable costs one flush of the log however much it holds, and a round trip costs both sides
time. So submits and events are gathered while the last group is being committed, and then run as one
transaction with one statement per kind. Nobody waits for a timer: with one caller a group is one change,
with sixty-four it is about that many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from pilotlight.errors import PilotlightError, StoreError
from pilotlight.stores.postgresql.connections import BadValueError
from pilotlight.stores.postgresql.database import Database

Item = TypeVar("Item")
Answer = TypeVar("Answer")

GROUP_MAX = 256
"""Changes in one transaction; bounds how long the first of them waits for the last."""

_GROUP_BYTES_MAX = 16 * 1024 * 1024
"""Bytes of bodies in one transaction, but at least one change."""


class Group(Generic[Item, Answer]):
    """A queue of changes of one kind. A change whose caller is cancelled happens all the same, unseen.

    Args:
        database: Where the groups run.
        commit: Does a group in one transaction; one answer per item, which may be an error for it alone.
        lanes: Groups that may be under way at once.
        new_work: Whether these changes can be refused without harm, see `Backlog`.
    """

    def __init__(
        self,
        database: Database,
        commit: Callable[[Sequence[Item]], Coroutine[Any, Any, Sequence[Answer | Exception]]],
        *,
        lanes: int = 1,
        new_work: bool = False,
    ) -> None:
        self._database = database
        self._commit = commit
        self._lanes = lanes
        self._new_work = new_work
        self._running = 0
        self._pending: list[tuple[Item, int, asyncio.Future[Answer]]] = []

    def add(self, item: Item, *, size: int = 0) -> asyncio.Future[Answer]:
        """A future of the answer for a change, done once its group is committed; shield it from cancellation.

        Args:
            item: The change.
            size: Bytes it carries, for the bound on memory.

        Raises:
            StoreError: Closed, or too much is waiting; the future's, that the group could not be committed.
        """
        if self._database.closed:
            raise StoreError("the store is closed")
        # First, because it may refuse: what is refused must not be done with the next group.
        self._database.backlog.enter(size, new_work=self._new_work)
        if self._running < self._lanes:
            try:
                self._database.spawn(self._run())
            except StoreError:
                self._database.backlog.leave(size)
                raise
            self._running += 1
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending.append((item, size, future))
        return future

    async def _run(self) -> None:
        try:
            while self._pending:
                group = self._next()
                answers = await self._answers([item for item, _, _ in group])
                for (_, size, future), answer in zip(group, answers, strict=True):
                    self._database.backlog.leave(size)
                    if future.done():
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        finally:
            self._running -= 1

    async def _answers(self, items: Sequence[Item]) -> Sequence[Answer | Exception]:
        try:
            return await self._commit(items)
        except Exception as error:  # noqa: BLE001 - handed to those who asked
            ours = not isinstance(error, PilotlightError) or isinstance(error, BadValueError)
            if not ours or len(items) == 1:
                return [error] * len(items)
        # A value or a defect that one of them brings must not harm the others.
        return [answer for item in items for answer in await self._answers([item])]

    def _next(self) -> list[tuple[Item, int, asyncio.Future[Answer]]]:
        number = size = 0
        for _, item_size, _ in self._pending[:GROUP_MAX]:
            if number and size + item_size > _GROUP_BYTES_MAX:
                break
            number, size = number + 1, size + item_size
        group, self._pending = self._pending[:number], self._pending[number:]
        return group
