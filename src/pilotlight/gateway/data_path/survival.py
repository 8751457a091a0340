"""How a stream goes on with another worker when its own has died (`core.continuation` says which can).

Rare, and so the one part of the data path that is a coroutine: it waits for a slot, asks the next worker two
questions, and passes the rest of the stream on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from pilotlight.core.continuation import (
    COMPLETIONS,
    Continuation,
    Ending,
    Impossible,
    Reason,
    limit_question,
    plan_continuation,
    read_limit,
)
from pilotlight.core.deadlines import HoldBound
from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Address
from pilotlight.gateway.continuation import Splice, SpliceError
from pilotlight.gateway.data_path.desk import Slot, Use, Wish, hold
from pilotlight.gateway.data_path.streams import EventPass
from pilotlight.gateway.refusal import RequestRefusedError
from pilotlight.gateway.upstream import UpstreamError, UpstreamResponse, request_bytes
from pilotlight.gateway.worker_slots import SUSPENSION_S

if TYPE_CHECKING:
    from pilotlight.gateway.data_path.road import DataPath

_CONTINUATIONS_MAX = 3
"""A request that is the end of every worker it meets must not meet all of them."""

OTHERS_S = 10.0
"""How long another worker is waited for before the one that broke off may go on by itself."""

_ANSWER_MAX = 64 * 1024
_JSON = (b"content-type", b"application/json")


class StreamLostError(Exception):
    """The stream cannot go on."""


class Survival:
    """The rest of one stream.

    Args:
        road: What the data path works with.
        wish: What the desk was asked for; its slot has been given back.
        route: Path of the engine's route.
        body: The request as the client sent it.
        request: The request as the first worker got it.
        request_id: For the engines' logs.
        stream: Takes the rest.
        moved: Called with the id of each worker that goes on with it.
    """

    def __init__(
        self,
        road: DataPath,
        *,
        wish: Wish,
        route: str,
        body: bytes,
        request: bytes,
        request_id: str,
        stream: EventPass,
        moved: Callable[[str], None],
    ) -> None:
        self._road = road
        self._wish = wish
        self._route = route
        self._body = body
        self._request = request
        self._id = (b"x-request-id", request_id.encode())
        self._stream = stream
        self._moved = moved
        self._ready = asyncio.Event()

    def client_ready(self) -> None:
        """The client has read enough for more to be written."""
        self._ready.set()

    async def run(self, died_id: str, *, hold_s: float) -> None:
        """Pass on the rest of the stream.

        Args:
            died_id: The worker that died.
            hold_s: Longest wait for a worker.

        Raises:
            StreamLostError: It cannot go on.
        """
        for _ in range(_CONTINUATIONS_MAX):
            delivered = self._stream.delivered
            if delivered is None:
                raise StreamLostError("more was delivered than is kept")
            plan = plan_continuation(self._route, self._body, delivered)
            self._stream.begin_again()
            if isinstance(plan, Ending):
                await self._pass(plan.data)
                return
            if isinstance(plan, Impossible) and plan.reason is not Reason.NOTHING_DELIVERED:
                raise StreamLostError(f"{plan.reason}: {plan.detail}" if plan.detail else plan.reason)
            self._road.desk.suspend(died_id, SUSPENSION_S)
            self._wish.ask.tried |= {died_id}
            slot = await self._slot(hold_s)
            died_id = slot.worker_id
            if await self._go_on(slot, plan if isinstance(plan, Continuation) else None):
                return
        raise StreamLostError(f"{_CONTINUATIONS_MAX} more workers died")

    async def _slot(self, hold_s: float) -> Slot:
        """A slot of another worker; of one that was tried, if no other comes and it lives all the same."""
        desk, wish = self._road.desk, self._wish
        try:
            return await hold(desk, wish, HoldBound(min(OTHERS_S, hold_s), by_client=False))
        except RequestRefusedError as error:
            if error.outcome is not Outcome.EXPIRED:
                raise StreamLostError(str(error)) from error
        if await desk.lives(wish.ask.tried):
            # It has lost no more than a connection: of a worker that ended, that is known by now.
            wish.ask.tried = frozenset()
        try:
            return await hold(desk, wish, HoldBound(max(0.0, hold_s - OTHERS_S), by_client=False))
        except RequestRefusedError as error:
            raise StreamLostError(str(error)) from error

    async def _go_on(self, slot: Slot, plan: Continuation | None) -> bool:
        """Whether the stream came to its end with this worker, and did not lose it, too."""
        failed = True
        try:
            self._moved(slot.worker_id)
            assert slot.registration is not None
            address = slot.registration.engine
            if plan is None:
                response = await self._asked(address, self._route, self._request)
                await self._pass_all(response, None)
            else:
                limit = read_limit(await self._limit_answer(address))
                request = limit if isinstance(limit, Impossible) else plan.request(limit)
                if isinstance(request, Impossible):
                    failed = False
                    raise StreamLostError(f"{request.reason}: {request.detail}")
                response = await self._asked(address, COMPLETIONS, request)
                await self._pass_all(response, Splice(plan))
            failed = self._stream.died
        except UpstreamError:
            return False
        except SpliceError as error:
            failed = False
            raise StreamLostError(str(error)) from error
        except asyncio.CancelledError:
            # The client left.
            failed = False
            raise
        finally:
            # The key was charged for all of it with the slot of the worker that died.
            self._road.desk.give_back(self._wish, slot, Use(failed, cost=0))
        return not failed

    async def _limit_answer(self, address: Address) -> bytes:
        timeout_s = self._road.limits.upstream_read_s
        response = await self._post(address, self._route, limit_question(self._body))
        try:
            if response.status >= 500:
                raise UpstreamError(f"it answered with status {response.status}")
            answer = b""
            while (data := await response.read(timeout_s)) is not None and len(answer) < _ANSWER_MAX:
                answer += data
            return answer
        finally:
            response.release()

    async def _asked(self, address: Address, route: str, body: bytes) -> UpstreamResponse:
        response = await self._post(address, route, body)
        head = response.head
        if head is None or head.status != 200 or not head.content_type.startswith(b"text/event-stream"):
            response.close()
            if response.status >= 500:
                raise UpstreamError(f"it answered with status {response.status}")
            raise StreamLostError(f"the next worker answered with status {response.status}")
        return response

    async def _post(self, address: Address, route: str, body: bytes) -> UpstreamResponse:
        return await self._road.pool.exchange(
            address,
            request_bytes(address, "POST", route, [_JSON, self._id], body),
            timeout_s=self._road.limits.upstream_read_s,
        )

    async def _pass_all(self, response: UpstreamResponse, splice: Splice | None) -> None:
        """Pass on a stream, through a splice; the engine's report of its own end ends it, too."""
        try:
            while (data := await response.read(self._road.limits.upstream_read_s)) is not None:
                await self._pass(data if splice is None else splice.feed(data))
                if self._stream.died:
                    return
        finally:
            response.release()

    async def _pass(self, data: bytes) -> None:
        self._ready.clear()
        if data and not self._stream.feed(data):
            await self._ready.wait()
