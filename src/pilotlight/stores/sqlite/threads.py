"""A thread that owns one SQLite connection and runs the operations others ask for, in groups.

Theory of operation. Making a commit durable costs one fsync, a fraction of a millisecond, however many
operations it holds. So the thread takes everything that was asked for during the last commit, runs it
in one transaction, commits once, and answers all callers with one wake-up of the event loop. Nobody
waits for a timer: with one caller a group is one operation, with sixty-four it is about that many.

An operation is a function of a `Transaction`. There are three ways for it to go wrong:

1. It raises a `PilotlightError` (not found, conflict). It must do so before it has written anything;
   the others in its group are not concerned.
2. It raises something else: it may be half done. The transaction is rolled back, the operation gets
   its error, and the rest of the group runs again without it. So operations must not change anything
   but the database.
3. The database itself fails (disk full, input/output error), in the operation or in the commit. The
   transaction is rolled back and every operation of the group gets a `StoreError`.

The store has two of these: the writer, and a reader whose connection cannot write. In WAL mode a read
transaction sees everything committed before it began, and a caller is answered after the commit, so a
read sees every write whose await has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pilotlight.errors import PilotlightError, StoreError
from pilotlight.stores.common import CounterChange
from pilotlight.stores.sqlite.sql import QUERIES

T = TypeVar("T")

GROUP_MAX = 512
"""Operations in one transaction; bounds how long the first of them waits for the last."""

PENDING_MAX = 10_000
"""Operations that may wait; beyond it callers are refused. At 20,000/s that is half a second of work."""

PENDING_BYTES_MAX = 512 * 1024 * 1024
"""Bytes of inputs and outputs that may wait in memory for the disk."""


class Transaction:
    """What an operation works on: the connection inside a transaction, and the queue's counters.

    Args:
        connection: Inside a transaction already.
    """

    __slots__ = ("_changes", "_connection")

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._changes: dict[str, CounterChange] = {}

    def execute(self, query: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run a named query."""
        return self._connection.execute(QUERIES[query], parameters)

    def executemany(self, query: str, rows: Sequence[Sequence[Any]]) -> sqlite3.Cursor:
        """Run a named query once per row of parameters."""
        return self._connection.executemany(QUERIES[query], rows)

    def counters(self, endpoint_id: str) -> CounterChange:
        """The change of an endpoint's counters so far; written once, with the commit."""
        change = self._changes.get(endpoint_id)
        if change is None:
            change = self._changes[endpoint_id] = CounterChange()
        return change

    def flush(self) -> None:
        """Write the collected changes of the counters."""
        for endpoint_id, change in self._changes.items():
            if change == CounterChange():
                continue
            self.execute(
                "change_counters",
                (
                    endpoint_id,
                    change.queued,
                    change.queued_low,
                    change.in_progress,
                    change.completed,
                    change.failed,
                    change.retried,
                ),
            )
        self._changes.clear()


@dataclass(slots=True, eq=False)
class _Operation:
    run: Callable[[Transaction], Any]
    future: asyncio.Future[Any]
    size: int


@dataclass(slots=True)
class _Outcome:
    operation: _Operation
    value: Any = None
    error: BaseException | None = None


