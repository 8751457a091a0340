"""A thread that owns one SQLite connection and runs the operations others ask for, in groups.

Theory of operation. Making a commit durable costs one fsync, a fraction of a millisecond, however many
operations it holds. So the thread takes everything that was asked for during the last commit, runs it
in one transaction, commits once, and answers all callers with one wake-up of the event loop. Nobody
waits for a timer: with one caller a group is one operation, with sixty-four it is about that many.

An operation is a function of a `Transaction`. Those that come often can be asked for as items of a
`Bulk`: alike ones of a group are run in one go, which spares most of what a statement costs besides its
work. A group is cut into segments by the operations that are no such items; within a segment bulks run in
their order of precedence, which no caller can notice, for none of them has been answered yet.

There are three ways for an operation to go wrong:

1. It raises a `PilotlightError` (not found, conflict). It must do so before it has written anything;
   the others in its group are not concerned.
2. It raises something else: it may be half done. The transaction is rolled back, the operation gets
   its error, and the rest of the group runs again without it. So operations must not change anything
   but the database. If it was a bulk, its items run one by one then, to find the culprit.
3. The database itself fails (disk full, input/output error), in the operation or in the commit. The
   transaction is rolled back and every operation of the group gets a `StoreError`.

The store has two of these: the writer, and a reader whose connection cannot write. In WAL mode a read
transaction sees everything committed before it began, and a caller is answered after the commit, so a
read sees every write whose await has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import msgspec

from pilotlight.errors import PilotlightError, StoreError
from pilotlight.stores.common import CounterChange
from pilotlight.stores.sqlite.known import Changes, Knowledge, KnownInputs, KnownJobs
from pilotlight.stores.sqlite.sql import QUERIES

I = TypeVar("I")  # noqa: E741 - of an item
T = TypeVar("T")

GROUP_MAX = 512
"""Operations in one transaction; bounds how long the first of them waits for the last."""

PENDING_MAX = 10_000
"""Operations that may wait; beyond it new work is refused. At 20,000/s that is half a second of work."""

PENDING_BYTES_MAX = 512 * 1024 * 1024
"""Bytes of inputs and outputs that may wait in memory for the disk."""

ROWS_MAX = 32
"""Rows that one statement writes; for every number up to it SQLite prepares a statement of its own."""

ROWS_BYTES_MAX = 4 * 1024 * 1024
"""Bytes that one statement of several rows writes; SQLite copies what it is given."""

HEADROOM = 2
"""How many times as much may wait before what finishes accepted work is refused, too."""


class Transaction:
    """What an operation works on: the connection inside a transaction, and changes of counters.

    Counters are added up for the whole group and written with its end. Who reads them calls `flush` first.

    Args:
        connection: Inside a transaction already.
        knowledge: What need not be asked for.
    """

    __slots__ = ("_batches", "_changes", "_connection", "_knowledge", "inputs", "jobs")

    def __init__(self, connection: sqlite3.Connection, knowledge: Knowledge) -> None:
        self._connection = connection
        self._knowledge = knowledge
        self._changes: dict[str, CounterChange] = {}
        self._batches: dict[str, Counter[str]] = {}
        self.jobs: KnownJobs = knowledge.jobs
        self.inputs: KnownInputs = knowledge.inputs

    def execute(self, query: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run a named query."""
        return self._connection.execute(QUERIES[query], parameters)

    def executemany(self, query: str, rows: Sequence[Sequence[Any]]) -> sqlite3.Cursor:
        """Run a named query once per row of parameters."""
        return self._connection.executemany(QUERIES[query], rows)

    def write_rows(self, query: str, rows: Sequence[Sequence[Any]], *, size: int = 0) -> int:
        """Run a named query that has `VALUES` of one row for many rows; returns how many it changed.

        A statement of many rows takes a third less time than one each, and most of all it gives up the
        interpreter's lock, for which the event loop waits, once and not thrice a row.

        Args:
            query: Its name.
            rows: The parameters of each row.
            size: Bytes of what may be large in them.
        """
        if size > ROWS_BYTES_MAX:
            return self.executemany(query, rows).rowcount
        count = start = 0
        while start < len(rows):
            number = min(ROWS_MAX, len(rows) - start)
            values = list(chain.from_iterable(rows[start : start + number]))
            count += self._connection.execute(_for_rows(query, number), values).rowcount
            start += number
        return count

    def counters(self, endpoint_id: str) -> CounterChange:
        """The change of an endpoint's counters so far."""
        change = self._changes.get(endpoint_id)
        if change is None:
            change = self._changes[endpoint_id] = CounterChange()
        return change

    def batch_counters(self, batch_id: str) -> Counter[str]:
        """The change of a batch's counters so far, by the names of `common.batch_counter`."""
        change = self._batches.get(batch_id)
        if change is None:
            change = self._batches[batch_id] = Counter()
        return change

    def purges(self, endpoint_id: str) -> int:
        """How often the queue of an endpoint has been purged."""
        purges = self._knowledge.purges
        number = purges.get(endpoint_id)
        if number is None:
            row = self.execute("purges", (endpoint_id,)).fetchone()
            number = purges[endpoint_id] = 0 if row is None else row[0]
        return number

    def next_seqs(self, count: int) -> range:
        """Numbers for new jobs, higher than those of all there are."""
        knowledge = self._knowledge
        last = knowledge.last_seq
        if last is None:
            last = self.execute("last_seq").fetchone()[0]
        knowledge.last_seq = last + count
        return range(last + 1, last + 1 + count)

    def queued_elsewhere(self) -> None:
        """Say that the database has queued jobs by itself and given them their numbers."""
        self._knowledge.last_seq = None
        self.inputs.clear()

    def purge(self, endpoint_id: str) -> None:
        """Count one more purge of a queue, whose counters are zero from now on."""
        self.flush()
        self._knowledge.purges[endpoint_id] = self.purges(endpoint_id) + 1
        self.jobs.clear()
        self.execute("purge_counters", (endpoint_id,))
        self.execute("purge_batches", (endpoint_id,))

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
                    change.queued_bytes,
                    change.in_progress,
                    change.completed,
                    change.failed,
                    change.retried,
                ),
            )
        self._changes.clear()
        for batch_id, moved in self._batches.items():
            self.execute(
                "change_batch",
                (
                    moved["queued"],
                    moved["in_progress"],
                    moved["completed"],
                    moved["failed"],
                    moved["cancelled"],
                    batch_id,
                ),
            )
        self._batches.clear()


