"""Which gateway keeps the workers, where several share a store: one leads, the others follow.

The leader starts and ends workers, hands jobs to them, keeps their time, sends webhooks. A follower serves
the job API and the management API from the same store. It asks for the lead every few seconds; when it gets
it, the old leader is gone, and whatever that one had in hand is recovered. A leader that loses the lead ends
what only a leader may do and goes on as a follower. A store of one process always gives the lead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

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
        end: Ends that again; called when the lead was lost.
    """

    def __init__(
        self,
        *,
        lead: Callable[[Callable[[], None]], Awaitable[bool]],
        begin: Callable[[], Awaitable[None]],
        end: Callable[[], Awaitable[None]],
    ) -> None:
        self._lead = lead
        self._begin = begin
        self._end = end
        self._held = False
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.leading = False

    async def start(self) -> None:
        """Take the lead and begin, where nobody else has it; else go on asking for it.

        Raises:
            StoreError: The store cannot be asked, or what had to be recovered could not be.
        """
        await self._ask()
        if self._held:
            await self._begin()
            self.leading = True
        else:
            _log.info("following", reason="another gateway leads")
        self._task = asyncio.create_task(self._run(), name="leadership")

    async def stop(self) -> None:
        """Ask no more. The lead itself lasts until the store is closed; idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            try:
                if self.leading:
                    await self._lost.wait()
                    self.leading = False
                    _log.warning("lead_lost")
                    await self._end()
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
        await self._begin()
        self.leading = True
        _log.info("leading")

    async def _ask(self) -> None:
        self._held = False
        self._lost.clear()
        self._held = await self._lead(self._lost.set)
