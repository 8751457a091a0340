"""Where one more worker goes, and which frozen ones have to end for it; pure, called by the fleet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pilotlight.core.freezing import FrozenView, clear_gpus, make_room
from pilotlight.core.placement import (
    HostResources,
    NotPlaced,
    Reservation,
    Resources,
    decide_placement,
)
from pilotlight.domain.worker import WorkerState
from pilotlight.loops.living import Living


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Room for a worker.

    Attributes:
        devices: Indices of the GPUs it gets.
        evict: Frozen workers that have to end before it is started.
    """

    devices: tuple[int, ...]
    evict: tuple[str, ...] = ()


def find_place(
    need: Resources, host: HostResources, living: Iterable[Living], *, memory_reserve_bytes: int
) -> Place | NotPlaced:
    """Room for one more worker, made by the end of frozen ones if need be; else why there is none.

    Args:
        need: What it needs.
        host: What the host has, read just now.
        living: All workers that have not ended.
        memory_reserve_bytes: Host memory never given to workers.
    """
    lives = list(living)
    frozen = frozen_views(lives)
    others = [_reservation(live) for live in lives if not live.asleep]
    evict = make_room(need, host, frozen, others, memory_reserve_bytes=memory_reserve_bytes)
    gone = [view for view in frozen if view.id in (evict or ())]
    freed = sum(view.memory_bytes for view in gone)
    placement = decide_placement(
        need,
        replace(host, memory_bytes_available=host.memory_bytes_available + freed),
        [*others, *(view.reservation for view in frozen if view not in gone)],
        memory_reserve_bytes=memory_reserve_bytes,
    )
    if isinstance(placement, NotPlaced):
        return placement
    left = [view for view in frozen if view not in gone]
    return Place(
        devices=placement.devices,
        evict=(*(evict or ()), *clear_gpus(placement.devices, host.gpus, left)),
    )


def frozen_views(living: Iterable[Living]) -> list[FrozenView]:
    """The workers that are frozen and nobody is waking."""
    return [
        FrozenView(
            id=live.worker.id,
            since_ms=live.worker.state_ms,
            memory_bytes=live.frozen.memory_bytes,
            devices=live.worker.devices,
            gpu_memory_bytes=live.frozen.gpu_memory_bytes,
        )
        for live in living
        if live.asleep and live.frozen is not None
    ]


def _reservation(live: Living) -> Reservation:
    # One that was frozen and is being ended takes no more than it had.
    kept = live.frozen if live.worker.state is WorkerState.STOPPING else None
    return Reservation(
        devices=live.worker.devices,
        memory_bytes=live.worker.memory_bytes if kept is None else kept.memory_bytes,
        starting=live.worker.state is WorkerState.STARTING,
    )
