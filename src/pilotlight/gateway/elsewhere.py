"""What other gateways on the same store did, and what follows from it here.

`bootstrap` hands `Elsewhere` to the store as its listener. Waiters look again, takes are asked for, endpoints
and keys are read anew, and a worker of ours is told to stop a job that ended behind its back. All of it is
idempotent: news may come late, twice, or only with the next `resync`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence

import structlog

from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.worker import Worker
from pilotlight.errors import StoreError
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.jobs.ledger import Ledger
from pilotlight.gateway.jobs.links import HandOut, WorkerLink
from pilotlight.gateway.refusal import openai_body
from pilotlight.ports.fleet import Fleet
from pilotlight.ports.store import WorkerStore

_log = structlog.get_logger()

_MANY = 1 << 20
"""Arrivals of which nobody knows the number: more than any queue of open takes asks for."""

_WAKE_SLICE = 50
_WAKE_PAUSE_S = 0.02
"""Waiters that are woken at once when nobody knows whose job changed: each of them asks the store."""

_SETTLE_S = 1.0
"""A job that ended here is settled within a moment; one that is not after this has ended elsewhere."""

FOLLOWER_RETRY_S = 2
FOLLOWS = (
    "this gateway has no workers: another gateway of this installation leads;"
    " send the request there, or try again"
)


def follower_body() -> bytes:
    """The answer of a gateway that follows to what only workers can answer; status 503."""
    return openai_body(503, FOLLOWS, type="server_error", code="not_leading")


class JobsElsewhere:
    """Jobs that other gateways changed.

    Args:
        ledger: Jobs of this gateway and who waits for them.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waking = False

    def changed(self, job_ids: Sequence[str]) -> None:
        """Wake those who wait for some jobs, and look after those that our workers run."""
        for job_id in job_ids:
            self._ledger.signals.notify(job_id)
        self._look_after(self._held(frozenset(job_ids)))

    def grew(self, endpoint_id: str) -> None:
        """Jobs were queued: ask for them."""
        self._ledger.dispatcher.arrived(endpoint_id, _MANY)
        self._ledger.wake(endpoint_id)

    def resync(self, endpoint_ids: Sequence[str]) -> None:
        """Look at everything again."""
        if not self._waking and not self._ledger.closing:
            self._waking = True
            self._ledger.spawn(self._wake_all(), "wake-waiters")
        for endpoint_id in endpoint_ids:
            self.grew(endpoint_id)
        self._look_after(self._held(None))

    async def _wake_all(self) -> None:
        """Let everybody who waits look again, some after the other."""
        try:
            keys = self._ledger.signals.keys()
            for start in range(0, len(keys), _WAKE_SLICE):
                for key in keys[start : start + _WAKE_SLICE]:
                    self._ledger.signals.notify(key)
                await asyncio.sleep(_WAKE_PAUSE_S)
        finally:
            self._waking = False

    def _held(self, job_ids: Collection[str] | None) -> list[tuple[WorkerLink, HandOut]]:
        """Attempts that workers of ours have, of some jobs or of all."""
        return [
            (link, hand_out)
            for link in self._ledger.links.values()
            for hand_out in link.hand_outs.values()
            if job_ids is None or hand_out.job_id in job_ids
        ]

    def _look_after(self, held: list[tuple[WorkerLink, HandOut]]) -> None:
        if held and not self._ledger.closing:
            self._ledger.spawn(self._settle(held), "jobs-elsewhere")

    async def _settle(self, held: list[tuple[WorkerLink, HandOut]]) -> None:
        try:
            links = {link.worker_id: link for link, _ in held}
            running = {worker_id: await self._running(link) for worker_id, link in links.items()}
        except StoreError as error:
            _log.warning("jobs_elsewhere_not_read", error=str(error))
            return
        ended = [
            (link, hand_out)
            for link, hand_out in held
            if (hand_out.job_id, hand_out.attempt) not in running[link.worker_id]
        ]
        if not ended:
            return
        # A result of our own may have been committed and not be settled yet.
        await asyncio.sleep(_SETTLE_S)
        for link, hand_out in ended:
            # With a result on its way it is the post that settles it.
            if link.hand_outs.get(hand_out.job_id) is hand_out and not hand_out.posts:
                del link.hand_outs[hand_out.job_id]
                link.stop(hand_out.job_id, deadline_ns=self._ledger.stop_deadline_ns())
                self._ledger.slots.release_jobs(link.worker_id)

    async def _running(self, link: WorkerLink) -> set[tuple[str, int]]:
        """Attempts that are a worker's."""
        jobs = await self._ledger.store.running(worker_id=link.worker_id)
        return {(job.id, job.attempt) for job in jobs}


