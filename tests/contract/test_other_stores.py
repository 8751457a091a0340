"""Endpoints, keys, workers, usage, requests and starts: the other ports, on every implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pilotlight.domain.endpoint import Container, Endpoint, Routing, ScalerType, Volume
from pilotlight.domain.key import ApiKey, Priority, Scope
from pilotlight.domain.usage import Outcome, RequestRecord, Road, StartRecord, UsageInterval
from pilotlight.domain.worker import Failure, ProcessIdentity, Stage, Worker, WorkerState
from pilotlight.errors import ConflictError, NotFoundError
from pilotlight.ports.store import Store

NewEndpoint = Callable[..., Endpoint]


def revised(endpoint: Endpoint, version: int, **changes: object) -> Endpoint:
    return replace(endpoint, revision=replace(endpoint.revision, version=version, **changes))


class TestEndpoints:
    async def test_endpoints_read_back_oldest_first(self, store: Store, new_endpoint: NewEndpoint) -> None:
        late = new_endpoint("late", created_ms=2, scaler=ScalerType.REQUEST_COUNT, scaler_value=3.5)
        early = new_endpoint("early", created_ms=1, flashboot=False, workers_max=0, routing=Routing.SESSION)
        also_late = new_endpoint("also-late", created_ms=2)
        for endpoint in (late, early, also_late):
            await store.add_endpoint(endpoint)
        assert list(await store.endpoints()) == [early, late, also_late]
        assert list(await store.revisions("late")) == [late.revision]

    async def test_a_name_belongs_to_one_living_endpoint(
        self, store: Store, new_endpoint: NewEndpoint
    ) -> None:
        await store.add_endpoint(new_endpoint("a", name="same"))
        with pytest.raises(ConflictError, match="same"):
            await store.add_endpoint(new_endpoint("b", name="same"))
        await store.delete_endpoint("a", now_ms=5)
        await store.add_endpoint(new_endpoint("b", name="same"))
        assert [endpoint.id for endpoint in await store.endpoints()] == ["b"]

    async def test_an_id_is_never_used_again(self, store: Store, new_endpoint: NewEndpoint) -> None:
        await store.add_endpoint(new_endpoint("a", name="first"))
        with pytest.raises(ConflictError):
            await store.add_endpoint(new_endpoint("a", name="second"))
        await store.delete_endpoint("a", now_ms=5)
        with pytest.raises(ConflictError):
            await store.add_endpoint(new_endpoint("a", name="third"))
        assert list(await store.endpoints()) == []

    async def test_settings_are_replaced(self, store: Store, new_endpoint: NewEndpoint) -> None:
        endpoint = new_endpoint()
        await store.add_endpoint(endpoint)
        changed = replace(endpoint, name="new", workers_min=1, idle_timeout_ms=5, updated_ms=9)
        await store.update_endpoint(changed)
        assert list(await store.endpoints()) == [changed]
        assert list(await store.revisions(endpoint.id)) == [endpoint.revision]

    async def test_revisions_are_added_and_never_changed(
        self, store: Store, new_endpoint: NewEndpoint
    ) -> None:
        first = new_endpoint()
        container = Container(
            image="registry/worker:1",
            volumes=(Volume(source="/data", target="/runpod-volume", read_only=True),),
            shm_bytes=2**31,
            registry_user="me",
            registry_password="sealed",
        )
        second = revised(first, 2, model="other/model", engine_url="http://127.0.0.1:9", container=container)
        await store.add_endpoint(first)
        await store.update_endpoint(second)
        assert list(await store.endpoints()) == [second]
        assert list(await store.revisions(first.id)) == [second.revision, first.revision]
        for wrong in (first, revised(second, 4), revised(second, 2, model="changed/later")):
            with pytest.raises(ConflictError, match="version"):
                await store.update_endpoint(wrong)
        assert list(await store.endpoints()) == [second]
        assert list(await store.revisions(first.id)) == [second.revision, first.revision]

    async def test_an_update_may_not_take_a_name(self, store: Store, new_endpoint: NewEndpoint) -> None:
        taken, endpoint = new_endpoint("a", name="taken"), new_endpoint("b", name="mine")
        await store.add_endpoint(taken)
        await store.add_endpoint(endpoint)
        with pytest.raises(ConflictError, match="taken"):
            await store.update_endpoint(replace(revised(endpoint, 2), name="taken"))
        assert list(await store.endpoints()) == [taken, endpoint]
        assert len(await store.revisions("b")) == 1

    async def test_unknown_and_deleted_endpoints(self, store: Store, new_endpoint: NewEndpoint) -> None:
        await store.add_endpoint(new_endpoint("a"))
        await store.delete_endpoint("a", now_ms=5)
        for endpoint_id in ("a", "nobody"):
            with pytest.raises(NotFoundError, match=endpoint_id):
                await store.delete_endpoint(endpoint_id, now_ms=6)
            with pytest.raises(NotFoundError, match=endpoint_id):
                await store.update_endpoint(new_endpoint(endpoint_id))
        assert list(await store.revisions("nobody")) == []


class TestKeys:
    async def test_keys_read_back_oldest_first(self, store: Store) -> None:
        admin = ApiKey(id="k2", name="admin", scope=Scope.ADMIN, hash="h2", created_ms=2)
        run = ApiKey(
            id="k1", name="", scope=Scope.RUN, endpoint_ids=frozenset({"a", "b"}), hash="h1", created_ms=1,
            heartbeat_s=2.5, priority=Priority.HIGH, requests_per_minute=60, tokens_per_minute=10**12,
            concurrent_max=3,
        )  # fmt: skip
        await store.add_key(admin)
        await store.add_key(run)
        assert list(await store.keys()) == [run, admin]

    async def test_id_and_hash_are_unique(self, store: Store) -> None:
        key = ApiKey(id="k", name="", scope=Scope.ADMIN, hash="h")
        await store.add_key(key)
        for clash in (replace(key, hash="other"), replace(key, id="other")):
            with pytest.raises(ConflictError):
                await store.add_key(clash)
        assert list(await store.keys()) == [key]

    async def test_what_may_change_of_a_key(self, store: Store) -> None:
        key = ApiKey(
            id="k", name="old", scope=Scope.RUN, endpoint_ids=frozenset({"a"}), hash="h", created_ms=3
        )
        await store.add_key(key)
        terms: dict[str, Any] = {
            "name": "new",
            "heartbeat_s": 2.0,
            "priority": Priority.LOW,
            "requests_per_minute": 1,
            "tokens_per_minute": 2,
            "concurrent_max": 3,
        }
        changed = replace(key, **terms)
        await store.update_key(
            replace(changed, scope=Scope.ADMIN, endpoint_ids=frozenset(), hash="x", created_ms=9)
        )
        assert list(await store.keys()) == [changed]
        await store.update_key(key)
        assert list(await store.keys()) == [key]
        with pytest.raises(NotFoundError, match="nobody"):
            await store.update_key(replace(key, id="nobody"))

    async def test_a_deleted_key_is_forgotten(self, store: Store) -> None:
        key = ApiKey(id="k", name="", scope=Scope.ADMIN, hash="h")
        await store.add_key(key)
        await store.delete_key("k")
        assert list(await store.keys()) == []
        with pytest.raises(NotFoundError, match="k"):
            await store.delete_key("k")
        await store.add_key(key)


class TestWorkers:
    FULL = Worker(
        id="w1",
        endpoint_id="e1",
        version=3,
        state=WorkerState.FAILED,
        stage=Stage.LOADING_WEIGHTS,
        key_hash="abc",
        devices=(0, 2),
        memory_bytes=5 * 2**30,
        process=ProcessIdentity(pid=12, started_ticks=10**12, boot_id="b-1"),
        failure=Failure(kind="out_of_memory", cause='said "no"', advice="é"),
        created_ms=5,
        ready_ms=7,
        state_ms=8,
        ended_ms=9,
    )

    async def test_a_worker_reads_back_as_it_was(self, store: Store) -> None:
        bare = Worker(id="w2", endpoint_id="e1", version=1, created_ms=1)
        await store.put_worker(self.FULL)
        await store.put_worker(bare)
        assert list(await store.workers(living=False)) == [bare, self.FULL]
        assert await store.worker(self.FULL.id) == self.FULL
        assert await store.worker("unknown") is None

    async def test_a_record_is_replaced(self, store: Store) -> None:
        worker = Worker(id="w", endpoint_id="e1", version=1)
        await store.put_worker(worker)
        ready = replace(worker, state=WorkerState.READY, ready_ms=5, state_ms=5)
        await store.put_worker(ready)
        assert list(await store.workers()) == [ready]

    async def test_living_ones_of_an_endpoint(self, store: Store) -> None:
        for number, state in enumerate(WorkerState):
            await store.put_worker(
                Worker(id=state, endpoint_id="e1", version=1, state=state, created_ms=number)
            )
        await store.put_worker(Worker(id="other", endpoint_id="e2", version=1, created_ms=99))
        living = [state.value for state in WorkerState if not state.ended]
        assert [worker.id for worker in await store.workers(endpoint_id="e1")] == living
        assert [worker.id for worker in await store.workers()] == [*living, "other"]
        assert len(await store.workers(endpoint_id="e1", living=False)) == len(WorkerState)

    async def test_prune_forgets_those_that_ended_earlier(self, store: Store) -> None:
        await store.put_worker(self.FULL)
        await store.put_worker(replace(self.FULL, id="later", ended_ms=10))
        await store.put_worker(Worker(id="living", endpoint_id="e1", version=1))
        assert await store.prune_workers(ended_before_ms=9) == 0
        assert await store.prune_workers(ended_before_ms=10) == 1
        assert {worker.id for worker in await store.workers(living=False)} == {"later", "living"}


class TestUsage:
    async def test_intervals_are_appended_once(self, store: Store) -> None:
        def interval(worker: str, sequence: int, start: int, end: int, endpoint: str = "e1") -> UsageInterval:
            return UsageInterval(
                worker_id=worker,
                sequence=sequence,
                endpoint_id=endpoint,
                version=1,
                state=WorkerState.READY,
                devices=1,
                start_ms=start,
                end_ms=end,
            )

        a0, a1 = interval("a", 0, 0, 10), interval("a", 1, 10, 20)
        b0, c0 = interval("b", 0, 0, 15), interval("c", 0, 5, 30, "e2")
        await store.add_usage([a1, c0, b0])
        await store.add_usage([a0, replace(a1, end_ms=99)])
        await store.add_usage([])
        assert list(await store.usage()) == [a0, b0, c0, a1]
        assert list(await store.usage(since_ms=10)) == [b0, c0, a1]
        assert list(await store.usage(endpoint_id="e1", since_ms=15)) == [a1]
        assert list(await store.usage(worker_id="a")) == [a0, a1]
        assert list(await store.usage(endpoint_id="e2", worker_id="a")) == []


class TestRequests:
    @staticmethod
    def record(record_id: str, arrival: int, endpoint: str = "e1") -> RequestRecord:
        return RequestRecord(
            id=record_id,
            road=Road.DATA,
            endpoint_id=endpoint,
            key_id="k",
            route="/v1/chat/completions",
            status=200,
            outcome=Outcome.OK,
            arrival_ms=arrival,
        )

    async def test_newest_first(self, store: Store) -> None:
        full = msgspec.structs.replace(
            self.record("full", 5),
            road=Road.JOB,
            worker_id="w",
            outcome=Outcome.DISCONNECTED,
            wait_ms=1,
            first_token_ms=2,
            duration_ms=3,
            tokens_in=4,
            tokens_out=5,
            estimated=True,
        )
        a, b, other = self.record("a", 1), self.record("b", 5), self.record("x", 9, "e2")
        await store.add_requests([full, a])
        await store.add_requests([b, other])
        assert list(await store.requests()) == [other, b, full, a]
        assert list(await store.requests(endpoint_id="e1", limit=2)) == [b, full]
        assert list(await store.requests(limit=0)) == []
        assert list(await store.requests(endpoint_id="e3")) == []

    async def test_those_that_lasted_are_found_at_their_arrival(self, store: Store) -> None:
        """Requests are appended as they end; one that came first may end last."""
        ends = [[8, 9], [1, 10], [2, 3], [11, 4], [5]]
        for batch in ends:
            await store.add_requests([self.record(f"r{at}", at, "e1" if at % 2 else "e2") for at in batch])
        for limit in range(1, 12):
            newest = [record.arrival_ms for record in await store.requests(limit=limit)]
            assert newest == [11, 10, 9, 8, 5, 4, 3, 2, 1][:limit]
            odd = [record.arrival_ms for record in await store.requests(endpoint_id="e1", limit=limit)]
            assert odd == [11, 9, 5, 3, 1][:limit]

    async def test_prune_keeps_the_newest(self, store: Store) -> None:
        await store.add_requests([self.record(f"r{number}", number) for number in range(10)])
        assert await store.prune_requests(keep=3) == 7
        assert await store.prune_requests(keep=3) == 0
        assert [record.id for record in await store.requests()] == ["r9", "r8", "r7"]

    async def test_prune_goes_through_endpoints_and_batches(self, store: Store) -> None:
        for first in range(0, 30, 10):
            await store.add_requests(
                [self.record(f"r{at}", at, f"e{at % 3}") for at in range(first, first + 10)]
            )
        for keep, forgotten in ((30, 0), (29, 1), (21, 8), (4, 17), (0, 4)):
            assert await store.prune_requests(keep=keep) == forgotten
            assert len(await store.requests()) == keep
        await store.add_requests([self.record("new", 1)])
        assert [record.id for record in await store.requests()] == ["new"]


class TestStarts:
    FULL = StartRecord(
        worker_id="w1",
        endpoint_id="e1",
        version=3,
        rung="launchable",
        stages=(("decision", 10), ("spawned", 12), ("ready", 30), ("first_token", 31)),
        outcome="failed",
        memory_bytes=2**40,
        note="the launcher refused: CUDA was touched",
        failure=Failure(kind="out_of_memory", cause="no room", advice="ask for less", line="Killed"),
    )

    async def test_newest_first_and_replaced(self, store: Store) -> None:
        first = replace(self.FULL, stages=(("decision", 10),), outcome="")
        second = replace(first, worker_id="w2", stages=(("decision", 20),), memory_bytes=None, failure=None)
        other = replace(first, worker_id="w3", endpoint_id="e2", stages=())
        for record in (second, first, other, self.FULL):
            await store.put_start(record)
        assert list(await store.starts()) == [second, self.FULL, other]
        assert list(await store.starts(endpoint_id="e1", limit=1)) == [second]

    async def test_a_worker_may_start_several_times(self, store: Store) -> None:
        """Thawed, or resumed under its own id: each start is a record of its own."""
        thaw = replace(self.FULL, rung="frozen", stages=(("decision", 50), ("ready", 90)))
        await store.put_start(self.FULL)
        await store.put_start(thaw)
        later = replace(thaw, stages=(*thaw.stages, ("first_token", 95)), note="")
        await store.put_start(later)
        assert list(await store.starts(endpoint_id="e1")) == [later, self.FULL]
