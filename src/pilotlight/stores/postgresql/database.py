"""Transactions on a pool of connections: begun, committed, tried again, and never half done.

Theory of operation. Every call of the store is one transaction, run in a task of its own, so that a caller
that is cancelled leaves no connection in the middle of a conversation: its transaction happens unseen.

What may go wrong:

1. The operation refuses (`PilotlightError`): rolled back, the caller gets the refusal.
2. Two transactions hold what the other wants, or would have to be put in order: PostgreSQL ends one, and
   it runs again, a bounded number of times. So an operation must not change anything but the database.
3. The database or the way to it fails before the commit was sent: nothing was done, `StoreError`. The pool
   replaces dead connections, so later calls work as soon as the server does.
4. The connection is lost while the commit is under way. Only the database knows what became of it. The
   operation has left a question behind that tells (`Transaction.happened`): whether the job is there,
   whether it is in the state that was written. It is asked on a new connection, for a bounded time. "Yes"
   is success; "no" and "nobody can say" are `StoreError`, the latter saying so. Then a job may exist that
   its client was told to submit again: it may run twice, but no acknowledged one is ever lost.
   (Transaction numbers could not answer this: after a crash PostgreSQL may hand the same one out again.)

Transactions that change jobs share the queue lock, an advisory lock; a purge has it alone for the moment
in which it begins a new life of a queue, so that what it counts is exact. It is taken together with BEGIN.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from enum import Enum
from typing import Any, TypeVar

import asyncpg

from pilotlight.errors import PilotlightError, StoreError
from pilotlight.stores.postgresql.connections import FAILURES, LOST, encode_all, store_error, translated
from pilotlight.stores.postgresql.sql import QUERIES

T = TypeVar("T")

PENDING_MAX = 10_000
"""Calls that may wait for the database; beyond it new work is refused, and so is reading."""

PENDING_BYTES_MAX = 512 * 1024 * 1024
"""Bytes of bodies that may wait in memory for the database."""

HEADROOM = 2
"""How many times as much may wait before what finishes accepted work is refused, too."""

_TRIES = 6
"""Times a transaction is begun at most when PostgreSQL ends it for the sake of another."""

_PURGE_TRIES = 50
"""Times a transaction is begun that wants the queue lock for itself: a dozen seconds in all."""

_RESOLVE_S = 10.0
"""How long the outcome of a commit is inquired after; a server is back after a crash in a few seconds."""

_RESOLVE_PAUSE_S = 0.1

_FINISH_S = 30.0
"""How long `close` waits for what was accepted."""

_MIGRATION_TIMEOUT_S = 3600.0
"""For the migration of a large database, and for another gateway's to end."""

_ACQUIRE_TIMEOUT_S = 30.0
"""For a connection: longer than a queue of calls takes, so that nobody waits for ever behind a broken one."""

_CONFLICTS = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError)


class Begin(Enum):
    """How a transaction begins; the numbers name advisory locks, 1 being the queue lock."""

    PLAIN = "BEGIN"
    JOBS = "BEGIN; SELECT pg_advisory_xact_lock_shared(1886220396, 1)"
    # Whoever waits for the lock keeps all others from it: not for long, but again and again.
    PURGE = (
        "BEGIN; SET LOCAL lock_timeout = '100ms'; SELECT pg_advisory_xact_lock(1886220396, 1);"
        " SET LOCAL lock_timeout = 0"
    )
    MIGRATION = "BEGIN; SELECT pg_advisory_xact_lock(1886220396, 2)"
    CONFIGURATION = "BEGIN; SELECT pg_advisory_xact_lock(1886220396, 4)"
    DEAD_LETTER = "BEGIN; SELECT pg_advisory_xact_lock(1886220396, 5)"


LEAD_LOCK = (1886220396, 3)
"""The advisory lock of the gateway that leads."""


