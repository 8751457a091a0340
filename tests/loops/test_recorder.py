"""The request log's writer: batches, a store that cannot write, rows it will not take."""

from __future__ import annotations

import asyncio

from pilotlight.domain.usage import Outcome, RequestRecord, Road
from pilotlight.errors import StoreError
from pilotlight.gateway.recorder import RequestRecorder
from pilotlight.stores.memory import MemoryStore


def row(number, **changes):
    values = {"outcome": Outcome.OK, "status": 200, "key_id": "k", **changes}
    return RequestRecord(
        id=str(number), road=Road.DATA, endpoint_id="e", route="/r", arrival_ms=int(number), **values
    )


async def test_rows_are_kept_while_the_store_cannot_write_and_dropped_when_it_will_not(monkeypatch):
    store = MemoryStore()
    recorder = RequestRecorder(store)
    failures = [StoreError("disk full")]
    add = store.add_requests

    async def refuse(records):
        if failures:
            raise failures.pop(0)
        if any(each.id == "1" for each in records):
            raise OverflowError("int too large")
        await add(records)

    monkeypatch.setattr(store, "add_requests", refuse)
    recorder.record(row(1))
    await recorder.flush()
    recorder.start()
    recorder.record(row(3))
    assert len(recorder._pending) == 2
    await recorder.flush()
    assert recorder._pending == []
    recorder.record(row(2))
    await recorder.stop()
    assert sorted(each.id for each in await store.requests()) == ["2", "3"]


async def test_what_comes_while_it_writes_is_written_the_next_time(monkeypatch):
    """Else a busy gateway would write a few rows at a time all the time, and pay for each write."""
    store = MemoryStore()
    recorder = RequestRecorder(store)
    add, batches = store.add_requests, []

    async def busy(records):
        batches.append(len(records))
        recorder.record(row(f"{len(batches)}00"))
        await add(records)

    monkeypatch.setattr(store, "add_requests", busy)
    monkeypatch.setattr("pilotlight.gateway.recorder._BATCH_MAX", 4)
    for number in range(6):
        recorder.record(row(number))
    await recorder.flush()
    assert (batches, recorder.rows_pending) == ([4, 2], 2)
    await recorder.flush()
    assert (batches, recorder.rows_pending) == ([4, 2, 2], 1)


def test_who_records_starts_hears_when_answers_began():
    """An answer in one piece begins when it is there; what failed, or no worker served, is no answer."""
    heard = []
    recorder = RequestRecorder(MemoryStore(), on_answer=lambda *answer: heard.append(answer))
    recorder.record(row(100, worker_id="w1", first_token_ms=7, duration_ms=90))
    recorder.record(row(200, worker_id="w2", duration_ms=90))
    recorder.record(row(300, worker_id="w3", first_token_ms=7, status=502, outcome=Outcome.FAILED))
    recorder.record(row(400, first_token_ms=7))
    assert heard == [("w1", 100, 107), ("w2", 200, 290)]


class Watcher:
    """An observer that keeps what it is told."""

    def __init__(self):
        self.rows = []
        self.batches = []
        self.closed = False

    def note(self, rows):
        assert not self.closed
        self.rows += [each.id for each in rows]
        self.batches.append(len(rows))

    async def close(self):
        self.closed = True


async def test_observers_hear_of_every_row_once_also_while_the_store_hangs(monkeypatch):
    """1. A write hangs. 2. Rows that come meanwhile are told. 3. The end interrupts the write, and it is made up."""
    store, watcher, hangs = MemoryStore(), Watcher(), asyncio.Event()
    recorder = RequestRecorder(store)
    recorder.observe(watcher)
    add = store.add_requests

    async def hang(records):
        monkeypatch.setattr(store, "add_requests", add)
        hangs.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(store, "add_requests", hang)
    monkeypatch.setattr("pilotlight.gateway.recorder._INTERVAL_S", 0)
    recorder.record(row(1))
    recorder.start()
    await hangs.wait()
    recorder.record(row(2))
    while watcher.rows != ["1", "2"]:
        await asyncio.sleep(0)
    await recorder.stop()
    assert watcher.rows == ["1", "2"]
    assert watcher.closed
    assert sorted(each.id for each in await store.requests()) == ["1", "2"]


async def test_observers_hear_of_many_rows_in_slices():
    recorder, watcher = RequestRecorder(MemoryStore()), Watcher()
    recorder.observe(watcher)
    for number in range(250):
        recorder.record(row(number))
    await recorder.tell()
    assert watcher.batches == [100, 100, 50]


async def test_rows_of_strangers_are_told_and_not_stored():
    store, watcher = MemoryStore(), Watcher()
    recorder = RequestRecorder(store)
    recorder.observe(watcher)
    recorder.record(row(1, key_id="", status=401, outcome=Outcome.REJECTED))
    recorder.record(row(2))
    await recorder.stop()
    assert watcher.rows == ["1", "2"]
    assert [each.id for each in await store.requests()] == ["2"]


async def test_the_oldest_rows_are_given_up_and_counted_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr("pilotlight.gateway.recorder._PENDING_MAX", 20)
    store = MemoryStore()
    recorder = RequestRecorder(store)
    for number in range(21):
        recorder.record(row(number))
    assert (recorder.rows_pending, recorder.rows_dropped) == (19, 2)
    await recorder.flush()
    assert {each.id for each in await store.requests()} == {str(number) for number in range(2, 21)}


async def test_an_observer_with_a_fault_keeps_nothing_from_the_others():
    class Broken(Watcher):
        def note(self, rows):
            raise AssertionError("not as it should be")

    recorder, watcher = RequestRecorder(MemoryStore()), Watcher()
    recorder.observe(Broken())
    recorder.observe(watcher)
    recorder.record(row(1))
    await recorder.tell()
    recorder.record(row(2))
    await recorder.stop()
    assert watcher.rows == ["1", "2"]
