"""How many workers an endpoint should have, and which of them should end.

RunPod's two rules (serverless-api.md §5.2), made exact:

* REQUEST_COUNT: desired = ceil((Q + P) / V).
* QUEUE_DELAY: from zero, the first waiting request starts one worker at once. Later, when the oldest
  has waited longer than V seconds and no capacity is idle, desired = W + ceil(n / c), where n counts
  what has waited longer than V and finds no slot on workers that are still starting. (Without that
  last part every look during a start would add workers again; "workers still initializing count
  towards W, so a burst does not over-provision".)

Q counts queued jobs and held requests, P leased jobs and requests in flight, W workers that are ready
or starting. A worker above the minimum with no slot in use for the idle timeout ends. Low-priority
jobs start nothing but keep a ready worker from ending.

With FlashBoot that worker is frozen instead where it can be, and what is missing later is thawed before
anything is started, the most recently frozen first. Frozen workers do not count towards W, but W and they
together are no more than the maximum. A thaw is no start: it is not held up by a back-off, and where somebody
waits for workers that are all still starting, one is thawed beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from pilotlight.domain.endpoint import ScalerType
from pilotlight.domain.worker import WorkerState

_ALIVE = frozenset({WorkerState.STARTING, WorkerState.READY})

_LATE_FACTOR = 3
_LATE_MS_MIN = 10_000
"""A start that takes three times as long as others did, and this long, is not waited for: others are started
beside it."""


class ScaleReason(StrEnum):
    """Why a decision came out as it did; the strongest of the reasons that applied."""

    STEADY = "steady"
    PAUSED = "paused"
    BELOW_MINIMUM = "below_minimum"
    FIRST_REQUEST = "first_request"
    QUEUE_DELAY = "queue_delay"
    REQUEST_COUNT = "request_count"
    IDLE_TIMEOUT = "idle_timeout"
    ABOVE_MAXIMUM = "above_maximum"
    NEW_REVISION = "new_revision"
    FLASHBOOT_OFF = "flashboot_off"
    BACKING_OFF = "backing_off"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What scaling needs to know of a living worker.

    Attributes:
        id: Who.
        state: starting, ready or frozen ones count; draining and stopping ones are on their way out.
        current: Whether it runs the endpoint's current revision.
        occupied: Slots in use.
        capacity: Slots in all.
        idle_since_ms: Since when no slot is in use; None while one is, or before it was ready.
        healthy: Whether health checks leave it in rotation; only load-balancing workers have any.
        since_ms: Since when it is in its state; of one that is starting, without the time for its model.
        waking: Whether it is being thawed; it counts as starting then.
        fetching: Whether it is starting and fetches its model, which no estimate knows the length of.
        freezable: Whether it could be frozen; of a ready one.
        devices: Indices of its GPUs.
    """

    id: str
    state: WorkerState
    current: bool
    occupied: int
    capacity: int
    idle_since_ms: int | None
    healthy: bool = True
    since_ms: int = 0
    waking: bool = False
    fetching: bool = False
    freezable: bool = False
    devices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSnapshot:
    """One endpoint at one moment.

    Attributes:
        workers: Living workers, oldest first.
        waiting: Q, normal-priority jobs and held requests.
        waiting_low: Low-priority jobs.
        oldest_ms: Since when the oldest of `waiting` waits.
        overdue: How many of `waiting` have waited longer than the scaler value (QUEUE_DELAY).
        in_progress: P, leased jobs and requests in flight.
        retry_ms: Until when failures forbid starts; None when starts are allowed.
        start_estimate_ms: How long a start takes; None when nobody knows.
        devices_in_use: GPUs of workers that are not frozen, whoever's; one that had them before cannot go on.
    """

    workers: tuple[WorkerView, ...] = ()
    waiting: int = 0
    waiting_low: int = 0
    oldest_ms: int | None = None
    overdue: int = 0
    in_progress: int = 0
    retry_ms: int | None = None
    start_estimate_ms: int | None = None
    devices_in_use: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSettings:
    """The endpoint's own settings that scaling obeys."""

    workers_min: int
    workers_max: int
    idle_timeout_ms: int
    scaler: ScalerType
    scaler_value: float
    concurrency: int
    flashboot: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDecision:
    """What to do. A worker is in at most one of `thaw`, `freeze` and `drain`.

    Attributes:
        thaw: Ids of frozen workers to let go on now, before anything else.
        start: Workers to start now.
        freeze: Ids of idle workers to freeze.
        drain: Ids of workers to end, idle or after their work, frozen ones at once.
        desired: The number aimed for.
        reason: Why.
        next_ms: When to look again although nothing happens; None when only an event can change this.
    """

    thaw: tuple[str, ...] = ()
    start: int = 0
    freeze: tuple[str, ...] = ()
    drain: tuple[str, ...] = ()
    desired: int = 0
    reason: ScaleReason = ScaleReason.STEADY
    next_ms: int | None = None


