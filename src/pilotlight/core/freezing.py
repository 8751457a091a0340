"""Which frozen workers have to end: by age, for the memory they hold, and to make room for others.

A frozen worker costs no CPU but keeps its memory, so that it is a cache and is treated like one: what was
used least recently goes first, and no more than is needed. `loops/freezer.py` asks `decide_evictions` from
time to time; the fleet asks `make_room` when a worker finds no room, and `clear_gpus` for the GPUs it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pilotlight.core.placement import Gpu, HostResources, Placed, Reservation, Resources, decide_placement

LOOK_MS = 2_000
"""While something is frozen, look this often: pressure and available memory come without an event. Pressure
is an average over 10 s and falls slowly, so one look ends one worker for it and the next sees the effect."""

_LEFT_SHARE = 20
"""An engine that starts on a GPU finds all but a twentieth of it free: it wants nine tenths, or ends."""


class EvictionReason(StrEnum):
    """Why a frozen worker has to end."""

    AGE = "age"
    BUDGET = "budget"
    GPU_BUDGET = "gpu_budget"
    AVAILABLE = "available"
    PRESSURE = "pressure"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenView:
    """What is known of a frozen worker.

    Attributes:
        id: Who.
        since_ms: Since when it is frozen; also the order in which frozen workers were used last.
        memory_bytes: Host memory it holds (proportional set size).
        devices: Indices of its GPUs.
        gpu_memory_bytes: Memory it still holds on each of them.
    """

    id: str
    since_ms: int
    memory_bytes: int
    devices: tuple[int, ...] = ()
    gpu_memory_bytes: int = 0

    @property
    def reservation(self) -> Reservation:
        """What placement has to know of it."""
        return Reservation(devices=self.devices, memory_bytes=self.memory_bytes, frozen=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """The host's memory now.

    Attributes:
        total_bytes: Memory that exists for us.
        available_bytes: Memory that could be taken now without swapping.
        pressure_percent: Share of the last 10 s in which some process waited for memory (`some avg10` of
            /proc/pressure/memory); None where the kernel does not say.
    """

    total_bytes: int
    available_bytes: int
    pressure_percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeSettings:
    """Bounds on what is kept frozen.

    Attributes:
        memory_bytes: Host memory that all frozen workers together may hold; None means half of the host's.
        gpu_memory_bytes: Memory that they may hold on one GPU; None means any amount.
        age_ms: How long a worker stays frozen at most.
        pressure_percent: Pressure from which on they are ended one by one.
        available_bytes_min: Memory of the host that has to be available beside them.
    """

    memory_bytes: int | None
    gpu_memory_bytes: int | None
    age_ms: int
    pressure_percent: float
    available_bytes_min: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """A frozen worker that has to end, and why."""

    id: str
    reason: EvictionReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Evictions:
    """What to do.

    Attributes:
        evict: Workers to end.
        next_ms: When to look again; None when nothing stays frozen, so that only a freeze can change this.
    """

    evict: tuple[Eviction, ...] = ()
    next_ms: int | None = None


def decide_evictions(
    frozen: Sequence[FrozenView], host: HostMemory, now_ms: int, settings: FreezeSettings
) -> Evictions:
    """Which frozen workers have to end now.

    Args:
        frozen: All frozen workers of the host, in any order.
        host: Its memory, read just now.
        now_ms: The moment.
        settings: What may be kept.
    """
    kept = _least_recent_first(frozen)
    evict: list[Eviction] = []

    def end(views: Sequence[FrozenView], reason: EvictionReason) -> None:
        evict.extend(Eviction(id=view.id, reason=reason) for view in views)
        kept[:] = [view for view in kept if view not in views]

    end([view for view in kept if now_ms - view.since_ms >= settings.age_ms], EvictionReason.AGE)
    budget = host.total_bytes // 2 if settings.memory_bytes is None else settings.memory_bytes
    end(_fewest(kept, _held, _held(kept) - budget), EvictionReason.BUDGET)
    if settings.gpu_memory_bytes is not None:
        for device in sorted({device for view in kept for device in view.devices}):
            there = [view for view in kept if device in view.devices]
            excess = _held_on_gpu(there) - settings.gpu_memory_bytes
            end(_fewest(there, _held_on_gpu, excess), EvictionReason.GPU_BUDGET)
    available = host.available_bytes + _held(frozen) - _held(kept)
    end(_fewest(kept, _held, settings.available_bytes_min - available), EvictionReason.AVAILABLE)
    pressed = host.pressure_percent is not None and host.pressure_percent >= settings.pressure_percent
    if pressed and not evict:
        end(kept[:1], EvictionReason.PRESSURE)
    oldest_ms = min((view.since_ms for view in kept), default=None)
    return Evictions(
        evict=tuple(evict),
        next_ms=None if oldest_ms is None else min(oldest_ms + settings.age_ms, now_ms + LOOK_MS),
    )


def make_room(
    need: Resources,
    host: HostResources,
    frozen: Sequence[FrozenView],
    others: Sequence[Reservation],
    *,
    memory_reserve_bytes: int = 0,
) -> tuple[str, ...] | None:
    """The frozen workers to end so that one more worker finds room; empty when it finds room as it is.

    Args:
        need: What that worker needs.
        host: What the host has, read just now.
        frozen: All frozen workers of the host, in any order.
        others: One entry for each other worker that has not ended.
        memory_reserve_bytes: Host memory never given to workers.

    Returns:
        Ids, least recently used first; None when the room would not be enough without all of them either.
    """
    ordered = _least_recent_first(frozen)

    reservations = {view.id: view.reservation for view in ordered}

    def enough(ended: Sequence[FrozenView]) -> bool:
        gone = {view.id for view in ended}
        placement = decide_placement(
            need,
            replace(host, memory_bytes_available=host.memory_bytes_available + _held(ended)),
            [*others, *(kept for view_id, kept in reservations.items() if view_id not in gone)],
            memory_reserve_bytes=memory_reserve_bytes,
        )
        return isinstance(placement, Placed)

    if not enough(ordered):
        return None
    return tuple(view.id for view in _spare(ordered, enough))


def clear_gpus(
    devices: Collection[int], gpus: Sequence[Gpu], frozen: Sequence[FrozenView]
) -> tuple[str, ...]:
    """The frozen workers to end so that one more worker finds its GPUs all but empty.

    Args:
        devices: Indices of the GPUs that it gets.
        gpus: Those of the host.
        frozen: All frozen workers of the host, in any order.
    """
    kept, ended = _least_recent_first(frozen), list[FrozenView]()
    for gpu in gpus:
        there = [view for view in kept if gpu.index in view.devices] if gpu.index in devices else []
        ended += _fewest(there, _held_on_gpu, _held_on_gpu(there) - gpu.memory_bytes // _LEFT_SHARE)
        kept = [view for view in kept if view not in ended]
    return tuple(view.id for view in ended)


def _fewest(
    ordered: Sequence[FrozenView], held: Callable[[Iterable[FrozenView]], int], excess: int
) -> list[FrozenView]:
    """Those to end so that `excess` is given back at least, or all that is held when that is less."""
    holding = [view for view in ordered if held([view])]
    return _spare(holding, lambda ended: held(ended) >= min(excess, held(holding)))


def _spare(ordered: Sequence[FrozenView], enough: Callable[[Sequence[FrozenView]], bool]) -> list[FrozenView]:
    """As few as possible from the front so that their end is enough, and of these none that can be spared."""
    ended = list(ordered[: next(count for count in range(len(ordered) + 1) if enough(ordered[:count]))])
    for view in reversed(list(ended)):
        rest = [other for other in ended if other is not view]
        if enough(rest):
            ended = rest
    return ended


def _least_recent_first(frozen: Sequence[FrozenView]) -> list[FrozenView]:
    return sorted(frozen, key=lambda view: (view.since_ms, view.id))


def _held(views: Iterable[FrozenView]) -> int:
    return sum(view.memory_bytes for view in views)


def _held_on_gpu(views: Iterable[FrozenView]) -> int:
    return sum(view.gpu_memory_bytes for view in views)