class FleetElsewhere:
    """A fleet as clients see it, on whichever gateway they ask: one that follows shows the leader's workers.

    They are those of the last resync, some seconds ago. What they are busy with only the leader knows, and
    whoever changes a worker speaks to the fleet of this gateway, which has none while another one leads.

    Args:
        fleet: The fleet of this gateway.
        store: Where the leader writes its workers down.
        leads: Whether this gateway leads.
    """

    def __init__(self, fleet: Fleet, store: WorkerStore, leads: Callable[[], bool]) -> None:
        self._fleet = fleet
        self._store = store
        self._leads = leads
        self._workers: dict[str, list[Worker]] = {}
        self.worker, self.authenticate = fleet.worker, fleet.authenticate
        self.stages, self.health = fleet.stages, fleet.health
        self.reported, self.took = fleet.reported, fleet.took
        self.resume, self.thaw = fleet.resume, fleet.thaw
        self.drain, self.kill = fleet.drain, fleet.kill

    def workers(self, endpoint_id: str) -> Sequence[Worker]:
        """See `Fleet.workers`."""
        return self._fleet.workers(endpoint_id) if self._leads() else self._workers.get(endpoint_id, ())

    async def refresh(self) -> None:
        """Read the leader's workers. StoreError when they cannot be read; those known before stay."""
        found: dict[str, list[Worker]] = {}
        for worker in () if self._leads() else await self._store.workers():
            found.setdefault(worker.endpoint_id, []).append(worker)
        self._workers = found


class Elsewhere:
    """Listens to a shared store (port `StoreListener`).

    Args:
        jobs: Takes news of jobs.
        directory: Read anew when endpoints or keys changed.
        changed: Called with the id of an endpoint that was made or changed elsewhere.
        deleted: Awaited with the id of one that was deleted elsewhere.
        served: Ids of the endpoints that have workers here.
        fleet: Read anew with every resync.
        webhook_due: Called when a job may have ended that has a webhook.
    """

    def __init__(
        self,
        *,
        jobs: JobsElsewhere,
        directory: Directory,
        changed: Callable[[str], None],
        deleted: Callable[[str], Awaitable[None]],
        served: Callable[[], Collection[str]],
        fleet: FleetElsewhere,
        webhook_due: Callable[[], None],
    ) -> None:
        self._jobs = jobs
        self._directory = directory
        self._changed = changed
        self._deleted = deleted
        self._served = served
        self._fleet = fleet
        self._acted_on: dict[str, Endpoint] = {}
        self._webhook_due = webhook_due
        self._reading: asyncio.Task[None] | None = None
        self._read_again = False
        self._closed = False

    def acted_on(self, endpoint: Endpoint) -> None:
        """An endpoint was made or changed here: it is no news any more."""
        self._acted_on[endpoint.id] = endpoint

    def forget(self, endpoint_id: str) -> None:
        """An endpoint was deleted here."""
        self._acted_on.pop(endpoint_id, None)

    def jobs_changed(self, job_ids: Sequence[str]) -> None:
        """See `StoreListener.jobs_changed`."""
        self._jobs.changed(job_ids)
        self._webhook_due()

    def queues_grew(self, endpoint_ids: Sequence[str]) -> None:
        """See `StoreListener.queues_grew`."""
        for endpoint_id in endpoint_ids:
            self._jobs.grew(endpoint_id)

    def configuration_changed(self) -> None:
        """See `StoreListener.configuration_changed`."""
        self._read_again = True
        if not self._closed and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self._guarded(self._read()), name="configuration-elsewhere")

    def resync(self) -> None:
        """See `StoreListener.resync`."""
        self._jobs.resync([endpoint.id for endpoint in self._directory.endpoints()])
        self._webhook_due()
        self.configuration_changed()

    async def close(self) -> None:
        """Read nothing more, and return when nothing is under way."""
        self._closed = True
        if self._reading is not None:
            await self._reading

    async def _guarded(self, work: Coroutine[object, object, None]) -> None:
        try:
            await work
        except StoreError as error:
            _log.warning("configuration_elsewhere_not_read", error=str(error))
        except Exception:  # noqa: BLE001 - the end of a task: nobody above could know
            _log.exception("configuration_elsewhere_failed")

    async def _read(self) -> None:
        while self._read_again:
            self._read_again = False
            await self._fleet.refresh()
            # Others read the directory anew, too: what is new is told by what was acted on here. A worker
            # whose endpoint is gone is ended even when nobody here ever knew that endpoint.
            known = self._acted_on.keys() | set(self._served())
            await self._directory.refresh()
            now = {endpoint.id: endpoint for endpoint in self._directory.endpoints()}
            for endpoint_id in known - now.keys():
                await self._deleted(endpoint_id)
                self._acted_on.pop(endpoint_id, None)
            for endpoint_id, endpoint in now.items():
                if self._acted_on.get(endpoint_id) != endpoint:
                    self._changed(endpoint_id)
                    self._acted_on[endpoint_id] = endpoint
