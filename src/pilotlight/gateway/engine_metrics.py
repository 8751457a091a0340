"""The engines whose load is worth knowing, and how they are asked for it.

`loops.engine_load` does the asking, and lowers and raises the capacity of their workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.domain.worker import Address
from pilotlight.gateway.slots import SlotTable, WorkerSlots
from pilotlight.gateway.worker_door import ask_once
from pilotlight.loops.engine_load import EngineLoad, EngineSlots
from pilotlight.ports.clock import Clock
from pilotlight.ports.door import DoorError

_TIMEOUT_S = 0.8
"""Shorter than the time between two questions. An engine that works is asked again in a moment."""

_PAGE_BYTES_MAX = 1024 * 1024
"""A whole page of vLLM's has 50 KB, and more with adapters and with several engines."""


def engine_load(slots: SlotTable, endpoint: Callable[[str], Endpoint | None], clock: Clock) -> EngineLoad:
    """The task that keeps a table's workers to what their engines can do; to be started.

    Args:
        slots: The table.
        endpoint: Looks up a living endpoint by id.
        clock: Time.
    """
    return EngineLoad(
        engines=lambda: engines_to_ask(slots.workers(), endpoint),
        lives=lambda worker_id: slots.worker(worker_id) is not None,
        limit=slots.limit_worker,
        ask=ask_page,
        clock=clock,
    )


def engines_to_ask(
    workers: Iterable[WorkerSlots], endpoint: Callable[[str], Endpoint | None]
) -> list[EngineSlots]:
    """The engines of workers that have something to do, or fewer slots than configured.

    Those of endpoints whose workers are not ours to know (`queue`, `load-balancer`) are left alone, and so
    is a worker that takes nothing: it drains, is frozen, or could not be reached.

    Args:
        workers: All of them.
        endpoint: Looks up a living endpoint by id.
    """
    asked = []
    for slots in workers:
        if not slots.takes_requests or slots.registration is None:
            continue
        if not slots.occupied and slots.limit is None:
            continue
        owner = endpoint(slots.endpoint_id)
        if owner is not None and owner.kind is EndpointKind.VLLM:
            asked.append(
                EngineSlots(
                    worker_id=slots.worker_id,
                    engine=slots.registration.engine,
                    occupied=slots.occupied,
                    configured=slots.configured,
                )
            )
    return asked


async def ask_page(address: Address, path: str) -> bytes | None:
    """A page of an engine's server; empty where it has none, None where it does not answer in time.

    Args:
        address: Where it listens.
        path: Path and query.
    """
    try:
        status, body = await ask_once(address, "GET", path, timeout_s=_TIMEOUT_S, bytes_max=_PAGE_BYTES_MAX)
    except DoorError:
        return None
    return body if status == 200 and len(body) < _PAGE_BYTES_MAX else b""
