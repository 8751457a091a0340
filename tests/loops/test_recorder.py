"""The request log's writer: batches, a store that cannot write, rows it will not take."""

from __future__ import annotations

from pilotlight.domain.usage import Outcome, RequestRecord, Road
from pilotlight.errors import StoreError
from pilotlight.gateway.recorder import RequestRecorder
from pilotlight.stores.memory import MemoryStore


def row(number, **changes):
    values = {"outcome": Outcome.OK, "status": 200, **changes}
    return RequestRecord(
        id=str(number), road=Road.DATA, endpoint_id="e", key_id="k", route="/r", arrival_ms=number, **values
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


def test_who_records_starts_hears_when_answers_began():
    """An answer in one piece begins when it is there; what failed, or no worker served, is no answer."""
    heard = []
    recorder = RequestRecorder(MemoryStore(), on_answer=lambda *answer: heard.append(answer))
    recorder.record(row(100, worker_id="w1", first_token_ms=7, duration_ms=90))
    recorder.record(row(200, worker_id="w2", duration_ms=90))
    recorder.record(row(300, worker_id="w3", first_token_ms=7, status=502, outcome=Outcome.FAILED))
    recorder.record(row(400, first_token_ms=7))
    assert heard == [("w1", 100, 107), ("w2", 200, 290)]
