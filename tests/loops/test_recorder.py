"""The request log's writer: batches, a store that cannot write, rows it will not take."""

from __future__ import annotations

from pilotlight.domain.usage import Outcome, RequestRecord, Road
from pilotlight.errors import StoreError
from pilotlight.gateway.recorder import RequestRecorder
from pilotlight.stores.memory import MemoryStore


def row(number):
    return RequestRecord(
        id=str(number), road=Road.DATA, endpoint_id="e", key_id="k", route="/r", status=200, outcome=Outcome.OK,
        arrival_ms=number,
    )  # fmt: skip


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
