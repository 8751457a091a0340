"""The half of the store's face that is not the queue: endpoints, keys, workers, usage, requests, starts."""

from __future__ import annotations

from collections.abc import Sequence

from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import RequestRecord, StartRecord, UsageInterval
from pilotlight.domain.worker import Worker
from pilotlight.stores.postgresql import endpoints
from pilotlight.stores.postgresql import records as logs
from pilotlight.stores.postgresql.database import Begin, Database
from pilotlight.stores.postgresql.news import News


class PostgresqlRegistry:
    """`EndpointStore`, `KeyStore`, `WorkerStore`, `UsageStore`, `RequestLog` and `StartLog`.

    Args:
        database: Connections and transactions.
        news: Tells other gateways of changes.
    """

    def __init__(self, database: Database, news: News) -> None:
        self._database = database
        self._news = news

    # Endpoints

    async def add_endpoint(self, endpoint: Endpoint) -> None:
        """See `EndpointStore.add_endpoint`."""
        await self._database.write(
            lambda transaction: endpoints.add_endpoint(transaction, endpoint), begin=Begin.CONFIGURATION
        )
        self._news.configuration_changed()

    async def update_endpoint(self, endpoint: Endpoint) -> None:
        """See `EndpointStore.update_endpoint`."""
        await self._database.write(
            lambda transaction: endpoints.update_endpoint(transaction, endpoint), begin=Begin.CONFIGURATION
        )
        self._news.configuration_changed()

    async def delete_endpoint(self, endpoint_id: str, *, now_ms: int) -> None:
        """See `EndpointStore.delete_endpoint`."""
        await self._database.write(
            lambda transaction: endpoints.delete_endpoint(transaction, endpoint_id, now_ms),
            begin=Begin.CONFIGURATION,
        )
        self._news.configuration_changed()

    async def endpoints(self) -> Sequence[Endpoint]:
        """See `EndpointStore.endpoints`."""
        return await self._database.read(endpoints.endpoints)

    async def revisions(self, endpoint_id: str) -> Sequence[Revision]:
        """See `EndpointStore.revisions`."""
        return await self._database.read(lambda transaction: endpoints.revisions(transaction, endpoint_id))

    # Keys

    async def add_key(self, key: ApiKey) -> None:
        """See `KeyStore.add_key`."""
        await self._database.write(
            lambda transaction: endpoints.add_key(transaction, key), begin=Begin.CONFIGURATION
        )
        self._news.configuration_changed()

    async def update_key(self, key: ApiKey) -> None:
        """See `KeyStore.update_key`."""
        await self._database.write(
            lambda transaction: endpoints.update_key(transaction, key), begin=Begin.CONFIGURATION
        )
        self._news.configuration_changed()

    async def delete_key(self, key_id: str) -> None:
        """See `KeyStore.delete_key`."""
        await self._database.write(
            lambda transaction: endpoints.delete_key(transaction, key_id), begin=Begin.CONFIGURATION
        )
        self._news.configuration_changed()

    async def keys(self) -> Sequence[ApiKey]:
        """See `KeyStore.keys`."""
        return await self._database.read(endpoints.keys)

    # Workers

    async def put_worker(self, worker: Worker) -> None:
        """See `WorkerStore.put_worker`."""
        await self._database.write(lambda transaction: endpoints.put_worker(transaction, worker))

    async def worker(self, worker_id: str) -> Worker | None:
        """See `WorkerStore.worker`."""
        return await self._database.read(lambda transaction: endpoints.worker(transaction, worker_id))

    async def workers(self, *, endpoint_id: str | None = None, living: bool = True) -> Sequence[Worker]:
        """See `WorkerStore.workers`."""
        return await self._database.read(
            lambda transaction: endpoints.workers(transaction, endpoint_id, living)
        )

    async def prune_workers(self, *, ended_before_ms: int) -> int:
        """See `WorkerStore.prune_workers`."""
        return await self._database.write(
            lambda transaction: endpoints.prune_workers(transaction, ended_before_ms)
        )

    # Usage, requests, starts

    async def add_usage(self, intervals: Sequence[UsageInterval]) -> None:
        """See `UsageStore.add_usage`."""
        await self._database.write(lambda transaction: logs.add_usage(transaction, intervals))

    async def usage(
        self, *, endpoint_id: str | None = None, worker_id: str | None = None, since_ms: int = 0
    ) -> Sequence[UsageInterval]:
        """See `UsageStore.usage`."""
        return await self._database.read(
            lambda transaction: logs.usage(transaction, endpoint_id, worker_id, since_ms)
        )

    async def add_requests(self, records: Sequence[RequestRecord]) -> None:
        """See `RequestLog.add_requests`."""
        await self._database.write(lambda transaction: logs.add_requests(transaction, records))

    async def requests(self, *, endpoint_id: str | None = None, limit: int = 100) -> Sequence[RequestRecord]:
        """See `RequestLog.requests`."""
        return await self._database.read(lambda transaction: logs.requests(transaction, endpoint_id, limit))

    async def prune_requests(self, *, keep: int) -> int:
        """See `RequestLog.prune_requests`."""
        return await self._database.write(lambda transaction: logs.prune_requests(transaction, keep))

    async def put_start(self, record: StartRecord) -> None:
        """See `StartLog.put_start`."""
        await self._database.write(lambda transaction: logs.put_start(transaction, record))

    async def starts(self, *, endpoint_id: str | None = None, limit: int = 50) -> Sequence[StartRecord]:
        """See `StartLog.starts`."""
        return await self._database.read(lambda transaction: logs.starts(transaction, endpoint_id, limit))