def decide_scale(snapshot: ScaleSnapshot, now_ms: int, settings: ScaleSettings) -> ScaleDecision:
    """How many workers to start and which to thaw, freeze and drain, with the reason.

    Args:
        snapshot: The endpoint at this moment.
        now_ms: The moment.
        settings: The endpoint's settings.
    """
    stale = [
        worker.id
        for worker in snapshot.workers
        if not worker.current and worker.state in {*_ALIVE, WorkerState.FROZEN}
    ]
    present = [worker for worker in snapshot.workers if worker.current and worker.state in _ALIVE]
    alive, bounds = present, settings
    if snapshot.waiting and len(present) <= settings.workers_max:
        # Somebody waits, and those out of rotation serve nobody: others are started in the room that is left.
        alive = [worker for worker in present if worker.healthy]
        bounds = replace(settings, workers_max=settings.workers_max - len(present) + len(alive))
    desired, reason = _desired(snapshot, now_ms, bounds, alive)
    surplus, surplus_reason = _surplus(snapshot, now_ms, bounds, alive)
    missing = max(0, desired - len(alive))
    if surplus:
        missing, reason = 0, surplus_reason
    # The most recently frozen first; those at the end of the list are ended when they are too many.
    frozen = [worker for worker in snapshot.workers if worker.current and worker.state is WorkerState.FROZEN]
    frozen.sort(key=lambda worker: worker.since_ms, reverse=True)
    # A start takes seconds, and a thaw next to none.
    beside = int(not missing and bool(snapshot.waiting) and _only_starting(alive, bounds))
    thaw = _thawed(frozen, missing + beside, snapshot.devices_in_use) if settings.flashboot else []
    if beside and thaw:
        desired, reason = len(alive) + 1, ScaleReason.FIRST_REQUEST
    start = max(0, missing - len(thaw))
    if start and snapshot.retry_ms is not None and snapshot.retry_ms > now_ms:
        start, reason = 0, reason if thaw else ScaleReason.BACKING_OFF
    can_freeze = settings.flashboot and surplus_reason is ScaleReason.IDLE_TIMEOUT
    freeze = [worker.id for worker in surplus if can_freeze and worker.freezable]
    end = [worker.id for worker in surplus if worker.id not in freeze]
    room = max(0, settings.workers_max - (len(present) - len(end)) - start - len(thaw))
    too_many = [worker.id for worker in frozen if worker.id not in thaw][room if settings.flashboot else 0 :]
    if stale and not missing:
        reason = ScaleReason.NEW_REVISION
    elif too_many and not missing and not surplus:
        reason = ScaleReason.ABOVE_MAXIMUM if settings.flashboot else ScaleReason.FLASHBOOT_OFF
    return ScaleDecision(
        thaw=tuple(thaw),
        start=start,
        freeze=tuple(freeze),
        drain=(*stale, *end, *too_many),
        desired=desired,
        reason=reason,
        next_ms=_next_look(snapshot, now_ms, bounds, alive),
    )


def _only_starting(alive: list[WorkerView], settings: ScaleSettings) -> bool:
    """Whether there are only workers that are far from serving anybody, and room for one more."""
    starting = all(worker.state is WorkerState.STARTING and not worker.waking for worker in alive)
    return starting and len(alive) < settings.workers_max


