"""Freezing: the engine is stopped in place and goes on later, while the worker program stays awake.

The platform asks for both through the listener. A frozen engine uses no CPU and keeps its memory; on a GPU it
sleeps first, which gives the GPU's memory back. Pings and polls go on, and so does whoever watches for the
engine's end; its health is not asked meanwhile.

```
           freeze: quiet? sleep, stop, quiet?
     hot ──────────────────────────────────────► frozen ───► killed as it is when the worker is told to end
      ▲ ▲                 │ refused: as a thaw      │
      │ └─────────────────┘                         │ thaw, or work that comes all the same
      └─────────────────────────────────────────────┘ go on, wake up, one token ───► none: the worker ends
```

One of the two happens at a time, and once begun it is finished, also when whoever asked has gone away. Work
that comes while the engine is not hot waits in `awake`, which thaws it: a job that was handed out by mistake
is answered, and a freeze that work has overtaken gives itself up.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

import msgspec

from pilotlight.errors import ClusterError
from pilotlight.memory import proportional_bytes
from pilotlight.worker.engine import Engine
from pilotlight.worker.errors import EngineGoneError
from pilotlight.worker.first_token import ask_for_a_token
from pilotlight.worker.log import LogSink

THAW_SECONDS: Final = 1.0
"""How long a thawed engine may take for one token where nobody says; then a new one is the faster way."""

STOP_SECONDS: Final = 2.0
"""How long the engine's processes may take to stand still; only those that wait in the kernel need longer."""

SLEEP_SECONDS: Final = 60.0
"""How long an engine may take to fall asleep or to wake up, with weights that move or are read again."""

_LEVEL_WITHOUT_WEIGHTS: Final = 2
"""At this level vLLM forgets the weights; at level 1 it keeps them in main memory."""

_T = TypeVar("_T")


class Refusal(StrEnum):
    """Why a worker is not frozen."""

    BUSY = "busy"
    FROZEN = "frozen"
    NOT_SERVING = "not_serving"
    UNABLE = "unable"


class FreezeRefusedError(Exception):
    """The engine is as hot as before."""

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """What came of a freeze.

    Attributes:
        memory_bytes: Main memory that the engine and the worker program keep, shared pages counted in parts.
        slept: The engine sleeps, so the GPU's memory is free.
        took_ms: How long it took.
    """

    memory_bytes: int
    slept: bool
    took_ms: int


