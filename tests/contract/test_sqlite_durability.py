"""What only a store on a disk can get wrong: kill -9, full disks, cancellation, groups, a second owner."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from pilotlight.core.lifecycle import Cancelled, ResultPosted
from pilotlight.domain.batch import Batch, BatchDraft
from pilotlight.domain.job import Idempotency, Job, JobCounts, JobStatus
from pilotlight.domain.usage import Outcome, RequestRecord, Road
from pilotlight.errors import DataFolderError, NotFoundError, StoreError
from pilotlight.stores import SqliteStore, open_sqlite_store
from pilotlight.stores.sqlite import threads
from pilotlight.stores.sqlite.jobs import TAKE
from pilotlight.stores.sqlite.threads import Transaction

from ..timeouts import UvLoop  # noqa: TID252

NewJob = Callable[..., Job]
E1 = "endpoint1"
INPUTS = "SELECT body FROM job_inputs"


@asynccontextmanager
async def _held(store: SqliteStore) -> AsyncIterator[asyncio.Event]:
    """Asks the writer for an operation that it does not come out of; the event says that it is in it."""
    entered, leave = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def block(_: Transaction) -> None:
        loop.call_soon_threadsafe(entered.set)
        leave.wait()

    blocked = store._writer.submit(block)
    try:
        yield entered
    finally:
        leave.set()
        await blocked


@asynccontextmanager
async def busy_writer(store: SqliteStore) -> AsyncIterator[None]:
    """Holds the writer inside an operation; what is asked for meanwhile becomes one group."""
    async with _held(store) as entered:
        await entered.wait()
        yield


@asynccontextmanager
async def in_its_turn(store: SqliteStore, call: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """A call that can be kept from happening no more, and has not ended."""
    async with AsyncExitStack() as stack:
        async with busy_writer(store):
            task = asyncio.create_task(call)
            await asyncio.sleep(0)
            entered = await stack.enter_async_context(_held(store))
        await entered.wait()
        yield task


async def settled(store: SqliteStore) -> None:
    """Returns when everything asked of the writer before has happened."""
    await store._writer.call(lambda _: None)


def request(id: str, endpoint_id: str) -> RequestRecord:
    return RequestRecord(
        id=id, road=Road.DATA, endpoint_id=endpoint_id, key_id="k", route="/v1/models", status=200,
        outcome=Outcome.OK, arrival_ms=1,
    )  # fmt: skip


def pragma(name: str, value: int) -> Callable[[Transaction], int]:
    return lambda transaction: transaction._connection.execute(f"PRAGMA {name} = {value}").fetchone()[0]


async def assert_counters_are_true(store: SqliteStore) -> None:
    jobs = await store.jobs(E1, limit=1_000_000)
    counts = await store.counts(E1)
    assert counts.queued == sum(job.status is JobStatus.IN_QUEUE for job in jobs)
    assert counts.in_progress == sum(job.status is JobStatus.IN_PROGRESS for job in jobs)


class TestDurability:
    async def test_everything_is_there_after_close_and_open(self, tmp_path: Path, new_job: NewJob) -> None:
        store = await open_sqlite_store(tmp_path)
        for number in range(3):
            await store.submit(new_job(f"j{number}", number))
        await store.take(E1, "w1", count=2, now_ms=2_000)
        await store.submit(
            new_job("again", webhook="http://example.com/"),
            idempotency=Idempotency(key="k", fingerprint=b"f"),
        )
        await store.apply("again", Cancelled(now_ms=2_100))
        await store.submit(new_job("purged", endpoint_id="endpoint2"))
        await store.purge("endpoint2", now_ms=2_200)
        await store.add_batch(Batch(id="batch_1", endpoint_id=E1), [BatchDraft(id="req_1", input=b"1")])
        await store.append_chunk("j0", "w1", b"chunk", attempt=1, now_ms=2_500, limit_bytes=100)
        await store.apply("j1", ResultPosted(worker_id="w1", now_ms=3_000, output=b"1"))
        before, counts = await store.jobs(E1), await store.counts(E1)
        await store.close()

        store = await open_sqlite_store(tmp_path)
        assert await store.jobs(E1) == before
        assert await store.counts(E1) == counts == JobCounts(queued=1, in_progress=1, completed=1)
        _, chunks = await store.drain_chunks("j0", limit_bytes=100)
        assert [chunk.body for chunk in chunks] == [b"chunk"]
        repeated = await store.submit(new_job("b"), idempotency=Idempotency(key="k", fingerprint=b"f"))
        assert repeated.id == "again"
        assert [delivery.id for delivery in await store.due_webhooks(now_ms=2_100)] == ["again.0"]
        assert await store.take("endpoint2", "w1", count=1, now_ms=3_000) == []
        assert await store.delete_purged(now_ms=3_000) == 1
        assert (await store.batch("batch_1")).total == 1
        await store.close()

    async def test_close_finishes_what_was_accepted(self, tmp_path: Path, new_job: NewJob) -> None:
        store = await open_sqlite_store(tmp_path)
        submits = [asyncio.create_task(store.submit(new_job(f"j{number}"))) for number in range(100)]
        await asyncio.sleep(0)
        await store.close()
        await asyncio.gather(*submits)
        store = await open_sqlite_store(tmp_path)
        assert (await store.counts(E1)).queued == 100
        await store.close()

    async def test_acknowledged_jobs_survive_kill_nine(self, tmp_path: Path) -> None:
        """1. A child submits in a loop and prints each acknowledged id. 2. It is killed in the middle.
        3. Every printed id is in the store, each job as it was, and the counters fit."""
        program = f"""
