"""How the fleet asks a worker itself: our worker program by its listener, others by their health route."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pilotlight.domain.worker import Address


class Refusal(StrEnum):
    """Why a worker program does not freeze its engine."""

    BUSY = "busy"
    """It has work in hand, or does not serve at this moment."""

    UNABLE = "unable"
    """It cannot, now or later."""


class DoorError(Exception):
    """A worker did not do what it was asked for, or did not answer in time: nobody knows how it stands."""


class DoorRefusedError(DoorError):
    """A worker program refused to freeze its engine, and goes on as before."""

    def __init__(self, message: str, refusal: Refusal) -> None:
        super().__init__(message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a worker program keeps of a frozen engine.

    Attributes:
        memory_bytes: Host memory that worker program and engine hold, shared pages counted in parts.
        slept: Whether the engine went to sleep first, and gave the memory of its GPUs back.
    """

    memory_bytes: int
    slept: bool


class WorkerDoor(Protocol):
    """Asks workers."""

    async def freeze(self, listener: Address, *, timeout_s: float) -> Kept:
        """Have our worker program stop its engine in place.

        Args:
            listener: The worker program's own.
            timeout_s: Longest wait for its answer.

        Raises:
            DoorRefusedError: It does not, and goes on as before.
            DoorError: Nobody knows what it did.
        """
        ...

    async def thaw(self, listener: Address, *, answers_s: float, timeout_s: float) -> None:
        """Have our worker program let its engine go on; returns when the engine has answered a request.

        Args:
            listener: The worker program's own.
            answers_s: How long the engine may take for that.
            timeout_s: Longest wait for the whole.

        Raises:
            DoorError: The engine does not answer, or the worker program does not.
        """
        ...

    async def look(self, server: Address, path: str, *, timeout_s: float) -> None:
        """Return when a server has answered a GET with 200.

        Raises:
            DoorError: It did not, or not in time.
        """
        ...
