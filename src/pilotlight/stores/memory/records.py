"""Everything of the in-memory twin but the queue: endpoints, keys, workers, usage, requests, starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import RequestRecord, StartRecord, UsageInterval
from pilotlight.domain.worker import Worker
from pilotlight.errors import StoreError
from pilotlight.stores import common


class MemoryRecords:
    """The ports `EndpointStore`, `KeyStore`, `WorkerStore`, `UsageStore`, `RequestLog` and `StartLog`."""

    def __init__(self) -> None:
        self._closed = False
        self._endpoints: dict[str, Endpoint] = {}
        self._revisions: dict[str, list[Revision]] = {}
        self._keys: dict[str, ApiKey] = {}
        self._workers: dict[str, Worker] = {}
        self._usage: dict[tuple[str, int], UsageInterval] = {}
        self._requests: dict[str, RequestRecord] = {}
        self._starts: dict[tuple[str, int], StartRecord] = {}

    async def close(self) -> None:
        """Refuse everything from now on; idempotent."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the store is closed")

    # Endpoints

    async def add_endpoint(self, endpoint: Endpoint) -> None:
        """See `EndpointStore.add_endpoint`."""
        self._check_open()
        if endpoint.id in self._revisions:
            raise common.id_taken("endpoint", endpoint.id)
        self._check_name(endpoint)
        self._endpoints[endpoint.id] = endpoint
        self._revisions[endpoint.id] = [endpoint.revision]

    async def update_endpoint(self, endpoint: Endpoint) -> None:
        """See `EndpointStore.update_endpoint`."""
        self._check_open()
        stored = self._endpoints.get(endpoint.id)
        if stored is None:
            raise common.endpoint_not_found(endpoint.id)
        self._check_name(endpoint)
        current, revision = stored.revision, endpoint.revision
        if revision.version == current.version + 1:
            self._revisions[endpoint.id].append(revision)
        elif revision != current:
            raise common.wrong_version(endpoint.id, revision.version, current.version)
        self._endpoints[endpoint.id] = endpoint

    def _check_name(self, endpoint: Endpoint) -> None:
        if any(other.name == endpoint.name and other.id != endpoint.id for other in self._endpoints.values()):
            raise common.name_taken(endpoint.name)

    def _deleted(self, endpoint_id: str) -> bool:
        return endpoint_id in self._revisions and endpoint_id not in self._endpoints

    async def delete_endpoint(self, endpoint_id: str, *, now_ms: int) -> None:  # noqa: ARG002 - kept by SQL stores
        """See `EndpointStore.delete_endpoint`."""
        self._check_open()
        if self._endpoints.pop(endpoint_id, None) is None:
            raise common.endpoint_not_found(endpoint_id)

    async def endpoints(self) -> Sequence[Endpoint]:
        """See `EndpointStore.endpoints`."""
        self._check_open()
        return sorted(self._endpoints.values(), key=lambda endpoint: endpoint.created_ms)

    async def revisions(self, endpoint_id: str) -> Sequence[Revision]:
        """See `EndpointStore.revisions`."""
        self._check_open()
        return list(reversed(self._revisions.get(endpoint_id, [])))

    # Keys

    async def add_key(self, key: ApiKey) -> None:
        """See `KeyStore.add_key`."""
        self._check_open()
        if key.id in self._keys or any(other.hash == key.hash for other in self._keys.values()):
            raise common.id_taken("API key", key.id)
        self._keys[key.id] = key

    async def update_key(self, key: ApiKey) -> None:
        """See `KeyStore.update_key`."""
        self._check_open()
        stored = self._keys.get(key.id)
        if stored is None:
            raise common.key_not_found(key.id)
        self._keys[key.id] = replace(
            stored,
            name=key.name,
            heartbeat_s=key.heartbeat_s,
            priority=key.priority,
            requests_per_minute=key.requests_per_minute,
            tokens_per_minute=key.tokens_per_minute,
            concurrent_max=key.concurrent_max,
        )

    async def delete_key(self, key_id: str) -> None:
        """See `KeyStore.delete_key`."""
        self._check_open()
        if self._keys.pop(key_id, None) is None:
            raise common.key_not_found(key_id)

    async def keys(self) -> Sequence[ApiKey]:
        """See `KeyStore.keys`."""
        self._check_open()
        return sorted(self._keys.values(), key=lambda key: key.created_ms)

    # Workers

    async def put_worker(self, worker: Worker) -> None:
        """See `WorkerStore.put_worker`."""
        self._check_open()
        self._workers[worker.id] = worker

    async def worker(self, worker_id: str) -> Worker | None:
        """See `WorkerStore.worker`."""
        self._check_open()
        return self._workers.get(worker_id)

    async def workers(self, *, endpoint_id: str | None = None, living: bool = True) -> Sequence[Worker]:
        """See `WorkerStore.workers`."""
        self._check_open()
        found = (
            worker
            for worker in self._workers.values()
            if endpoint_id in {None, worker.endpoint_id} and not (living and worker.state.ended)
        )
        return sorted(found, key=lambda worker: worker.created_ms)

    async def prune_workers(self, *, ended_before_ms: int) -> int:
        """See `WorkerStore.prune_workers`."""
        self._check_open()
        old = [
            worker.id
            for worker in self._workers.values()
            if worker.ended_ms is not None and worker.ended_ms < ended_before_ms
        ]
        for worker_id in old:
            del self._workers[worker_id]
        return len(old)

    # Usage, requests, starts

    async def add_usage(self, intervals: Sequence[UsageInterval]) -> None:
        """See `UsageStore.add_usage`."""
        self._check_open()
        for interval in intervals:
            self._usage.setdefault((interval.worker_id, interval.sequence), interval)

    async def usage(
        self, *, endpoint_id: str | None = None, worker_id: str | None = None, since_ms: int = 0
    ) -> Sequence[UsageInterval]:
        """See `UsageStore.usage`."""
        self._check_open()
        found = (
            interval
            for interval in self._usage.values()
            if endpoint_id in {None, interval.endpoint_id}
            and worker_id in {None, interval.worker_id}
            and interval.end_ms > since_ms
        )
        return sorted(found, key=lambda interval: (interval.start_ms, interval.worker_id, interval.sequence))

    async def add_requests(self, records: Sequence[RequestRecord]) -> None:
        """See `RequestLog.add_requests`."""
        self._check_open()
        for record in records:
            self._requests.setdefault(record.id, record)

    async def requests(self, *, endpoint_id: str | None = None, limit: int = 100) -> Sequence[RequestRecord]:
        """See `RequestLog.requests`."""
        self._check_open()
        found = [record for record in self._newest_requests() if endpoint_id in {None, record.endpoint_id}]
        return found[: max(0, limit)]

    async def prune_requests(self, *, keep: int) -> int:
        """See `RequestLog.prune_requests`."""
        self._check_open()
        old = self._newest_requests()[max(0, keep) :]
        for record in old:
            del self._requests[record.id]
        return len(old)

    def _newest_requests(self) -> list[RequestRecord]:
        # Stored later is newer, where two arrived in one millisecond.
        latest_first = reversed(self._requests.values())
        return sorted(latest_first, key=lambda record: -record.arrival_ms)

    async def put_start(self, record: StartRecord) -> None:
        """See `StartLog.put_start`."""
        self._check_open()
        self._starts[record.worker_id, record.decided_ms] = record
        if len(self._starts) > common.STARTS_KEPT:
            del self._starts[next(iter(self._starts))]

    async def starts(self, *, endpoint_id: str | None = None, limit: int = 50) -> Sequence[StartRecord]:
        """See `StartLog.starts`."""
        self._check_open()
        found = [
            record for record in reversed(self._starts.values()) if endpoint_id in {None, record.endpoint_id}
        ]
        found.sort(key=lambda record: record.decided_ms, reverse=True)
        return found[: max(0, limit)]