import asyncio, os
from pathlib import Path
from pilotlight.domain.job import Job
from pilotlight.stores import open_sqlite_store

async def main():
    store = await open_sqlite_store(Path({str(tmp_path)!r}))
    async def submit(task):
        for number in range(1_000_000):
            name = f"{{task}}-{{number}}"
            await store.submit(Job(
                id=name, endpoint_id="endpoint1", input=name.encode() * 50, created_ms=1, queued_ms=1,
                expires_ms=10**13, execution_timeout_ms=1, retention_ms=1,
            ))
            os.write(1, f"{{name}}\\n".encode())
    await asyncio.gather(*(submit(task) for task in range(8)))

asyncio.run(main())
"""
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            acknowledged = [child.stdout.readline() for _ in range(300)]
            child.send_signal(signal.SIGKILL)
            acknowledged += child.stdout.readlines()
            assert child.wait() == -signal.SIGKILL
        names = [line.decode().strip() for line in acknowledged if line.endswith(b"\n")]
        assert len(names) >= 300

        store = await open_sqlite_store(tmp_path)
        for name in names:
            assert (await store.job(name)).input_bytes == len(name) * 50
        bodies = {
            row[0] for row in await store._writer.call(lambda t: t._connection.execute(INPUTS).fetchall())
        }
        assert {name.encode() * 50 for name in names} <= bodies
        await assert_counters_are_true(store)
        check = await store._writer.call(lambda t: t._connection.execute("PRAGMA integrity_check").fetchone())
        assert check == ("ok",)
        await store.close()

    def test_it_works_on_uvloop(self, tmp_path: Path, new_job: NewJob) -> None:
        async def scenario() -> None:
            store = await open_sqlite_store(tmp_path)
            await asyncio.gather(*(store.submit(new_job(f"j{number}")) for number in range(200)))
            taken = await asyncio.gather(
                *(store.take(E1, f"w{number}", count=7, now_ms=2_000) for number in range(32))
            )
            assert len({job.id for jobs in taken for job in jobs}) == 200
            await store.close()

        with asyncio.Runner(loop_factory=UvLoop) as runner:
            runner.run(scenario())

    async def test_synchronous_is_full_unless_chosen(self, tmp_path: Path) -> None:
        for name, legal in (("FULL", 2), ("NORMAL", 1)):
            store = await open_sqlite_store(tmp_path, synchronous=name)
            mode = await store._writer.call(
                lambda t: t._connection.execute("PRAGMA synchronous").fetchone()[0]
            )
            assert mode == legal
            await store.close()
        with pytest.raises(ValueError, match=r"OFF.*FULL"):
            await open_sqlite_store(tmp_path, synchronous="OFF")


class TestFullDisk:
    async def test_a_full_disk_is_a_store_error_and_leaves_nothing_half_done(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. The database may grow by 40 pages. 2. 64 jobs of 16 KiB are submitted at once. 3. Those that
        were acknowledged are there, the others are not. 4. With room again, the store works on."""
        pages = await sqlite_store._writer.call(
            lambda t: t._connection.execute("PRAGMA page_count").fetchone()[0]
        )
        await sqlite_store._writer.call(pragma("max_page_count", pages + 40))
        await sqlite_store.submit(new_job("small"))
        async with busy_writer(sqlite_store):
            submits = [
                asyncio.create_task(sqlite_store.submit(new_job(f"j{number}", input=b"x" * 16_384)))
                for number in range(64)
            ]
            await asyncio.sleep(0)
        results = await asyncio.gather(*submits, return_exceptions=True)
        assert all(isinstance(result, StoreError) for result in results)
        assert "full" in str(results[0])
        assert [job.id for job in await sqlite_store.jobs(E1)] == ["small"]
        await assert_counters_are_true(sqlite_store)

        await sqlite_store._writer.call(pragma("max_page_count", 1_000_000))
        await asyncio.gather(*(sqlite_store.submit(new_job(f"j{number}")) for number in range(64)))
        assert (await sqlite_store.counts(E1)).queued == 65
        await assert_counters_are_true(sqlite_store)

    async def test_state_changes_on_a_full_disk_do_not_happen(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        await sqlite_store.submit(new_job("a"))
        [taken] = await sqlite_store.take(E1, "w1", count=1, now_ms=2_000)
        pages = await sqlite_store._writer.call(
            lambda t: t._connection.execute("PRAGMA page_count").fetchone()[0]
        )
        await sqlite_store._writer.call(pragma("max_page_count", pages))
        result = ResultPosted(worker_id="w1", now_ms=3_000, output=b"x" * 100_000)
        with pytest.raises(StoreError, match="nothing was changed"):
            await sqlite_store.apply("a", result)
        assert await sqlite_store.job("a") == replace(taken, input=b"")
        await sqlite_store._writer.call(pragma("max_page_count", 1_000_000))
        assert (await sqlite_store.apply("a", result)).finished

    async def test_no_operation_of_the_queue_is_half_done_on_a_full_disk(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. A draft, and a running job with a webhook. 2. No room. 3. Finalizing, ending, requests for the
        draft and chunks fail, and everything is as before. 4. With room again each of them works."""
        drafts = [BatchDraft(id=f"req_{number}", input=b"x" * 3_000) for number in range(20)]
        await sqlite_store.add_batch(Batch(id="batch_1", endpoint_id=E1), drafts)
        await sqlite_store.submit(new_job("a", webhook="http://example.com/", input=b"y" * 10_000))
        [taken] = await sqlite_store.take(E1, "w1", count=1, now_ms=2_000)
        operations = [
            lambda: sqlite_store.finalize_batch("batch_1", new_job("", batch_id="batch_1")),
            lambda: sqlite_store.add_batch_requests(
                "batch_1", [BatchDraft(id="req_more", input=b"z" * 100_000)]
            ),
            lambda: sqlite_store.append_chunk(
                "a", "w1", b"c" * 100_000, attempt=1, now_ms=2_100, limit_bytes=10**6
            ),
            lambda: sqlite_store.apply_many(
                [("a", ResultPosted(worker_id="w1", now_ms=3_000, output=b"o" * 100_000))]
            ),
        ]
        before = await sqlite_store.batch("batch_1")
        pages = await sqlite_store._writer.call(
            lambda t: t._connection.execute("PRAGMA page_count").fetchone()[0]
        )
        await sqlite_store._writer.call(pragma("max_page_count", pages))
        for operation in operations:
            with pytest.raises(StoreError, match="nothing was changed"):
                await operation()
        assert await sqlite_store.batch("batch_1") == before
        assert await sqlite_store.batch_requests("batch_1", offset=0, limit=99) == drafts
        assert await sqlite_store.job("a") == replace(taken, input=b"")
        assert not await sqlite_store.has_chunks("a")
        assert await sqlite_store.next_webhook_ms() is None
        await assert_counters_are_true(sqlite_store)
        await sqlite_store._writer.call(pragma("max_page_count", 1_000_000))
        for operation in reversed(operations):
            await operation()
        assert (await sqlite_store.batch("batch_1")).queued == 21
        assert await sqlite_store.next_webhook_ms() == 3_000
        await assert_counters_are_true(sqlite_store)


class TestGroups:
    async def test_an_operation_that_fails_half_way_takes_nobody_with_it(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        def half(transaction: Transaction) -> None:
            transaction.execute(
                "insert_key", ("k", "", "admin", "[]", "h", 1, None, "normal", None, None, None)
            )
            raise ZeroDivisionError

        def twice(transaction: Transaction) -> None:
            transaction.execute("insert_revision", ("e", 1, "m", "{}", None, 0, 0, 0, "[]", ""))
            transaction.execute("insert_revision", ("e", 1, "m", "{}", None, 0, 0, 0, "[]", ""))

        async with busy_writer(sqlite_store):
            first = asyncio.create_task(sqlite_store.submit(new_job("a")))
            await asyncio.sleep(0)
            broken, violating = sqlite_store._writer.submit(half), sqlite_store._writer.submit(twice)
            last = asyncio.create_task(sqlite_store.submit(new_job("b")))
            await asyncio.sleep(0)
        with pytest.raises(ZeroDivisionError):
            await broken
        with pytest.raises(StoreError, match="UNIQUE"):
            await violating
        await asyncio.gather(first, last)
        assert list(await sqlite_store.keys()) == []
        assert list(await sqlite_store.revisions("e")) == []
        assert (await sqlite_store.counts(E1)).queued == 2

    async def test_a_refusal_concerns_only_its_caller(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        async with busy_writer(sqlite_store):
            tasks = [
                asyncio.create_task(sqlite_store.submit(new_job("a"))),
                asyncio.create_task(sqlite_store.apply("nobody", Cancelled(now_ms=1))),
                asyncio.create_task(sqlite_store.submit(new_job("b"))),
            ]
            await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [job.id for job in (results[0], results[2])] == ["a", "b"]
        assert isinstance(results[1], NotFoundError)

    async def test_too_many_waiting_operations_are_refused(
        self, sqlite_store: SqliteStore, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(threads, "PENDING_MAX", 5)
        monkeypatch.setattr(threads, "PENDING_BYTES_MAX", 1_000)
        async with busy_writer(sqlite_store):
            waiting = [asyncio.create_task(sqlite_store.submit(new_job(f"j{number}"))) for number in range(4)]
            await asyncio.sleep(0)
            with pytest.raises(StoreError, match="overloaded"):
                await sqlite_store.submit(new_job("big", input=b"x" * 1_000))
            waiting.append(asyncio.create_task(sqlite_store.submit(new_job("last"))))
            await asyncio.sleep(0)
            with pytest.raises(StoreError, match="overloaded"):
                await sqlite_store.submit(new_job("too many"))
            # What ends work that was accepted is still taken.
            end = asyncio.create_task(sqlite_store.apply("j0", Cancelled(now_ms=1)))
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        assert (await end).after.status == "CANCELLED"
        assert (await sqlite_store.counts(E1)).queued == 4

    async def test_a_read_sees_every_write_whose_await_returned(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        async def write_and_read(task: int) -> None:
            for number in range(20):
                await sqlite_store.submit(new_job(f"{task}-{number}"))
                assert (await sqlite_store.job(f"{task}-{number}")).id == f"{task}-{number}"

        await asyncio.gather(*(write_and_read(task) for task in range(16)))


class TestCancellation:
    async def test_a_call_cancelled_before_its_turn_does_not_happen(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        await sqlite_store.submit(new_job("a"))
        async with busy_writer(sqlite_store):
            submit = asyncio.create_task(sqlite_store.submit(new_job("b")))
            await asyncio.sleep(0)
            submit.cancel()
            with pytest.raises(asyncio.CancelledError):
                await submit
        with pytest.raises(NotFoundError):
            await sqlite_store.job("b")
        assert (await sqlite_store.counts(E1)).queued == 1

    async def test_a_cancelled_take_gives_its_jobs_back(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. A take is running when its caller is cancelled. 2. Its job is at the head of the queue again,
        no retry used up. 3. The next taker gets it."""
        await sqlite_store.submit(new_job("a"))
        async with in_its_turn(sqlite_store, sqlite_store.take(E1, "w1", count=1, now_ms=2_000)) as take:
            take.cancel()
            with pytest.raises(asyncio.CancelledError):
                await take
        await settled(sqlite_store)
        job = await sqlite_store.job("a")
        assert (job.status, job.retries, job.attempt) == (JobStatus.IN_QUEUE, 0, 1)
        assert [each.id for each in await sqlite_store.take(E1, "w2", count=1, now_ms=2_100)] == ["a"]

    async def test_requests_whose_appending_was_cancelled_may_be_appended_again(
        self, sqlite_store: SqliteStore
    ) -> None:
        """Whoever cancelled cannot know whether it happens. 1. Before its turn it does not, 2. in its turn it
        does; 3. both are appended again with others, 4. which is cancelled, too."""
        kept_out, written, others = (
            [request(f"{name}{number}", f"e{number % 3}") for number in range(5)] for name in "kwo"
        )
        async with busy_writer(sqlite_store):
            add = asyncio.create_task(sqlite_store.add_requests(kept_out))
            await asyncio.sleep(0)
            add.cancel()
            await asyncio.wait([add])
        for batch in (written, [*kept_out, *written, *others[:2]]):
            async with in_its_turn(sqlite_store, sqlite_store.add_requests(batch)) as add:
                add.cancel()
                await asyncio.wait([add])
            await settled(sqlite_store)
        await sqlite_store.add_requests([*kept_out, *written, *others])
        found = sorted(record.id for record in await sqlite_store.requests())
        assert found == sorted(record.id for record in (*kept_out, *written, *others))

    async def test_a_storm_of_cancellations_breaks_nothing(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        tasks = [asyncio.create_task(sqlite_store.submit(new_job(f"j{number}"))) for number in range(400)]
        for number, task in enumerate(tasks):
            if number % 3 == 0:
                task.cancel()
            if number % 50 == 0:
                await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        stored = {job.id for job in await sqlite_store.jobs(E1, limit=1_000)}
        assert {f"j{number}" for number, result in enumerate(results) if isinstance(result, Job)} <= stored
        await assert_counters_are_true(sqlite_store)


class TestOwnership:
    async def test_a_second_opener_is_told_who_has_the_folder(self, tmp_path: Path) -> None:
        store = await open_sqlite_store(tmp_path)
        with pytest.raises(DataFolderError, match=rf"{tmp_path}.*pid {os.getpid()}\b"):
            await open_sqlite_store(tmp_path)
        await store.close()
        await (await open_sqlite_store(tmp_path)).close()

    async def test_another_process_is_told_too_and_does_no_harm(
        self, tmp_path: Path, new_job: NewJob
    ) -> None:
        store = await open_sqlite_store(tmp_path)
        program = f"""
import asyncio
from pathlib import Path
from pilotlight.stores import open_sqlite_store
asyncio.run(open_sqlite_store(Path({str(tmp_path)!r})))
"""
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stderr=asyncio.subprocess.PIPE
        )
        _, stderr = await child.communicate()
        assert child.returncode == 1
        assert f"in use by another pilotlight (pid {os.getpid()})" in stderr.decode()
        await store.submit(new_job("a"))
        await store.close()

    async def test_folder_and_files_are_private(self, tmp_path: Path, new_job: NewJob) -> None:
        home = tmp_path / "deep" / "home"
        store = await open_sqlite_store(home)
        await store.submit(new_job("a"))
        assert home.stat().st_mode & 0o777 == 0o700
        assert {path.name: path.stat().st_mode & 0o777 for path in home.iterdir()} == dict.fromkeys(
            ("lock", "pilotlight.db", "pilotlight.db-wal", "pilotlight.db-shm"), 0o600
        )
        await store.close()

    async def test_an_open_folder_is_restricted(self, tmp_path: Path) -> None:
        home = tmp_path / "home"
        home.mkdir()
        home.chmod(0o755)
        await (await open_sqlite_store(home)).close()
        assert home.stat().st_mode & 0o777 == 0o700

    async def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(DataFolderError, match=rf"{tmp_path}/file/home is not writable.*PILOTLIGHT_HOME"):
            await open_sqlite_store(tmp_path / "file" / "home")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    async def test_a_folder_that_may_not_be_written(self, tmp_path: Path) -> None:
        home = tmp_path / "home"
        home.mkdir(mode=0o500)
        with pytest.raises(DataFolderError, match=rf"{home} is not writable: Permission denied"):
            await open_sqlite_store(home)

    async def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        (tmp_path / "pilotlight.db").write_bytes(b"this is not a database at all" * 100)
        for _ in range(2):  # the lock is given up after the failure
            with pytest.raises(DataFolderError, match=r"pilotlight\.db.*not a database"):
                await open_sqlite_store(tmp_path)

    async def test_a_database_of_a_newer_version(self, tmp_path: Path) -> None:
        await (await open_sqlite_store(tmp_path)).close()
        with sqlite3.connect(tmp_path / "pilotlight.db") as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.close()
        with pytest.raises(DataFolderError, match=r"newer version.*9999"):
            await open_sqlite_store(tmp_path)

    async def test_an_opening_that_is_cancelled_gives_the_folder_up(self, tmp_path: Path) -> None:
        before = set(threading.enumerate())
        opening = asyncio.create_task(open_sqlite_store(tmp_path))
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith("store-"):
                await asyncio.to_thread(thread.join)
        await (await open_sqlite_store(tmp_path)).close()


async def test_a_take_that_is_answered_between_its_cancelling_and_the_callers_turn_is_given_back(
    sqlite_store: SqliteStore, new_job: NewJob
) -> None:
    """The result went to a future that was cancelled already; whoever withdraws gets it all the same."""
    await sqlite_store.submit(new_job("a"))
    writer = sqlite_store._writer
    order = writer.submit_item(TAKE, (new_job("a").endpoint_id, "w", 1, 2_000, frozenset()))
    # The loop stands still meanwhile, so the answer cannot arrive before the cancelling.
    while not order.drawn:
        time.sleep(0.001)
    order.future.cancel()
    while not order.answered:
        await asyncio.sleep(0.001)
    picked = writer.withdraw(order)
    assert picked is not None
    assert [job.id for job in await asyncio.wait_for(picked, 20)] == ["a"]