def _thawed(frozen: list[WorkerView], missing: int, devices_in_use: frozenset[int]) -> list[str]:
    """The first of the frozen workers whose GPUs are free, as many as are missing at most."""
    chosen: list[str] = []
    for worker in frozen:
        if len(chosen) < missing and devices_in_use.isdisjoint(worker.devices):
            chosen.append(worker.id)
            devices_in_use = devices_in_use.union(worker.devices)
    return chosen


def _desired(
    snapshot: ScaleSnapshot, now_ms: int, settings: ScaleSettings, alive: list[WorkerView]
) -> tuple[int, ScaleReason]:
    present = len(alive)
    if settings.workers_max == 0:
        return 0, ScaleReason.PAUSED
    wanted, reason = present, ScaleReason.STEADY
    if settings.scaler is ScalerType.REQUEST_COUNT:
        by_count = -(-(snapshot.waiting + snapshot.in_progress) // max(1, int(settings.scaler_value)))
        if by_count > present:
            wanted, reason = by_count, ScaleReason.REQUEST_COUNT
    elif present == 0 and snapshot.waiting > 0:
        wanted, reason = 1, ScaleReason.FIRST_REQUEST
    elif snapshot.oldest_ms is not None and now_ms - snapshot.oldest_ms > settings.scaler_value * 1000:
        coming = sum(_coming(worker, snapshot, now_ms, settings) for worker in alive)
        unserved = max(0, snapshot.overdue - coming)
        if unserved:
            wanted, reason = present + -(-unserved // settings.concurrency), ScaleReason.QUEUE_DELAY
    if wanted < settings.workers_min:
        wanted, reason = settings.workers_min, ScaleReason.BELOW_MINIMUM
    return min(wanted, settings.workers_max), reason


def _coming(worker: WorkerView, snapshot: ScaleSnapshot, now_ms: int, settings: ScaleSettings) -> int:
    """Slots that a worker has free or soon will; none while its start takes far longer than others did."""
    if worker.state is WorkerState.READY:
        # One whose engine shows strain may have more in hand than it is to have.
        return max(0, worker.capacity - worker.occupied)
    estimate_ms = snapshot.start_estimate_ms
    if estimate_ms is None or worker.fetching:
        return settings.concurrency
    patience_ms = max(_LATE_FACTOR * estimate_ms, _LATE_MS_MIN)
    return settings.concurrency if now_ms - worker.since_ms < patience_ms else 0


def _surplus(
    snapshot: ScaleSnapshot, now_ms: int, settings: ScaleSettings, alive: list[WorkerView]
) -> tuple[list[WorkerView], ScaleReason]:
    # Youngest first, so that load gathers on old workers (`core.routing`).
    if len(alive) > settings.workers_max:
        by_worth = alive[::-1]
        by_worth.sort(key=lambda worker: (worker.state is WorkerState.READY, worker.occupied))
        excess = len(alive) - settings.workers_max
        return by_worth[:excess], ScaleReason.ABOVE_MAXIMUM
    if snapshot.waiting or snapshot.waiting_low:
        return [], ScaleReason.STEADY
    spare = len(alive) - settings.workers_min
    idle = [
        worker
        for worker in reversed(alive)
        if worker.state is WorkerState.READY
        and worker.idle_since_ms is not None
        and now_ms - worker.idle_since_ms >= settings.idle_timeout_ms
    ]
    return idle[: max(0, spare)], ScaleReason.IDLE_TIMEOUT


def _next_look(
    snapshot: ScaleSnapshot, now_ms: int, settings: ScaleSettings, alive: list[WorkerView]
) -> int | None:
    moments = [
        worker.idle_since_ms + settings.idle_timeout_ms
        for worker in alive
        if worker.state is WorkerState.READY and worker.idle_since_ms is not None
    ]
    if len(alive) <= settings.workers_min:
        moments = []
    if snapshot.retry_ms is not None:
        moments.append(snapshot.retry_ms)
    if settings.scaler is ScalerType.QUEUE_DELAY and snapshot.oldest_ms is not None and alive:
        overdue_ms = snapshot.oldest_ms + int(settings.scaler_value * 1000) + 1
        # Once something is overdue, more becomes overdue with time: look again every second.
        moments.append(max(overdue_ms, now_ms + 1000))
    return min((max(moment, now_ms + 1) for moment in moments), default=None)
