"""Stops workers in place and lets them go on where they were stopped; used by the fleet, who owns them.

    READY ──slots closed, nothing in hand──► FROZEN ──asked to go on, answers──► READY, slots open
                                                │ told to end: killed as it is
                                                ▼
                                             STOPPING

Of our own worker program only the engine is stopped: the program does that when it is asked, so that its
polls and heartbeats go on. Of any other program every process is stopped by the cluster.

One lock for each worker keeps a freeze and a thaw apart. Whoever ends a worker does not wait for it: after
every answer of others it is seen whether the worker is still frozen. A thaw that is asked for while a freeze
goes on waits until that is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import structlog

from pilotlight.core.health_check import health_path
from pilotlight.domain.endpoint import EndpointKind
from pilotlight.domain.usage import StartRecord
from pilotlight.domain.worker import Address, Failure, Rung, WorkerState
from pilotlight.errors import ClusterError
from pilotlight.loops.living import Frozen, Living
from pilotlight.ports.clock import Clock
from pilotlight.ports.cluster import Cluster
from pilotlight.ports.door import DoorError, DoorRefusedError, Refusal, WorkerDoor
from pilotlight.ports.fleet import WorkerListener
from pilotlight.settings import WorkerSettings

_log = structlog.get_logger()

_FREEZE_S = 10.0
"""How long a worker program may take to freeze its engine. Requests that come meanwhile wait for it, too."""

_MARGIN_S = 0.5
"""Beyond the time that an engine has for its answer: the way there and back on a busy machine."""

_WEIGHTS_S = 60.0
"""How much longer an engine may take that sleeps first: its weights leave its GPUs, and go back, or are read
again. Before that its worker program has found out whether it lives at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """What only the fleet does with a worker.

    Attributes:
        change: Changes its state.
        reopen: Opens the slots that it had.
        started: Takes note that a start of it has succeeded.
        record: Has it written down, without waiting for that.
        put_start: Records how a start of it ended.
        end: Ends it as it is, for a reason, without waiting for that.
    """

    change: Callable[[Living, WorkerState], None]
    reopen: Callable[[Living], None]
    started: Callable[[Living], None]
    record: Callable[[Living], object]
    put_start: Callable[[StartRecord], Awaitable[None]]
    end: Callable[[Living, str], object]