class DatabaseThread:
    """One thread, one connection, one queue of operations. Made and used on one event loop.

    Args:
        name: Of the thread.
        connect: Opens the connection; runs in the thread, and its error is raised by `start`.
        begin: The statement that opens a transaction.
        release: Called in the thread at its very end, whatever happened.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], sqlite3.Connection],
        *,
        begin: str,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._connect = connect
        self._begin = begin
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._wake = threading.Condition()
        self._pending: deque[_Operation] = deque()
        self._pending_bytes = 0
        self._stopping = False
        # A daemon, so that a process that fails without closing the store still ends; what was
        # committed is safe and what was not was never acknowledged.
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    async def start(self) -> None:
        """Start the thread and return when its connection is open; raises what opening it raised.

        When it raises, the thread has ended and given up what it held.
        """
        self._thread.start()
        try:
            await self._opened
        except BaseException:
            self.stop()
            await self.join()
            raise

    def submit(self, run: Callable[[Transaction], T], *, size: int = 0) -> asyncio.Future[T]:
        """A future of the operation's result; done only after the commit.

        An operation whose future is cancelled before its turn is left out; later it happens unseen.

        Args:
            run: The operation.
            size: Bytes it carries, for the bound on memory.

        Raises:
            StoreError: Closed, broken, or too much is waiting; nothing was done.
        """
        operation = _Operation(run, self._loop.create_future(), size)
        with self._wake:
            if self._stopping:
                raise StoreError("the store is closed")
            if len(self._pending) >= PENDING_MAX or (
                self._pending and self._pending_bytes + size > PENDING_BYTES_MAX
            ):
                raise StoreError(
                    f"the store is overloaded: {len(self._pending)} operations wait for the disk; try again"
                )
            self._pending.append(operation)
            self._pending_bytes += size
            self._wake.notify()
        return operation.future

    async def call(self, run: Callable[[Transaction], T], *, size: int = 0) -> T:
        """The result of an operation, see `submit`."""
        return await self.submit(run, size=size)

    def stop(self) -> None:
        """Accept nothing more; what was accepted is finished. Returns at once, idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    async def join(self) -> None:
        """Return when the thread has finished its work and closed its connection."""
        await asyncio.shield(self._ended)
        self._thread.join()

    # From here on: in the thread.

    def _main(self) -> None:
        connection: sqlite3.Connection | None = None
        try:
            try:
                connection = self._connect()
            except Exception as error:  # noqa: BLE001 - handed over to the caller of start
                self._on_loop(_fail, self._opened, error)
                return
            self._on_loop(_succeed, self._opened)
            self._serve(connection)
        finally:
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()
            self._release()
            self._on_loop(_succeed, self._ended)

    def _serve(self, connection: sqlite3.Connection) -> None:
        while group := self._next_group():
            try:
                outcomes = self._run_group(connection, group)
            except Exception as error:  # noqa: BLE001 - a defect must not leave callers waiting for ever
                outcomes = [_Outcome(operation, error=error) for operation in group]
            self._on_loop(_answer, outcomes)

    def _next_group(self) -> list[_Operation]:
        """Up to `GROUP_MAX` waiting operations; empty when the thread has to end."""
        with self._wake:
            group: list[_Operation] = []
            while not group:
                while not self._pending and not self._stopping:
                    self._wake.wait()
                if not self._pending:
                    break
                while self._pending and len(group) < GROUP_MAX:
                    operation = self._pending.popleft()
                    self._pending_bytes -= operation.size
                    if not operation.future.cancelled():
                        group.append(operation)
            return group

    def _run_group(self, connection: sqlite3.Connection, group: list[_Operation]) -> list[_Outcome]:
        alone: list[_Outcome] = []
        while group:
            transaction = Transaction(connection)
            outcomes: list[_Outcome] = []
            operation: _Operation | None = None
            try:
                connection.execute(self._begin)
                for operation in group:
                    try:
                        outcomes.append(_Outcome(operation, value=operation.run(transaction)))
                    except PilotlightError as error:
                        outcomes.append(_Outcome(operation, error=error))
                operation = None
                transaction.flush()
                connection.execute("COMMIT")
            except Exception as error:  # noqa: BLE001 - sorted below by whose fault it is
                _roll_back(connection)
                if operation is None or _is_database_failure(error):
                    failure = _store_error(error)
                    return [*alone, *(_Outcome(each, error=failure) for each in group)]
                alone.append(_Outcome(operation, error=_own_error(error)))
                group = [each for each in group if each is not operation]
                continue
            return [*alone, *outcomes]
        return alone

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        # The loop may be gone when a process ends without closing the store; nobody waits then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


def _succeed(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _answer(outcomes: Sequence[_Outcome]) -> None:
    for outcome in outcomes:
        future = outcome.operation.future
        if future.done():
            continue
        if outcome.error is None:
            future.set_result(outcome.value)
        else:
            future.set_exception(outcome.error)


def _roll_back(connection: sqlite3.Connection) -> None:
    # SQLite has rolled back by itself after some errors; then there is no transaction left to end.
    if connection.in_transaction:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")


def _is_database_failure(error: Exception) -> bool:
    """Whether the database failed, rather than one operation having asked for something impossible."""
    own = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DataError, sqlite3.NotSupportedError)
    return isinstance(error, sqlite3.DatabaseError) and not isinstance(error, own)


def _store_error(error: Exception) -> StoreError:
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    failure = StoreError(f"the database could not do its work, nothing was changed: {error} ({name})")
    failure.__cause__ = error
    return failure


def _own_error(error: Exception) -> Exception:
    return _store_error(error) if isinstance(error, sqlite3.Error) else error