@functools.cache
def _for_rows(query: str, number: int) -> str:
    """A named query for that many rows."""
    return re.sub(
        r"VALUES (\([^()]*\))", lambda row: "VALUES " + ", ".join([row[1]] * number), QUERIES[query]
    )


@dataclass(frozen=True, slots=True, eq=False)
class Bulk(Generic[I, T]):
    """A way to run alike operations of one group in one go.

    Attributes:
        order: Precedence in a segment; a smaller number runs first.
        run: Runs several of them and returns for each, in order, its result or its refusal.
    """

    order: int
    run: Callable[[Transaction, Sequence[I]], Sequence[T | PilotlightError]]


class Operation(msgspec.Struct, eq=False):
    """One operation that was asked for: `run`, or an item of a bulk.

    Attributes:
        run: What is to be done; None for an item.
        future: Of the result.
        size: Bytes it carries.
        bulk: How items like this one are done.
        item: The item.
        drawn: Whether it has had its turn.
        answered: Whether its result has been handed out, be it to a future that was cancelled.
        value: What came of it.
        error: What went wrong; None when nothing did.
    """

    run: Callable[[Transaction], Any] | None
    future: asyncio.Future[Any]
    size: int
    bulk: Bulk[Any, Any] | None = None
    item: Any = None
    drawn: bool = False
    answered: bool = False
    value: Any = None
    error: BaseException | None = None