class Freezing:
    """Freezes and thaws workers.

    Args:
        owner: Changes them.
        living: All workers that live.
        door: Asks our worker programs, and servers for their health.
        cluster: Stops other programs.
        listener: Told what may be done with a worker.
        clock: Time.
        settings: How long a thaw may take.
    """

    def __init__(
        self,
        owner: Owner,
        living: Callable[[], Iterable[Living]],
        *,
        door: WorkerDoor,
        cluster: Cluster,
        listener: WorkerListener,
        clock: Clock,
        settings: WorkerSettings,
    ) -> None:
        self._owner = owner
        self._living = living
        self._door = door
        self._cluster = cluster
        self._listener = listener
        self._clock = clock
        self._settings = settings

    def freezable(self, live: Living) -> bool:
        """Whether freezing a worker makes sense.

        Only our own worker program gives the memory of GPUs back, which would lie idle else.
        """
        worker = live.worker
        if worker.state is not WorkerState.READY or worker.out_of_rotation:
            return False
        if live.killed or live.failure is not None or live.unfreezable:
            return False
        return (not worker.devices or _door_of(live) is not None) and self._listener.at_rest(worker.id)

    async def freeze(self, live: Living, *, reason: str) -> bool:
        """Stop a worker in place; False when it goes on, or had to be ended."""
        async with live.changing:
            if not self.freezable(live) or self._listener.occupied(live.worker.id):
                return False
            return await self._freeze(live, reason)

    async def thaw(self, live: Living) -> bool:
        """Let a worker go on; True when it is ready then, False when it had to be ended."""
        asked_ms = self._clock.now_ms()
        # From here on it is given what it needs: nobody ends it for its memory, or gets its GPUs.
        live.thawing = True
        try:
            async with live.changing:
                return await self._thaw(live, asked_ms)
        finally:
            live.thawing = False

    def woke(self, live: Living) -> None:
        """A worker program has let its engine go on by itself, for somebody who reached it past us."""
        if live.worker.state is WorkerState.FROZEN and not live.changing.locked():
            live.begin_start(self._clock.now_ms(), Rung.FROZEN)
            self._ready(live)

    async def _freeze(self, live: Living, reason: str) -> bool:
        begun_ms = self._clock.now_ms()
        self._owner.change(live, WorkerState.FROZEN)
        # From here on requests are held, and jobs stay queued: they ask for a thaw, which waits for us.
        self._listener.frozen(live.worker)
        try:
            frozen = await self._stop(live)
        except DoorRefusedError as error:
            live.unfreezable = error.refusal is Refusal.UNABLE
            return self._go_on(live, str(error))
        except ClusterError as error:
            # All of it runs as before, so it may end like any other that is idle.
            live.unfreezable = True
            return self._go_on(live, str(error))
        except DoorError as error:
            return self._give_up(live, f"it could not be frozen: {error}")
        except Exception as error:  # noqa: BLE001 - nobody would wake it, and no budget would count it
            _log.exception("freeze_failed", worker=live.worker.id)
            return self._give_up(live, f"it could not be frozen: {error!r}")
        if live.worker.state is not WorkerState.FROZEN:
            return False
        worker = live.worker
        if worker.devices and not frozen.slept:
            return self._give_up(live, "its engine does not sleep, so it would keep the memory of its GPUs")
        live.frozen = frozen
        _log.info(
            "worker_frozen", endpoint=worker.endpoint_id, worker=worker.id, reason=reason,
            memory_bytes=frozen.memory_bytes, took_ms=self._clock.now_ms() - begun_ms,
        )  # fmt: skip
        # A thaw that is asked for meanwhile does not wait for the store.
        self._owner.record(live)
        return True

    async def _stop(self, live: Living) -> Frozen:
        """Stop what is to be stopped of a worker; see `WorkerDoor.freeze` and `Cluster.freeze` for errors."""
        worker, door = live.worker, _door_of(live)
        if door is None:
            kept_bytes = await self._cluster.freeze(worker.id)
            # Into processes of another user nobody may look; what was promised is the most that they hold.
            return Frozen(memory_bytes=kept_bytes or worker.memory_bytes, whole=True)
        timeout_s = _FREEZE_S + (_WEIGHTS_S if worker.devices else 0)
        kept = await self._door.freeze(door, timeout_s=timeout_s)
        on_gpu = await self._cluster.gpu_memory(worker.id, worker.devices) if worker.devices else 0
        return Frozen(memory_bytes=kept.memory_bytes, gpu_memory_bytes=on_gpu, slept=kept.slept)

    def _go_on(self, live: Living, why: str) -> bool:
        """Use a worker again that was not frozen after all."""
        if live.worker.state is WorkerState.FROZEN:
            _log.info(
                "worker_not_frozen", endpoint=live.worker.endpoint_id, worker=live.worker.id, reason=why
            )
            self._owner.change(live, WorkerState.READY)
            self._listener.thawed(live.worker, live.endpoint, whole=_door_of(live) is None)
            self._owner.reopen(live)
        return False

    def _give_up(self, live: Living, why: str) -> bool:
        if live.worker.state is WorkerState.FROZEN:
            _log.warning(
                "worker_given_up", endpoint=live.worker.endpoint_id, worker=live.worker.id, reason=why
            )
            self._owner.end(live, why)
        return False

    async def _thaw(self, live: Living, asked_ms: int) -> bool:
        worker = live.worker
        if worker.state is WorkerState.READY:
            return not live.killed
        if worker.state is not WorkerState.FROZEN or live.frozen is None or live.failure is not None:
            return False
        if taken := self._taken(live):
            return self._give_up(live, f"its GPU {', '.join(map(str, taken))} is in use by another worker")
        live.begin_start(asked_ms, Rung.FROZEN)
        live.start_memory_bytes = live.frozen.memory_bytes
        try:
            await self._continue(live, live.frozen)
        except (DoorError, ClusterError, TimeoutError) as error:
            cause = str(error) or f"no answer within {self._settings.thaw_timeout_s + _MARGIN_S:g} s"
            return await self._failed(live, f"the frozen worker did not come back: {cause}")
        except Exception as error:  # noqa: BLE001 - as above: it would stay where it is
            _log.exception("thaw_failed", worker=worker.id)
            return await self._failed(live, f"the frozen worker did not come back: {error!r}")
        if live.worker.state is not WorkerState.FROZEN:
            return False
        self._ready(live)
        # Somebody waits. A gateway that is killed before it is written finds a frozen worker on record, and
        # ends it like a ready one; a few ms count as frozen then.
        self._owner.record(live)
        return True

    def _ready(self, live: Living) -> None:
        whole = live.frozen is not None and live.frozen.whole
        live.frozen = None
        self._owner.change(live, WorkerState.READY)
        self._listener.thawed(live.worker, live.endpoint, whole=whole)
        self._owner.reopen(live)
        self._owner.started(live)
        took_ms = live.worker.state_ms - live.stages[0][1]
        _log.info("worker_thawed", endpoint=live.worker.endpoint_id, worker=live.worker.id, took_ms=took_ms)

    def _taken(self, live: Living) -> list[int]:
        """GPUs of a frozen worker that others use by now."""
        used = {
            device
            for other in self._living()
            if other is not live and not other.asleep
            for device in other.worker.devices
        }
        return sorted(used.intersection(live.worker.devices))

    async def _continue(self, live: Living, frozen: Frozen) -> None:
        answers_s = self._settings.thaw_timeout_s
        timeout_s = answers_s + _MARGIN_S
        door = _door_of(live)
        if door is not None:
            if frozen.slept:
                timeout_s += _WEIGHTS_S
            await self._door.thaw(door, answers_s=answers_s, timeout_s=timeout_s)
            return
        async with asyncio.timeout(timeout_s):
            await self._cluster.thaw(live.worker.id)
            if live.endpoint.kind is EndpointKind.LOAD_BALANCER and live.registration is not None:
                path = health_path(live.endpoint.revision.env)
                await self._door.look(live.registration.engine, path, timeout_s=answers_s)

    async def _failed(self, live: Living, cause: str) -> bool:
        if live.worker.state is WorkerState.FROZEN:
            live.failure = Failure(
                kind="thaw_failed", cause=cause, advice="another worker takes its place; see its log"
            )
            self._give_up(live, cause)
            await self._owner.put_start(live.finish_start("failed", self._clock.now_ms()))
        return False


def _door_of(live: Living) -> Address | None:
    """The listener of our own worker program; None for any other."""
    return None if live.registration is None else live.registration.listener