class Freezer:
    """Freezes and thaws one engine; refuses until `open`.

    Args:
        engine: Healthy.
        log: Every freeze and thaw is one line.
        sleep_level: vLLM's sleep level; None = it has no sleep mode.
        in_hand: What is being answered, in words; "" for nothing.
        on_failed: Called with the reason when the engine does not work any more after a thaw.
        on_woken: Called when work thawed the engine that nobody had announced, with what it was.

    Attributes:
        freezes: How many were begun; tells whoever asks the engine something that it was stopped meanwhile.
    """

    def __init__(
        self,
        engine: Engine,
        log: LogSink,
        *,
        sleep_level: int | None,
        in_hand: Callable[[], str],
        on_failed: Callable[[str], None],
        on_woken: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._log = log
        self._level = sleep_level
        self._in_hand = in_hand
        self._on_failed = on_failed
        self._on_woken = on_woken
        self._clock = asyncio.get_running_loop().time
        self._lock = asyncio.Lock()
        self._hot = asyncio.Event()
        self._hot.set()
        self._open = False
        self._frozen = False
        self._asleep = False
        self._failed = ""
        self._under_way: set[asyncio.Task[Any]] = set()
        self.freezes = 0

    @property
    def frozen(self) -> bool:
        """Whether the engine is stopped in place."""
        return self._frozen

    def open(self) -> None:
        """From now on the worker serves, and may be frozen."""
        self._open = True

    def close(self) -> None:
        """From now on freezes are refused; work that still comes thaws the engine."""
        self._open = False

    async def leave(self) -> bool:
        """Gives up what is under way; whether the engine runs, and so can end by itself."""
        self._open = False
        under_way = tuple(self._under_way)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        return self._hot.is_set()

    async def until_hot(self) -> None:
        """Returns when the engine runs."""
        while not self._hot.is_set():
            await self._hot.wait()

    async def freeze(self) -> Frozen:
        """Stops the engine in place.

        Raises:
            FreezeRefusedError: It is as hot as before.
            EngineGoneError: It did not survive the attempt; the worker is about to end.
        """
        return await self._to_its_end(self._freeze())

    async def thaw(self, seconds: float) -> int:
        """Milliseconds until the engine had answered; 0 where it was hot.

        Args:
            seconds: How long it may take to answer, once it is awake.

        Raises:
            EngineGoneError: It did not answer; the worker is about to end.
        """
        return await self._to_its_end(self._thaw(seconds))

    async def awake(self, work: str) -> None:
        """Returns when the engine runs; lets a frozen one go on.

        Args:
            work: What needs it, for people.

        Raises:
            EngineGoneError: It does not answer any more.
        """
        if not self._hot.is_set():
            await self._to_its_end(self._thaw(THAW_SECONDS, work))

    async def _to_its_end(self, change: Coroutine[Any, Any, _T]) -> _T:
        """The result of something that goes on when whoever waits for it is cancelled."""
        task = asyncio.create_task(change)
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if task.cancelled() and current is not None and not current.cancelling():
                raise EngineGoneError("the worker ends") from None
            raise

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            # Seen here as well, for those that nobody waits for any more.
            task.exception()

    async def _freeze(self) -> Frozen:
        async with self._lock:
            started = self._clock()
            if self._frozen:
                raise FreezeRefusedError(Refusal.FROZEN, "the worker is frozen already")
            self._check_quiet()
            self.freezes += 1
            self._hot.clear()
            try:
                memory_bytes = await self._stop()
            except (EngineGoneError, ClusterError) as error:
                await self._give_up(str(error))
                raise FreezeRefusedError(Refusal.UNABLE, f"the worker cannot be frozen: {error}") from error
            except Exception as error:
                await self._give_up(str(error))
                raise
            self._frozen = True
            frozen = Frozen(memory_bytes=memory_bytes, slept=self._asleep, took_ms=self._since(started))
            self._log.event("worker.frozen", **asdict(frozen))
            return frozen

    def _check_quiet(self) -> None:
        if not self._open or self._failed:
            raise FreezeRefusedError(Refusal.NOT_SERVING, "the worker does not serve yet, or no longer")
        if in_hand := self._in_hand():
            raise FreezeRefusedError(Refusal.BUSY, f"the worker has {in_hand} in hand")

    async def _stop(self) -> int:
        """Main memory that is kept, once nothing of the engine runs any more."""
        if self._level is not None:
            await self._fall_asleep(self._level)
            self._check_quiet()
        pids = await self._engine.freeze(STOP_SECONDS)
        memory_bytes = await asyncio.to_thread(proportional_bytes, (*pids, os.getpid()))
        # What has come meanwhile waits in `awake`.
        self._check_quiet()
        return memory_bytes

    async def _fall_asleep(self, level: int) -> None:
        """Nothing is in hand; a request that somebody sent past us is waited for rather than cut off."""
        # Also where it fails: half asleep is no state to go on in.
        self._asleep = True
        status = await self._post(f"/sleep?level={level}&mode=wait", SLEEP_SECONDS)
        if status != 200:
            # An engine without these routes did nothing.
            self._asleep = status != 404
            raise EngineGoneError(f"the engine was told to sleep and answered with status {status}")

    async def _give_up(self, reason: str) -> None:
        """Makes the engine of a freeze that came to nothing hot again."""
        self._log.event("worker.not_frozen", reason=reason)
        await self._go_on(THAW_SECONDS)

    async def _thaw(self, seconds: float, work: str = "") -> int:
        async with self._lock:
            if self._hot.is_set():
                return 0
            started = self._clock()
            if self._failed:
                raise EngineGoneError(self._failed)
            await self._go_on(seconds)
            took_ms = self._since(started)
            self._log.event("worker.thawed", took_ms=took_ms, **({"work": work} if work else {}))
            if work:
                self._on_woken(work)
            return took_ms

    async def _go_on(self, seconds: float) -> None:
        """Lets the engine run and makes sure that it works.

        Raises:
            EngineGoneError: It does not, which `on_failed` was told.
        """
        try:
            self._engine.thaw()
            if self._asleep:
                await self._wake_up(seconds)
            await self._check_token(seconds)
        except EngineGoneError as error:
            self._failed = f"the engine does not work any more after it was frozen: {error}"
            self._log.event("worker.thaw_failed", reason=str(error))
            self._on_failed(self._failed)
            raise EngineGoneError(self._failed) from error
        self._asleep = self._frozen = False
        self._hot.set()

    async def _check_token(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                status = await ask_for_a_token(self._engine)
        except TimeoutError as error:
            raise EngineGoneError(f"it gave no token within {seconds:g} s") from error
        if status >= 500:
            raise EngineGoneError(f"it answered a request for one token with status {status}")

    async def _wake_up(self, seconds: float) -> None:
        """Ends the engine's sleep; weights that were given up are read again, caches of them are emptied."""
        if not await self._engine.healthy(seconds):
            raise EngineGoneError(f"it did not say within {seconds:g} s that it is healthy")
        steps: tuple[tuple[str, bytes | None], ...] = (("/wake_up", None),)
        if self._level == _LEVEL_WITHOUT_WEIGHTS:
            # As vLLM's own snapshots do it: there is no room for the cache before the weights are back.
            steps = (
                ("/wake_up?tags=weights", None),
                ("/collective_rpc", msgspec.json.encode({"method": "reload_weights"})),
                ("/wake_up?tags=kv_cache", None),
                ("/reset_prefix_cache", None),
            )
        for target, body in steps:
            status = await self._post(target, SLEEP_SECONDS, body)
            if status != 200:
                raise EngineGoneError(f"it answered {target} with status {status}")

    async def _post(self, target: str, seconds: float, body: bytes | None = None) -> int:
        """The status of the engine's answer; EngineGoneError without one."""
        try:
            async with asyncio.timeout(seconds):
                status, _ = await self._engine.ask("POST", target, body=body)
        except TimeoutError as error:
            raise EngineGoneError(f"it did not answer {target} within {seconds:g} s") from error
        return status

    def _since(self, moment: float) -> int:
        return round((self._clock() - moment) * 1000)
