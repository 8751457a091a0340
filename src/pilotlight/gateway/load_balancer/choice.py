"""Which worker gets a request: any that has room, or the one it is pinned to (serverless-api.md §3)."""

from __future__ import annotations

import asyncio
import contextlib

from pilotlight.core.admission import Admission, Verdict
from pilotlight.core.affinity import Affinity, Pin
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import WorkerState
from pilotlight.errors import ClusterError, NotFoundError
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.load_balancer.refusal import Refusal
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.slots import (
    Ask,
    DisplacedError,
    HoldExpiredError,
    SlotTable,
    WorkerGoneError,
    WorkerSlots,
)
from pilotlight.ports.fleet import Fleet
from pilotlight.settings import LoadBalancerSettings

_OPEN = frozenset({WorkerState.STARTING, WorkerState.READY})
"""States of workers that may be waited for."""

_COMES_BACK = _OPEN | {WorkerState.FROZEN}
"""From any other state a worker only ends."""


class WorkerChoice:
    """Finds workers, and waits for them where that is allowed.

    Args:
        directory: Endpoints, which change while a request waits.
        slots: Admission and the hold.
        fleet: Tells whether a worker that is asked for exists, and starts it again.
        outlook: Asked when those who find no worker should come again.
        settings: Bounds.
        start_failed: The class of errors with which held requests fail when their endpoint gives up.
    """

    def __init__(
        self,
        *,
        directory: Directory,
        slots: SlotTable,
        fleet: Fleet,
        outlook: Outlook,
        settings: LoadBalancerSettings,
        start_failed: type[Exception],
    ) -> None:
        self._directory = directory
        self._slots = slots
        self._fleet = fleet
        self._outlook = outlook
        self._settings = settings
        self._start_failed = start_failed

    async def take(self, endpoint: Endpoint, affinity: Affinity | None, ask: Ask) -> WorkerSlots:
        """A slot of the worker asked for or of any, waited for if need be; it must be released.

        Args:
            endpoint: Whom the request calls.
            affinity: Which worker it asks for.
            ask: The request.

        Raises:
            Refusal: None became free in time, or none is going to.
        """
        try:
            if affinity is None or affinity.pin is Pin.PREFER:
                return await self._any(endpoint, affinity, ask)
            return await self._pinned(endpoint, affinity, ask)
        except DisplacedError as error:
            raise self._shed(endpoint, error.admission) from error
        except self._start_failed as error:
            raise Refusal.no_workers(Outcome.FAILED) from error

    async def _any(self, endpoint: Endpoint, affinity: Affinity | None, ask: Ask) -> WorkerSlots:
        if affinity is not None:
            preferred = self._slots.take_of(endpoint.id, affinity.worker_id, ask)
            if preferred is not None:
                return preferred
        admission, slots = self._slots.admit(endpoint.id, ask)
        if slots is not None:
            return slots
        if admission.verdict is Verdict.SHED:
            raise self._shed(endpoint, admission)
        try:
            return await self._slots.hold(endpoint.id, ask, timeout_s=self._settings.wait_s)
        except HoldExpiredError as error:
            retry_after_s = self._outlook.start_s(endpoint)
            raise Refusal.no_workers(Outcome.EXPIRED, retry_after_s=retry_after_s) from error

    async def _pinned(self, endpoint: Endpoint, affinity: Affinity, ask: Ask) -> WorkerSlots:
        slots = self._slots.take_of(endpoint.id, affinity.worker_id, ask)
        if slots is not None:
            return slots
        try:
            async with asyncio.timeout(self._settings.pinned_wait_s):
                if affinity.pin is Pin.STRICT_RESUME:
                    return await self._hold_resumed(endpoint, affinity.worker_id, ask)
                return await self._hold_pinned(endpoint, affinity.worker_id, ask)
        except (TimeoutError, HoldExpiredError) as error:
            raise Refusal.worker_timeout() from error
        except WorkerGoneError as error:
            raise Refusal.worker_gone() from error

    async def _hold_resumed(self, endpoint: Endpoint, worker_id: str, ask: Ask) -> WorkerSlots:
        while True:
            await self._resume(endpoint, worker_id, ask)
            # It may be scaled down once more before it has room.
            with contextlib.suppress(WorkerGoneError):
                return await self._hold_pinned(endpoint, worker_id, ask)

    async def _resume(self, endpoint: Endpoint, worker_id: str, ask: Ask) -> None:
        """See to it that a worker that was scaled down is started again; one that is ending first ends."""
        worker = self._fleet.worker(worker_id)
        if worker is not None and worker.endpoint_id == endpoint.id and worker.state not in _COMES_BACK:
            self._check_room(endpoint, ask)
            await self._slots.wait_end(endpoint.id, worker_id)
            worker = self._fleet.worker(worker_id)
        if worker is not None:
            return
        # A drain can take minutes, in which the endpoint may have been revised or deleted.
        current = self._directory.endpoint(endpoint.id)
        if current is None:
            raise Refusal.worker_gone()
        try:
            await self._fleet.resume(current, worker_id)
        except NotFoundError as error:
            raise Refusal.worker_gone() from error
        except ClusterError as error:
            raise Refusal.no_workers(Outcome.FAILED) from error

    async def _hold_pinned(self, endpoint: Endpoint, worker_id: str, ask: Ask) -> WorkerSlots:
        """A slot of one worker, thawed if need be; WorkerGoneError when it takes no more requests."""
        worker = self._fleet.worker(worker_id)
        if worker is not None and worker.endpoint_id == endpoint.id and worker.state is WorkerState.FROZEN:
            self._check_room(endpoint, ask)
            with self._slots.aside(endpoint.id):
                thawed = await self._fleet.thaw(worker_id)
            worker = self._fleet.worker(worker_id)
            if not thawed and (worker is None or worker.state is not WorkerState.FROZEN):
                # It ends now; who wants it resumed waits for that.
                raise WorkerGoneError(f"worker {worker_id} did not go on")
        if worker is None or worker.endpoint_id != endpoint.id or worker.state not in _OPEN:
            raise Refusal.worker_gone()
        self._check_room(endpoint, ask)
        return await self._slots.hold(
            endpoint.id, ask, timeout_s=self._settings.pinned_wait_s, worker_id=worker_id
        )

    def _check_room(self, endpoint: Endpoint, ask: Ask) -> None:
        """Refuse a request for which there is no place to wait."""
        admission, _ = self._slots.admit(endpoint.id, ask, take=False)
        if admission.verdict is Verdict.SHED:
            raise self._shed(endpoint, admission)

    def _shed(self, endpoint: Endpoint, admission: Admission) -> Refusal:
        retry_after_s = self._outlook.retry_after_s(endpoint, admission)
        return Refusal.no_workers(Outcome.SHED, retry_after_s=retry_after_s)
