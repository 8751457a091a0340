"""The launchers of this machine: which there are, and which of them an endpoint's workers may ask.

`bootstrap` makes one `Launchers`. There is one launcher for each fingerprint that a living endpoint wants, up
to a bound; those wanted most recently stay, and an endpoint wants its launcher when it is made or changed and
whenever a worker of it is started. Only a gateway that leads has any.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from pilotlight.clusters.launcher import Launcher, LauncherPlan, LauncherState
from pilotlight.clusters.logs import WorkerLogs
from pilotlight.core.launchers import PAUSES_S, choose_launchers, explain_no_room
from pilotlight.domain.endpoint import Endpoint
from pilotlight.memory import proportional_bytes
from pilotlight.settings import LauncherSettings

_log = structlog.get_logger(__name__)

CLASSES_MAX = 16
"""Classes of models that a launcher imports in advance; further ones come with the first engine of theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherInfo:
    """What is told of a launcher.

    Attributes:
        fingerprint: Its name.
        version: The engine's; "" if unknown.
        state: Where it stands.
        problem: Why it does not run, or what it complained about last; "" for nothing.
        pid: Its process; None while there is none.
        memory_bytes: What it holds now, shared pages counted in equal parts (PSS); None without a process.
        ready_s: How long it took to import; None before.
        launches: Engines forked from it so far.
        engines: Those of them that live.
        endpoints: Ids of those whose workers use it.
        log: The name of its log.
    """

    fingerprint: str
    version: str
    state: LauncherState
    problem: str
    pid: int | None
    memory_bytes: int | None
    ready_s: float | None
    launches: int
    engines: int
    endpoints: tuple[str, ...]
    log: str


