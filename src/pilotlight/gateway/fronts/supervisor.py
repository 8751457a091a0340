"""Starts the processes that serve the data path, and anew those that end, until all are to end.

Made by `roads`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Sequence

import structlog

from pilotlight.errors import PilotlightError
from pilotlight.gateway.fronts.owner_side import Attached, OwnerSide
from pilotlight.gateway.handover import Handed, Reception

_log = structlog.get_logger()

_BACKOFF_S = 0.5
_BACKOFF_MAX_S = 10.0

_STEADY_S = 60.0
"""A front that lived for so long has not failed to start."""

_FAREWELL_S = 2.0
"""How long a front whose link is lost may take to end, and the last that it said to be read once it has."""


class FrontStartError(PilotlightError):
    """A process that serves the data path did not come up; the log says why."""


class FrontSupervisor:
    """Keeps one front for each socket.

    Args:
        side: The links' side of this process.
        listeners: Sockets at the public port; closed in the end.
        adopt: Serves a connection that a front hands over.
    """

    def __init__(
        self,
        side: OwnerSide,
        listeners: Sequence[socket.socket],
        adopt: Callable[[socket.socket, Handed], None],
    ) -> None:
        self._side = side
        self._adopt = adopt
        self._fronts = [_Front(self, number, listener) for number, listener in enumerate(listeners)]
        self._keeping: list[asyncio.Task[None]] = []
        self.stopping = False

    async def start(self) -> None:
        """Start all of them; returns when all answer requests.

        Raises:
            FrontStartError: One has ended before it did.
        """
        loop = asyncio.get_running_loop()
        self._keeping = [
            loop.create_task(front.keep(), name=f"front-{front.number}") for front in self._fronts
        ]
        for front, keeping in zip(self._fronts, self._keeping, strict=True):
            ready = loop.create_task(front.ready.wait(), name=f"front-{front.number}-ready")
            await asyncio.wait({ready, keeping}, return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if keeping.done():
                keeping.result()

    async def stop(self, within_s: float) -> None:
        """End all of them, so that what is under way is answered; idempotent.

        Args:
            within_s: Time for that, before they are killed.
        """
        self.stopping = True
        for front in self._fronts:
            front.stop()
        if not self._keeping:
            return
        _, late = await asyncio.wait(self._keeping, timeout=within_s)
        for front in self._fronts:
            front.kill()
        if late:
            _log.warning("fronts_killed", fronts=len(late), seconds=round(within_s, 1))
            await asyncio.wait(late)
        for keeping in self._keeping:
            with contextlib.suppress(FrontStartError):
                keeping.result()

    async def attach(self, link: socket.socket) -> Attached:
        """Begin to serve a front at the other end of a link."""
        return await self._side.attach(link)

    def receive(self, door: socket.socket) -> Reception:
        """Take in what comes through a front's door."""
        return Reception(door, self._adopt)


class _Front:
    """One socket, and the process that serves it at present.

    Attributes:
        number: Of the socket.
        ready: Set once a process has answered requests.
    """

    def __init__(self, supervisor: FrontSupervisor, number: int, listener: socket.socket) -> None:
        self._supervisor = supervisor
        self._listener = listener
        self._process: Process | None = None
        self._attached: Attached | None = None
        self._wake = asyncio.Event()
        self.number = number
        self.ready = asyncio.Event()

    async def keep(self) -> None:
        """Run one process after the other, until told to stop.

        Raises:
            FrontStartError: The first one has ended before it answered.
        """
        failures = 0
        while not self._supervisor.stopping:
            began_s = time.monotonic()
            status = await self._live()
            if self._supervisor.stopping:
                return
            if not self.ready.is_set():
                raise FrontStartError(
                    f"a process that serves the data path ended with status {status} before it answered"
                    " requests; the log above says why"
                )
            failures = 0 if time.monotonic() - began_s > _STEADY_S else failures + 1
            pause_s = pause_before(failures)
            _log.warning("front_ended", front=self.number, status=status, again_in_s=pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    def stop(self) -> None:
        """Tell it to answer what is under way and end; who still comes hears that nobody listens."""
        self._wake.set()
        self._listener.close()
        if self._attached is not None:
            self._attached.stop()

    def kill(self) -> None:
        """End it as it stands; harmless if it has ended."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _live(self) -> int | str:
        """The life of one process; returns how it has ended."""
        link, their_link = socket.socketpair()
        door, their_door = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with door:
            given = [sock.fileno() for sock in (their_link, their_door, self._listener)]
            try:
                self._process = process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "pilotlight.front",
                    *map(str, given),
                    stdin=DEVNULL,
                    stdout=DEVNULL,
                    pass_fds=given,
                    # A terminal's signals are for us; the link says when to end.
                    start_new_session=True,
                )
            except OSError as error:
                link.close()
                return error.strerror or "unknown"
            finally:
                their_link.close()
                their_door.close()
            reception = self._supervisor.receive(door)
            try:
                return await self._attend(process, link)
            finally:
                reception.close()
                self.kill()
                await process.wait()

    async def _attend(self, process: Process, link: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        self._attached = attached = await self._supervisor.attach(link)
        if self._supervisor.stopping:
            attached.stop()
        ready = loop.create_task(self._note_ready(attached), name=f"front-{self.number}-answers")
        ended = loop.create_task(process.wait(), name=f"front-{self.number}-ended")
        lost = loop.create_task(attached.lost.wait(), name=f"front-{self.number}-lost")
        try:
            await asyncio.wait({ended, lost}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({ended, lost}, timeout=_FAREWELL_S)
        finally:
            self._attached = None
            attached.close()
            self.kill()
            ready.cancel()
            lost.cancel()
        return await ended

    async def _note_ready(self, attached: Attached) -> None:
        await attached.ready.wait()
        self.ready.set()


def pause_before(failures: int) -> float:
    """Seconds until a front is started that has failed so often in a row; the first time none."""
    return 0.0 if failures <= 1 else min(_BACKOFF_MAX_S, _BACKOFF_S * 2.0 ** min(failures - 2, 16))
