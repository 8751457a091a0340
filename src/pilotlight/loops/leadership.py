"""Which gateway keeps the workers, where several share a store: one leads, the others follow.

The leader starts and ends workers, hands jobs to them, keeps their time, sends webhooks. A follower serves
the job API and the management API from the same store. It asks for the lead every few seconds; when it gets
it, the old leader has lost it, and whatever that one had in hand is recovered. A leader that loses the lead
hands out nothing more from that moment on, ends what only a leader may do, and goes on as a follower. A store
of one process always gives the lead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine

import structlog

from pilotlight.errors import StoreError

_log = structlog.get_logger()

ASK_S = 2.0
"""Between two tries to get the lead: about how long nobody leads after the leader has died."""


class Leadership:
    """Follows who leads.

    Args:
        lead: `Store.lead`.
        begin: Recovers and begins what only a leader does; called each time the lead was won. When it fails,
            it is tried again for as long as the lead is held.
        cut: Called in the moment in which the lead is lost: stops at once whatever another leader must not be
            crossed by.
        end: Ends what `begin` began; called after that.

    Attributes:
        leading: Whether this gateway leads, and has begun.
        on_leading: Called when that has become so.
    """

    def __init__(
        self,
        *,
        lead: Callable[[Callable[[], None]], Awaitable[bool]],
        begin: Callable[[], Coroutine[object, object, None]],
        end: Callable[[], Coroutine[object, object, None]],
        cut: Callable[[], None] = lambda: None,
    ) -> None:
        self._lead = lead
        self._begin = begin
        self._cut = cut
        self._end = end
        self._held = False
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._step: asyncio.Task[None] | None = None
        self.leading = False
        self.on_leading: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Take the lead and begin, where nobody else has it; else go on asking for it.

        Raises:
            StoreError: The store cannot be asked, or what had to be recovered could not be.
        """
        await self._ask()
        if self._held:
            await self._whole(self._begin())
            self._now_leading()
        else:
            _log.info("following", reason="another gateway leads")
        self._task = asyncio.create_task(self._run(), name="leadership")

    async def stop(self) -> None:
        """Ask no more; a beginning or an end under way is finished first.

        The lead itself lasts until the store is closed; idempotent.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        if self._step is not None:
            await asyncio.wait({self._step})

    async def _run(self) -> None:
        while True:
            try:
                if self.leading:
                    await self._lost.wait()
                    self.leading = False
                    await self._whole(self._end())
                else:
                    await asyncio.sleep(ASK_S)
                    await self._follow()
            except StoreError as error:
                _log.warning("lead_not_asked", error=str(error))
            except Exception:  # noqa: BLE001 - a gateway that never asks again would never lead again
                _log.exception("leadership_failed")

    async def _follow(self) -> None:
        if not self._held or self._lost.is_set():
            await self._ask()
        if not self._held:
            return
        await self._whole(self._begin())
        self._now_leading()
        _log.info("leading")

    def _now_leading(self) -> None:
        self.leading = True
        self.on_leading()

    async def _whole(self, step: Coroutine[object, object, None]) -> None:
        """Do a step that must not be broken off half-way when this is stopped."""
        self._step = asyncio.create_task(step, name="leadership-step")
        self._step.add_done_callback(_seen)
        await asyncio.shield(self._step)

    async def _ask(self) -> None:
        self._held = False
        self._lost.clear()
        self._held = await self._lead(self._lose)

    def _lose(self) -> None:
        _log.warning("lead_lost")
        self._lost.set()
        self._cut()


def _seen(step: asyncio.Task[None]) -> None:
    """Take note of how a step ended: nobody waits for it any more when its owner was stopped."""
    if not step.cancelled():
        step.exception()
