"""Batches: requests collected in a draft, then queued together behind single jobs (serverless-api.md §2.16).

The rules; `batch_routes` is their HTTP face. From `finalize` on the requests are ordinary jobs of the lane
`batch`, so leases, retries and limits are those of every job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from pilotlight.core.lifecycle import Cancelled
from pilotlight.domain.batch import Batch, BatchDraft
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.ids import batch_id as make_batch_id
from pilotlight.domain.ids import batch_request_id
from pilotlight.domain.job import Job
from pilotlight.domain.key import ApiKey
from pilotlight.errors import InvalidInputError, NotFoundError
from pilotlight.gateway.errors import QueueFullError
from pilotlight.gateway.jobs.bounds import QueueBounds
from pilotlight.gateway.jobs.ledger import Ledger
from pilotlight.gateway.jobs.submission import check_readable, check_takes_jobs
from pilotlight.ports.clock import Clock
from pilotlight.ports.store import BatchStore
from pilotlight.settings import Settings

BATCH_NOT_FOUND = "batch not found"

NAME_MAX = 191

_RETRY_AFTER_S = 60
"""Arbitrary: batches take minutes and more."""

_PAGE_BYTES_MAX = 32 * 1024 * 1024
_PAGE_SLICE = 10
"""Requests read at once for a page, so that it can end before it is too large."""

_objects = msgspec.json.Decoder(dict[str, msgspec.Raw])
_arrays = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPage:
    """Some requests of a batch, in their order.

    Attributes:
        batch: The batch at that moment.
        offset: Position of the first.
        limit: How many were asked for; fewer come where they would be too large for one answer.
        requests: Drafts, or jobs without inputs.
        last: Whether the store has none behind them, whatever the batch counts: some may have been purged.
    """

    batch: Batch
    offset: int
    limit: int
    requests: Sequence[Job | BatchDraft]
    last: bool = False

    @property
    def has_more(self) -> bool:
        """Whether requests follow."""
        return not self.last and self.offset + len(self.requests) < self.batch.total


class BatchService:
    """Everything that can be done with batches.

    Args:
        store: Batches.
        ledger: What follows from a change of a job.
        clock: Time.
        settings: Limits and periods.
        entropy: Random bytes, for ids.
        bounds: What an endpoint's queue takes.
        wake: Wakes the autoscaler of an endpoint.
    """

    def __init__(
        self,
        *,
        store: BatchStore,
        ledger: Ledger,
        clock: Clock,
        settings: Settings,
        entropy: Callable[[int], bytes],
        bounds: QueueBounds,
        wake: Callable[[str], None],
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._clock = clock
        self._settings = settings
        self._limits = settings.limits
        self._entropy = entropy
        self._bounds = bounds
        self._wake = wake

    async def create(self, endpoint: Endpoint, key: ApiKey, body: bytes) -> Batch:
        """Store a new draft.

        Args:
            endpoint: Where its requests will run.
            key: Who makes it.
            body: A JSON array of `{"input": …}`, which may be empty.

        Raises:
            InvalidInputError: Names the element and what is wrong with it; or the endpoint has no queue.
            QueueFullError: As many batches are under way as may be, or too many requests.
        """
        check_takes_jobs(endpoint)
        drafts = self._drafts(_array(body or b"[]"))
        check_readable(body)
        active = [batch for batch in await self._store.batches(endpoint.id) if batch.active]
        if len(active) >= self._limits.batches:
            raise QueueFullError(
                f"limit of {self._limits.batches} active batches reached on endpoint {endpoint.id}; "
                "finalize and finish one, or cancel it",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._check_total(len(drafts))
        size = sum(len(draft.input) for draft in drafts)
        batch = Batch(
            id=make_batch_id(self._entropy(20)),
            endpoint_id=endpoint.id,
            key_id=key.id,
            total=len(drafts),
            input_bytes=size,
            created_ms=self._clock.now_ms(),
        )
        async with self._bounds.room(endpoint, jobs=len(drafts), size=size):
            await self._store.add_batch(batch, drafts)
        return batch

    async def append(self, endpoint: Endpoint, batch_id: str, body: bytes) -> Batch:
        """Add requests to a draft; the body is `{"requests": [{"input": …}, …]}`.

        Raises:
            InvalidInputError: Names the element and what is wrong with it.
            NotFoundError: No such batch.
            ConflictError: Not a draft any more.
            QueueFullError: More requests than a batch may have.
        """
        batch = await self.batch(endpoint.id, batch_id)
        fields = _object(body, what="request body")
        if "requests" not in fields:
            raise InvalidInputError('requests is required: {"requests": [{"input": …}, …]}', field="requests")
        drafts = self._drafts(_array(bytes(fields["requests"]), what="requests"))
        check_readable(body)
        self._check_total(batch.total + len(drafts))
        size = sum(len(draft.input) for draft in drafts)
        # It must fit into the queue when it is finalized.
        total, size = batch.total + len(drafts), batch.input_bytes + size
        async with self._bounds.room(endpoint, jobs=total, size=size):
            return await self._store.add_batch_requests(batch_id, drafts)

    async def rename(self, endpoint_id: str, batch_id: str, body: bytes) -> Batch:
        """Give a draft a name for people; the body is `{"name": "…"}`."""
        await self.batch(endpoint_id, batch_id)
        raw = bytes(_object(body, what="request body").get("name", b"null"))
        try:
            name = msgspec.json.decode(raw, type=str)
        except (msgspec.DecodeError, UnicodeDecodeError):
            name = ""
        if not 0 < len(name) <= NAME_MAX:
            raise InvalidInputError(f"name must be a text of 1 to {NAME_MAX} characters", field="name")
        return await self._store.rename_batch(batch_id, name)

    async def remove(self, endpoint_id: str, batch_id: str, request_id: str) -> None:
        """Take a request out of a draft."""
        await self.batch(endpoint_id, batch_id)
        await self._store.remove_batch_request(batch_id, request_id)

    async def finalize(self, endpoint: Endpoint, batch_id: str) -> Batch:
        """Queue the requests of a draft.

        Raises:
            NotFoundError: No such batch.
            ConflictError: Not a draft any more.
            QueueFullError: The endpoint's queue does not take that many.
        """
        batch = await self.batch(endpoint.id, batch_id)
        queued = sum(each.queued for each in await self._store.batches(endpoint.id))
        if queued + batch.total > self._limits.batch_queued:
            raise QueueFullError(
                f"limit of {self._limits.batch_queued} queued batch requests reached on endpoint "
                f"{endpoint.id}: {queued} are queued, this batch has {batch.total}",
                retry_after_s=_RETRY_AFTER_S,
            )
        now_ms, jobs = self._clock.now_ms(), self._settings.jobs
        template = Job(
            id=batch.id,
            endpoint_id=endpoint.id,
            key_id=batch.key_id,
            created_ms=now_ms,
            queued_ms=now_ms,
            expires_ms=now_ms + jobs.batch_retention_ms,
            execution_timeout_ms=endpoint.execution_timeout_ms,
            retention_ms=jobs.batch_retention_ms,
            retries_max=jobs.retries_max,
            batch_id=batch.id,
        )
        async with self._bounds.room(endpoint, jobs=batch.total, size=batch.input_bytes):
            finalized = await self._store.finalize_batch(batch_id, template)
        self._ledger.dispatcher.arrived(endpoint.id, finalized.total)
        self._wake(endpoint.id)
        return finalized

    async def cancel(self, endpoint_id: str, batch_id: str) -> Batch:
        """Cancel what is queued; what runs finishes, and only then the batch is CANCELLED."""
        await self.batch(endpoint_id, batch_id)
        event = Cancelled(now_ms=self._clock.now_ms())
        batch, ended = await self._store.cancel_batch(batch_id, now_ms=event.now_ms)
        for applied in ended:
            self._ledger.settle(applied, event)
        return batch

    async def batch(self, endpoint_id: str, batch_id: str) -> Batch:
        """One batch of an endpoint. NotFoundError when unknown, forgotten or another endpoint's."""
        try:
            batch = await self._store.batch(batch_id)
        except NotFoundError:
            raise NotFoundError(BATCH_NOT_FOUND) from None
        if batch.endpoint_id != endpoint_id:
            raise NotFoundError(BATCH_NOT_FOUND)
        return batch

    async def batches(self, endpoint_id: str) -> Sequence[Batch]:
        """The batches of an endpoint, newest first."""
        return await self._store.batches(endpoint_id)

    async def requests(self, endpoint_id: str, batch_id: str, *, offset: int, limit: int) -> RequestPage:
        """A page of a batch's requests; it ends early where its outputs would fill the memory."""
        batch = await self.batch(endpoint_id, batch_id)
        page: list[Job | BatchDraft] = []
        size, last = 0, False
        while len(page) < limit and size < _PAGE_BYTES_MAX:
            count = min(_PAGE_SLICE, limit - len(page))
            part = await self._store.batch_requests(batch_id, offset=offset + len(page), limit=count)
            page.extend(part)
            size += sum(len(each.output or b"") for each in part if isinstance(each, Job))
            last = len(part) < count
            if last:
                break
        return RequestPage(batch=batch, offset=offset, limit=limit, requests=page, last=last)

    def _check_total(self, total: int) -> None:
        if total > self._limits.batch_requests:
            raise QueueFullError(
                f"limit of {self._limits.batch_requests} requests per batch exceeded: {total}",
                retry_after_s=_RETRY_AFTER_S,
            )

    def _drafts(self, elements: Sequence[bytes]) -> list[BatchDraft]:
        return [
            BatchDraft(id=batch_request_id(self._entropy(24)), input=_input(element, number))
            for number, element in enumerate(elements)
        ]


def _input(element: bytes, number: int) -> bytes:
    """What a request of a batch brings for its worker; the rule is that of `/run` (§2.3)."""
    fields = _object(element, what=f"request {number}")
    if "input" in fields:
        return bytes(fields["input"])
    if fields:
        raise InvalidInputError(
            f'request {number}: input is required; wrap the payload in {{"input": …}}', field="input"
        )
    return b"{}"


def _object(body: bytes, *, what: str) -> dict[str, msgspec.Raw]:
    try:
        return _objects.decode(body)
    except RecursionError as error:
        raise InvalidInputError("request body is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{what} must be a JSON object") from error


def _array(body: bytes, *, what: str = "request body") -> list[bytes]:
    try:
        return [bytes(element) for element in _arrays.decode(body)]
    except RecursionError as error:
        raise InvalidInputError("request body is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(f'{what} must be a JSON array of {{"input": …}} objects') from error