class Transaction:
    """What an operation works on: a connection inside a transaction, or outside one for a single read.

    Attributes:
        happened: Tells later whether this transaction was committed, or None when it cannot be told any more;
            None where nothing can tell.

    Args:
        connection: The connection.
    """

    __slots__ = ("_connection", "happened")

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.happened: Callable[[Transaction], Awaitable[bool | None]] | None = None

    async def rows(self, query: str, *values: Any) -> Sequence[Any]:
        """All rows of a named query."""
        found: Sequence[Any] = await self._connection.fetch(QUERIES[query], *_sent(values))
        return found

    async def row(self, query: str, *values: Any) -> Any:
        """The first row of a named query; None when there is none."""
        return await self._connection.fetchrow(QUERIES[query], *_sent(values))

    async def value(self, query: str, *values: Any) -> Any:
        """The first column of the first row; None when there is none."""
        return await self._connection.fetchval(QUERIES[query], *_sent(values))

    async def run(self, query: str, *values: Any) -> int:
        """Run a named query; how many rows it changed."""
        tag: str = await self._connection.execute(QUERIES[query], *_sent(values))
        return int(tag.rpartition(" ")[2])

    async def script(self, text: str) -> None:
        """Run statements that we have written ourselves."""
        await self._connection.execute(text, timeout=_MIGRATION_TIMEOUT_S)


def _abandon(connection: Any) -> None:
    """Drop a connection of which nobody knows what it is doing; the pool makes a new one."""
    with contextlib.suppress(asyncpg.InterfaceError):
        connection.terminate()


def _sent(values: Iterable[Any]) -> Iterable[Any]:
    return (encode_all(value) if isinstance(value, list | tuple) else value for value in values)


Work = Callable[[Transaction], Coroutine[Any, Any, T]]


class Backlog:
    """What waits for the database, all kinds of calls together, so that neither memory nor waits grow on."""

    def __init__(self) -> None:
        self._calls = 0
        self._bytes = 0

    def enter(self, size: int, *, new_work: bool) -> None:
        """Count a call that begins to wait; `leave` it when it is over.

        Args:
            size: Bytes it carries.
            new_work: Whether it can be refused without harm. What finishes accepted work, such as a result,
                has more room: refusing it would do the work twice.

        Raises:
            StoreError: Too much waits; it was not counted.
        """
        share = 1 if new_work else HEADROOM
        if self._calls >= PENDING_MAX * share or (
            self._calls and self._bytes + size > PENDING_BYTES_MAX * share
        ):
            raise StoreError(f"the store is overloaded: {self._calls} calls wait for the database; try again")
        self._calls += 1
        self._bytes += size

    def leave(self, size: int) -> None:
        """A call that was counted is over."""
        self._calls -= 1
        self._bytes -= size