class Launchers:
    """Keeps the launchers that endpoints want. Used on one event loop only.

    Args:
        plan: How an endpoint's engines are launched; in words why they cannot be.
        logs: Get what launchers write.
        settings: Whether, and how many.
        available: Host memory that could be taken now, in bytes.
        reserve_bytes: Host memory that is never given to workers.
        pauses_s: Before each further try after failed lives in a row.
    """

    def __init__(
        self,
        plan: Callable[[Endpoint], LauncherPlan | str],
        *,
        logs: WorkerLogs,
        settings: LauncherSettings,
        available: Callable[[], int],
        reserve_bytes: int,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self._plan = plan
        self._logs = logs
        self._settings = settings
        self._available = available
        self._reserve_bytes = reserve_bytes
        self._pauses_s = pauses_s
        self._active = False
        self._numbers = itertools.count()
        # With the moment of each endpoint's last change.
        self._endpoints: dict[str, tuple[int, LauncherPlan]] = {}
        self._wanted: dict[str, int] = {}
        self._launchers: dict[str, Launcher] = {}
        self._ends: dict[str, asyncio.Task[None]] = {}
        self._look: asyncio.Task[None] | None = None
        self._soon: asyncio.Handle | None = None

    def begin(self, endpoints: Iterable[Endpoint]) -> None:
        """Have launchers from now on, at first those that these endpoints want; returns at once.

        Args:
            endpoints: All there are.
        """
        if not self._settings.enabled:
            return
        self._active = True
        known = sorted(endpoints, key=lambda endpoint: endpoint.updated_ms)
        self._look = asyncio.create_task(self._look_at(known), name="launchers")

    def changed(self, endpoint: Endpoint) -> None:
        """Follow an endpoint that was made or changed; what was given up is tried again for it."""
        if not self._active:
            return
        known = self._endpoints.get(endpoint.id)
        # A gateway that has just started says so of all endpoints, none of which was changed.
        plan = self._note(endpoint, wanted=known is None or known[0] != endpoint.updated_ms)
        if plan is not None:
            failed = self._launchers.get(plan.fingerprint)
            if failed is not None and not failed.usable:
                self._end(plan.fingerprint)
        self._follow_soon()

    def deleted(self, endpoint_id: str) -> None:
        """Forget an endpoint; its launcher ends unless another one wants it."""
        if self._endpoints.pop(endpoint_id, None) is not None:
            self._follow_soon()

    def socket(self, endpoint: Endpoint) -> Path | None:
        """Where a worker that is being started may have its engine forked; None when it must import itself.

        The launcher may still be importing, or even be about to listen: waiting for it is faster.
        """
        if not self._active:
            return None
        plan = self._note(endpoint)
        if plan is None:
            return None
        self._follow()
        launcher = self._launchers.get(plan.fingerprint)
        return plan.socket if launcher is not None and launcher.usable else None

    def launchable(self, endpoint_id: str) -> bool:
        """Whether a launcher is ready for an endpoint."""
        known = self._endpoints.get(endpoint_id)
        launcher = self._launchers.get(known[1].fingerprint) if known is not None else None
        return launcher is not None and launcher.state is LauncherState.READY

    async def infos(self) -> list[LauncherInfo]:
        """All there are, those wanted most recently first."""
        launchers = sorted(self._launchers.values(), key=lambda each: -self._wanted[each.plan.fingerprint])
        pids = [launcher.pid for launcher in launchers]
        held = await asyncio.to_thread(lambda: [proportional_bytes([pid]) if pid else None for pid in pids])
        pairs = zip(launchers, held, strict=True)
        return [self._info(launcher, bytes_held) for launcher, bytes_held in pairs]

    async def stop(self) -> None:
        """End all launchers and have none until `begin`; returns when they have ended. Idempotent."""
        self._active = False
        if self._look is not None:
            self._look.cancel()
            await asyncio.wait({self._look})
        for fingerprint in list(self._launchers):
            self._end(fingerprint)
        if self._ends:
            await asyncio.wait(set(self._ends.values()))
        self._endpoints.clear()
        self._wanted.clear()

    async def _look_at(self, endpoints: Sequence[Endpoint]) -> None:
        for endpoint in endpoints:
            if endpoint.id not in self._endpoints:
                self._note(endpoint)
            # With a thousand endpoints requests come in between.
            await asyncio.sleep(0)
        self._follow()

    def _note(self, endpoint: Endpoint, *, wanted: bool = True) -> LauncherPlan | None:
        """What the endpoint can use, as of now; None for nothing. Looks each time: engines are exchanged.

        Args:
            endpoint: Whose.
            wanted: Whether it wants that now, which keeps others from taking its place.
        """
        plan = self._planned(endpoint)
        if isinstance(plan, str):
            _log.debug("not_launchable", endpoint=endpoint.id, reason=plan)
            self._endpoints.pop(endpoint.id, None)
            return None
        self._endpoints[endpoint.id] = (endpoint.updated_ms, plan)
        if wanted or plan.fingerprint not in self._wanted:
            self._wanted[plan.fingerprint] = next(self._numbers)
        return plan

    def _planned(self, endpoint: Endpoint) -> LauncherPlan | str:
        if not endpoint.workers_max:
            return "it may have no worker"
        try:
            return self._plan(endpoint)
        except Exception as error:  # noqa: BLE001 - its workers, and the gateway, start without a launcher, too
            _log.exception("launcher_not_planned", endpoint=endpoint.id)
            return repr(error)

    def _follow_soon(self) -> None:
        """Once for all changes of this moment: at a start every endpoint is one."""
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self._follow)

    def _follow(self) -> None:
        """Start and end launchers so that those wanted most recently run."""
        self._soon = None
        if not self._active:
            return
        plans = {plan.fingerprint: plan for _, plan in self._endpoints.values()}
        self._wanted = {each: when for each, when in self._wanted.items() if each in plans}
        chosen = choose_launchers(self._wanted, self._settings.max)
        for fingerprint in self._launchers.keys() - chosen:
            self._end(fingerprint)
        for fingerprint in chosen - self._launchers.keys():
            self._start(plans[fingerprint])

    def _start(self, plan: LauncherPlan) -> None:
        launcher = Launcher(
            plan,
            logs=self._logs,
            explain_no_room=lambda: self._explain_no_room(plan.fingerprint),
            classes=lambda: self._classes(plan.fingerprint),
            pauses_s=self._pauses_s,
        )
        self._launchers[plan.fingerprint] = launcher
        launcher.start(self._ends.get(plan.fingerprint))

    def _end(self, fingerprint: str) -> None:
        launcher = self._launchers.pop(fingerprint)
        before = self._ends.get(fingerprint)
        task = asyncio.create_task(_stop(launcher, before), name=f"end-{launcher.log_id}")
        self._ends[fingerprint] = task
        task.add_done_callback(lambda done: self._ended(fingerprint, done))

    def _ended(self, fingerprint: str, task: asyncio.Task[None]) -> None:
        if self._ends.get(fingerprint) is task:
            del self._ends[fingerprint]

    def _sharing(self, fingerprint: str) -> dict[str, LauncherPlan]:
        """The endpoints that use a launcher, with their plans."""
        return {
            endpoint_id: plan
            for endpoint_id, (_, plan) in self._endpoints.items()
            if plan.fingerprint == fingerprint
        }

    def _explain_no_room(self, fingerprint: str) -> str:
        needs = [plan.worker_bytes for plan in self._sharing(fingerprint).values()]
        return explain_no_room(
            self._available(), reserve_bytes=self._reserve_bytes, worker_bytes=min(needs, default=0)
        )

    async def _classes(self, fingerprint: str) -> Sequence[str]:
        plans = list(self._sharing(fingerprint).values())[:CLASSES_MAX]
        own = await asyncio.to_thread(lambda: [name for plan in plans for name in _classes_of(plan)])
        return list(dict.fromkeys([*self._settings.preload, *own]))[:CLASSES_MAX]

    def _info(self, launcher: Launcher, memory_bytes: int | None) -> LauncherInfo:
        fingerprint = launcher.plan.fingerprint
        return LauncherInfo(
            fingerprint=fingerprint,
            version=launcher.version,
            state=launcher.state,
            problem=launcher.problem,
            pid=launcher.pid,
            memory_bytes=memory_bytes,
            ready_s=launcher.ready_s,
            launches=launcher.launches,
            engines=launcher.engines,
            endpoints=tuple(self._sharing(fingerprint)),
            log=launcher.log_id,
        )


def _classes_of(plan: LauncherPlan) -> Sequence[str]:
    try:
        return tuple(plan.classes())
    except Exception:  # noqa: BLE001 - one model that cannot be read does the other endpoints no harm
        _log.exception("launcher_classes_unknown", launcher=plan.fingerprint)
        return ()


async def _stop(launcher: Launcher, before: asyncio.Task[None] | None) -> None:
    await launcher.stop()
    if before is not None:
        await asyncio.wait({before})
