"""Whether a worker fits on the host, and which GPUs it gets. Asked by the autoscaler before a start.

GPUs are counted: a GPU belongs to at most one worker that is not frozen, the lowest free indices are given.
Those of frozen workers come last: they were put to sleep and gave the GPU's memory back. A worker that asks
for none is a CPU worker, also on a host that has GPUs.

Host memory has to pass two tests, because each is blind to what the other sees:

1. *Promises.* What all workers were promised plus the need must not exceed the host's memory less the
   reserve. This looks at promises only, so a worker's actual use is not counted, and a worker that has not
   grown to its size yet cannot have its memory given away.
2. *Present use.* What is available now, less the promises of workers that are still starting, must cover
   the need. This sees other programs on the machine. A running worker's use is already missing from the
   available memory, so its promise is not subtracted again; that of a starting worker is subtracted in
   full, because it has touched only part of it so far. The reserve is not subtracted here: what the
   system and the gateway use of it is already missing too.

A frozen worker counts with what it holds instead of what it was promised: it takes no more while it is
frozen, and is ended before others go without (`core.freezing`).

Example: 16 GiB, reserve 1, two ready workers of 4 that use 3 each, 2 used by others: available 8. A third
of 4 fits (4+4+4 ≤ 15; 4 ≤ 8). While it starts, a fourth is refused by the first test (16 > 15).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one worker needs.

    Attributes:
        gpu_count: GPUs for itself; 0 means a CPU worker.
        memory_bytes: Host memory it is expected to take at most.
    """

    gpu_count: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of the host.

    Attributes:
        index: Its number in PCI bus order.
        name: As the driver says it.
        memory_bytes: Its own memory; 0 where the driver does not say.
    """

    index: int
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostResources:
    """What the host has.

    Attributes:
        memory_bytes_total: Memory that exists for us (the container's limit, where there is one).
        memory_bytes_available: Memory that could be taken now without swapping.
        gpus: Sorted by index.
    """

    memory_bytes_total: int
    memory_bytes_available: int
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What a worker that has not ended holds.

    Attributes:
        devices: Indices of its GPUs.
        memory_bytes: Host memory promised to it; what it holds, when it is frozen.
        starting: Whether it has yet to take most of that memory.
        frozen: Whether its GPUs may be given to others.
    """

    devices: tuple[int, ...] = ()
    memory_bytes: int = 0
    starting: bool = False
    frozen: bool = False


class PlacementReason(StrEnum):
    """Why a worker was not placed."""

    HOST_HAS_FEWER_GPUS = "host_has_fewer_gpus"
    HOST_HAS_LESS_MEMORY = "host_has_less_memory"
    GPUS_TAKEN = "gpus_taken"
    MEMORY_PROMISED = "memory_promised"
    MEMORY_IN_USE = "memory_in_use"

    @property
    def permanent(self) -> bool:
        """Whether it would be refused on this host even if nothing else ran on it."""
        return self in {PlacementReason.HOST_HAS_FEWER_GPUS, PlacementReason.HOST_HAS_LESS_MEMORY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The worker fits.

    Attributes:
        devices: Indices of the GPUs it gets, ascending; empty for a CPU worker.
    """

    devices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NotPlaced:
    """The worker does not fit.

    Attributes:
        reason: Why.
        message: The same in words and numbers, fit for a user's eyes.
    """

    reason: PlacementReason
    message: str


def decide_placement(
    need: Resources, host: HostResources, taken: Sequence[Reservation], *, memory_reserve_bytes: int = 0
) -> Placed | NotPlaced:
    """The GPUs for one more worker, or why there is no room for it.

    Args:
        need: What it needs.
        host: What the host has, read just now.
        taken: One entry for each worker that has not ended, frozen ones included.
        memory_reserve_bytes: Host memory never given to workers.
    """
    assert need.gpu_count >= 0, need
    assert need.memory_bytes >= 0, need
    in_use = devices_in_use(taken)
    asleep = {index for reservation in taken if reservation.frozen for index in reservation.devices}
    free = [gpu.index for gpu in host.gpus if gpu.index not in in_use]
    free.sort(key=lambda index: (index in asleep, index))
    if need.gpu_count > len(host.gpus):
        return NotPlaced(
            reason=PlacementReason.HOST_HAS_FEWER_GPUS,
            message=f"the worker needs {need.gpu_count} GPUs, this host has {len(host.gpus)}",
        )
    memory = _check_memory(need.memory_bytes, host, taken, memory_reserve_bytes)
    if memory is not None and memory.reason.permanent:
        return memory
    if need.gpu_count > len(free):
        return NotPlaced(
            reason=PlacementReason.GPUS_TAKEN,
            message=(
                f"the worker needs {need.gpu_count} GPUs, {len(free)} of {len(host.gpus)} are free; "
                "one becomes free when another worker ends"
            ),
        )
    return memory or Placed(devices=tuple(sorted(free[: need.gpu_count])))


def devices_in_use(taken: Iterable[Reservation]) -> frozenset[int]:
    """Indices of GPUs that cannot be given to another worker, nor back to a frozen one."""
    return frozenset(
        index for reservation in taken if not reservation.frozen for index in reservation.devices
    )


def _check_memory(
    need: int, host: HostResources, taken: Sequence[Reservation], reserve: int
) -> NotPlaced | None:
    budget = host.memory_bytes_total - reserve
    promised = sum(reservation.memory_bytes for reservation in taken)
    starting = sum(reservation.memory_bytes for reservation in taken if reservation.starting)
    if need > budget:
        return NotPlaced(
            reason=PlacementReason.HOST_HAS_LESS_MEMORY,
            message=(
                f"the worker needs {_gib(need)} of memory, this host has {_gib(host.memory_bytes_total)} "
                f"with {_gib(reserve)} kept in reserve"
            ),
        )
    if promised + need > budget:
        return NotPlaced(
            reason=PlacementReason.MEMORY_PROMISED,
            message=(
                f"the worker needs {_gib(need)} of memory, {_gib(promised)} of {_gib(budget)} "
                f"belong to {len(taken)} other workers"
            ),
        )
    if need > host.memory_bytes_available - starting:
        return NotPlaced(
            reason=PlacementReason.MEMORY_IN_USE,
            message=(
                f"the worker needs {_gib(need)} of memory, {_gib(host.memory_bytes_available)} are available "
                f"now, {_gib(starting)} of that for workers that are starting"
            ),
        )
    return None


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