class DatabaseThread:
    """One thread, one connection, one queue of operations. Made and used on one event loop.

    Args:
        name: Of the thread.
        connect: Opens the connection; runs in the thread, and its error is raised by `start`.
        begin: The statement that opens a transaction.
        knowledge: What it knows between its transactions; None when others write what it reads.
        publish: Called on the loop with what became of jobs, before those who asked for it are answered.
        release: Called in the thread at its very end, whatever happened.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], sqlite3.Connection],
        *,
        begin: str,
        knowledge: Knowledge | None = None,
        publish: Callable[[Changes], None] = lambda _: None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._connect = connect
        self._begin = begin
        self._knowledge = knowledge
        self._publish = publish
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # The loop alone puts in and counts what comes, the thread alone takes out and counts what goes, so
        # neither ever waits for a lock that the other holds. The last thing put in is None.
        self._inbox: SimpleQueue[Operation | None] = SimpleQueue()
        self._bytes_in = 0
        self._bytes_out = 0
        self._stopping = False
        self._emptied = False
        self._drawing = threading.Lock()
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

    def submit(
        self, run: Callable[[Transaction], T], *, size: int = 0, new_work: bool = False
    ) -> asyncio.Future[T]:
        """A future of the operation's result; done only after the commit.

        An operation whose future is cancelled before its turn is left out; later it happens unseen.

        Args:
            run: The operation.
            size: Bytes it carries, for the bound on memory.
            new_work: Whether it brings what can be refused without harm. What finishes accepted work, such as
                a result, has more room: refusing it would do the work twice.

        Raises:
            StoreError: Closed, broken, or too much is waiting; nothing was done.
        """
        return self._enqueue(Operation(run, self._loop.create_future(), size), new_work=new_work).future

    def submit_item(self, bulk: Bulk[I, T], item: I, *, size: int = 0, new_work: bool = False) -> Operation:
        """Like `submit`, for an item of a bulk, and for `withdraw`."""
        operation = Operation(None, self._loop.create_future(), size, bulk, item)
        return self._enqueue(operation, new_work=new_work)

    def _enqueue(self, operation: Operation, *, new_work: bool) -> Operation:
        if self._stopping:
            raise StoreError("the store is closed")
        waiting, size = self._inbox.qsize(), operation.size
        share = 1 if new_work else HEADROOM
        if waiting >= PENDING_MAX * share or (
            waiting and self._bytes_in - self._bytes_out + size > PENDING_BYTES_MAX * share
        ):
            raise StoreError(f"the store is overloaded: {waiting} operations wait for the disk; try again")
        self._bytes_in += size
        self._inbox.put(operation)
        return operation

    async def call(self, run: Callable[[Transaction], T], *, size: int = 0, new_work: bool = False) -> T:
        """The result of an operation, see `submit`."""
        return await self.submit(run, size=size, new_work=new_work)

    def withdraw(self, operation: Operation) -> asyncio.Future[Any] | None:
        """For who has been cancelled while waiting: None when the operation is left out, else a new future.

        That future is of the result of an operation that had its turn.
        """
        with self._drawing:
            if not operation.drawn:
                operation.future.cancel()
                return None
        if operation.future.cancelled():
            operation.future = self._loop.create_future()
            # The answer may have come between the cancelling and its arrival here.
            if operation.answered:
                _settle(operation)
        return operation.future

    def stop(self) -> None:
        """Accept nothing more; what was accepted is finished. Returns at once, idempotent."""
        if not self._stopping:
            self._stopping = True
            self._inbox.put(None)

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
            changes: Changes | None = None
            try:
                changes = self._run_group(connection, group)
            except Exception as error:  # noqa: BLE001 - a defect must not leave callers waiting for ever
                _refuse(group, error)
            self._on_loop(self._answer, group, changes)

    def _next_group(self) -> list[Operation]:
        """Up to `GROUP_MAX` waiting operations; empty when the thread has to end."""
        group: list[Operation] = []
        while not group and not self._emptied:
            waiting = [self._inbox.get()]
            with contextlib.suppress(Empty):
                while len(waiting) < GROUP_MAX:
                    waiting.append(self._inbox.get_nowait())
            with self._drawing:
                for operation in waiting:
                    if operation is None:
                        self._emptied = True
                        continue
                    self._bytes_out += operation.size
                    if not operation.future.cancelled():
                        operation.drawn = True
                        group.append(operation)
        return group

    def _run_group(self, connection: sqlite3.Connection, group: Sequence[Operation]) -> Changes | None:
        one_by_one = False
        while group:
            knowledge = self._knowledge or Knowledge()
            transaction = Transaction(connection, knowledge)
            running: Sequence[Operation] = ()
            try:
                connection.execute(self._begin)
                for running in _runs(group, one_by_one=one_by_one):
                    _run(transaction, running)
                running = ()
                transaction.flush()
                connection.execute("COMMIT")
            except Exception as error:  # noqa: BLE001 - sorted below by whose fault it is
                _roll_back(connection)
                knowledge.roll_back()
                if not running or _is_database_failure(error):
                    _refuse(group, _store_error(error))
                    return None
                if len(running) > 1:
                    one_by_one = True
                    continue
                _refuse(running, _own_error(error))
                group = [each for each in group if each is not running[0]]
                continue
            return knowledge.commit()
        return None

    def _answer(self, operations: Sequence[Operation], changes: Changes | None) -> None:
        if changes is not None:
            self._publish(changes)
        for operation in operations:
            operation.answered = True
            if not operation.future.done():
                _settle(operation)

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        # The loop may be gone when a process ends without closing the store; nobody waits then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


def _runs(group: Sequence[Operation], *, one_by_one: bool) -> Iterator[list[Operation]]:
    """The operations of a group as they are to be run: items of one bulk together, unless told otherwise."""
    segment: dict[Bulk[Any, Any], list[Operation]] = {}
    for operation in group:
        if operation.bulk is not None and not one_by_one:
            segment.setdefault(operation.bulk, []).append(operation)
            continue
        yield from _in_order(segment)
        segment = {}
        yield [operation]
    yield from _in_order(segment)


def _in_order(segment: dict[Bulk[Any, Any], list[Operation]]) -> list[list[Operation]]:
    if len(segment) < 2:
        return list(segment.values())
    return [segment[bulk] for bulk in sorted(segment, key=lambda bulk: bulk.order)]


def _run(transaction: Transaction, operations: Sequence[Operation]) -> None:
    first = operations[0]
    if first.run is not None:
        first.value = first.error = None
        try:
            first.value = first.run(transaction)
        except PilotlightError as error:
            first.error = error
        return
    assert first.bulk is not None
    answers = first.bulk.run(transaction, [operation.item for operation in operations])
    for operation, answer in zip(operations, answers, strict=True):
        refused = isinstance(answer, PilotlightError)
        operation.value, operation.error = (None, answer) if refused else (answer, None)


def _refuse(operations: Sequence[Operation], error: Exception) -> None:
    for operation in operations:
        operation.error = error


def _settle(operation: Operation) -> None:
    if operation.error is None:
        operation.future.set_result(operation.value)
    else:
        operation.future.set_exception(operation.error)


def _succeed(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


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