class Database:
    """The pool, and the calls under way.

    Args:
        pool: Made by `connections.create_pool`.
        writers: Connections that transactions may have at once; the others are left for reads, so that one
            can look while all transactions wait for something.

    Attributes:
        backlog: What waits, and how much more may.
    """

    def __init__(self, pool: Any, *, writers: int) -> None:
        self._pool = pool
        self.backlog = Backlog()
        self._writers = asyncio.Semaphore(writers)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Task[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing new is accepted."""
        return self._closing is not None

    async def read(self, work: Work[T]) -> T:
        """The result of an operation that reads with a single query."""
        return await self.apart(self._read(work), new_work=True)

    async def change(self, work: Work[T], done: T, *, size: int = 0) -> T:
        """The result of an operation that changes something with its first and only writing statement.

        Args:
            work: The operation.
            done: Its result, should the answer to it be lost and it turn out to have happened.
            size: Bytes it carries.
        """
        return await self.apart(self._change(work, done), size=size)

    async def write(
        self, work: Work[T], *, begin: Begin = Begin.PLAIN, size: int = 0, new_work: bool = False
    ) -> T:
        """The result of an operation, once it is committed; for `size` and `new_work` see `Backlog`."""
        return await self.apart(self.transact(work, begin=begin), size=size, new_work=new_work)

    async def apart(self, work: Coroutine[Any, Any, T], *, size: int = 0, new_work: bool = False) -> T:
        """The result of something that goes on when its caller is cancelled; `close` waits for it."""
        return await asyncio.shield(self.spawn(work, size=size, new_work=new_work))

    def spawn(
        self, work: Coroutine[Any, Any, T], *, size: int = 0, new_work: bool = False
    ) -> asyncio.Task[T]:
        """Start something that `close` waits for.

        Raises:
            StoreError: Closed, or too much is waiting.
        """
        try:
            if self.closed:
                raise StoreError("the store is closed")
            self.backlog.enter(size, new_work=new_work)
        except StoreError:
            work.close()
            raise
        task = asyncio.create_task(work, name="store-call")
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._ended, size))
        return task

    def _ended(self, size: int, task: asyncio.Task[Any]) -> None:
        self.backlog.leave(size)
        self._tasks.discard(task)
        if not task.cancelled():
            # Its caller may be gone; then nobody asks for the error.
            task.exception()

    async def close(self) -> None:
        """Finish what was accepted, then give up the connections; idempotent."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="store-close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        deadline = asyncio.get_running_loop().time() + _FINISH_S
        while self._tasks and (left_s := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(set(self._tasks), timeout=left_s)
        if self._tasks:
            # A database that does not answer must not keep the gateway from ending.
            self._pool.terminate()
            for task in self._tasks:
                task.cancel()
            return
        try:
            async with asyncio.timeout(5):
                await self._pool.close()
        except FAILURES:
            self._pool.terminate()

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        """A connection; one that breaks in use does not go back to the pool."""
        async with self._pool.acquire(timeout=_ACQUIRE_TIMEOUT_S) as connection:
            try:
                yield connection
            except asyncpg.DataError:
                raise
            except LOST:
                _abandon(connection)
                raise

    async def _read(self, work: Work[T]) -> T:
        try:
            async with self._connection() as connection:
                return await work(Transaction(connection))
        except FAILURES as error:
            raise translated(error) from error

    async def _change(self, work: Work[T], done: T) -> T:
        transaction: Transaction | None = None
        try:
            async with self._connection() as connection:
                transaction = Transaction(connection)
                return await work(transaction)
        except LOST as error:
            if transaction is None or transaction.happened is None:
                raise translated(error) from error
            lost = error
        except FAILURES as error:
            raise translated(error) from error
        await self._resolve(transaction, lost)
        return done

    async def transact(self, work: Work[T], *, begin: Begin) -> T:
        """Run an operation in a transaction; see the module for what may go wrong."""
        tries_max = _PURGE_TRIES if begin is Begin.PURGE else _TRIES
        for tries in range(1, tries_max + 1):
            try:
                async with self._writers:
                    return await self._once(work, begin)
            except _CONFLICTS as error:
                if tries == tries_max:
                    raise translated(error) from error
                await asyncio.sleep(0.005 * tries)
            except FAILURES as error:
                raise translated(error) from error
        raise AssertionError

    async def _once(self, work: Work[T], begin: Begin) -> T:
        async with self._connection() as connection:
            transaction = Transaction(connection)
            try:
                await connection.execute(
                    begin.value, timeout=_MIGRATION_TIMEOUT_S if begin is Begin.MIGRATION else None
                )
                value = await work(transaction)
            except BaseException as error:
                if isinstance(error, LOST) and not isinstance(error, asyncpg.DataError):
                    raise
                with contextlib.suppress(*FAILURES):
                    await connection.execute("ROLLBACK")
                raise
            try:
                await connection.execute("COMMIT")
            except LOST as error:
                _abandon(connection)
                lost = error
            else:
                return value
        await self._resolve(transaction, lost)
        return value

    async def _resolve(self, transaction: Transaction, lost: BaseException) -> None:
        """Return when a commit whose answer never came has happened, else raise `StoreError`."""
        happened = transaction.happened
        deadline = asyncio.get_running_loop().time() + _RESOLVE_S
        while happened is not None and asyncio.get_running_loop().time() < deadline:
            try:
                async with self._connection() as connection:
                    # While the lost session still works on its commit, it has the queue lock; with it to
                    # ourselves we see what became of it.
                    try:
                        await connection.execute(Begin.PURGE.value)
                        answer = await happened(Transaction(connection))
                    finally:
                        await connection.execute("ROLLBACK")
                if answer:
                    return
                if answer is None:
                    break
                raise store_error(lost, "the connection was lost before the commit, nothing was changed")
            except PilotlightError:
                raise
            except FAILURES:
                await asyncio.sleep(_RESOLVE_PAUSE_S)
        raise store_error(lost, "the connection was lost during the commit, which may have happened")
