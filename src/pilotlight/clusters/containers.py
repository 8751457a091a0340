"""Workers as containers of Docker or Podman: made, followed, removed completely.

`bootstrap` makes one `ContainerCluster`; `clusters.places` sends it the workers that have an image.

Life of a worker here, in a thread of its own, because everything the engine is asked blocks:

1. `start` opens its log and returns; the thread fetches the image where it is missing (with progress in the
   log), makes the container, attaches to its output and starts it.
2. The thread copies the output into the pipe of the worker's log until the container ends by itself, by
   `terminate` or by `kill`. A container has a process tree of its own: when its main process ends, the
   kernel ends the rest.
3. The container is removed with its anonymous volumes; that is tried until it works. Then the log is
   finished, `on_exit` is called, and whoever waits in `kill` or `close` goes on.

The engine may be away at any moment, and containers live on meanwhile. Whatever must be done is tried until
it is back; only `close` gives up, after the time that an answer may take, and leaves the rest to the next
sweep.

Containers are found by labels: the installation's and the worker's id. What a killed gateway left goes on
running without anybody to report to; the next start's `sweep` removes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import structlog

from pilotlight.clusters import memory, processes
from pilotlight.clusters.container_ends import describe_end, failure_of, out_of_memory
from pilotlight.clusters.container_engine import (
    ContainerEngine,
    EngineFacts,
    Image,
    Login,
    MissingError,
    PullError,
    UnreachableError,
)
from pilotlight.clusters.container_plan import (
    ContainerPlan,
    GpuDriver,
    Place,
    exit_code_of,
    owner_of,
    plan_container,
)
from pilotlight.clusters.logs import WorkerLogs
from pilotlight.clusters.volumes import resolve_volume
from pilotlight.domain.endpoint import Container
from pilotlight.domain.worker import Failure, ProcessIdentity
from pilotlight.errors import ClusterError, PilotlightError
from pilotlight.memory import proportional_bytes
from pilotlight.ports.cluster import WorkerExit, WorkerSpec
from pilotlight.threads import call_in_thread, start_in_thread

_log = structlog.get_logger(__name__)

RETRY_S = 5.0
"""Between two tries of what must be done and cannot be given up."""

PROGRESS_S = 5.0
"""Between two reports of an image's progress."""

ENDING_S = 0.5
"""How soon a worker that is told to end while its image is fetched notices it."""

PATIENCE_S = 5.0
"""How long a start of the gateway waits for an engine of which it needs nothing yet."""

PODMAN_CDI = (5, 4)
"""The first Podman that gives GPUs to containers made by Docker's API; earlier ones ignore the request."""


@dataclass(slots=True, eq=False)
class _Child:
    """A worker of this life of the gateway. What its thread and the loop share is behind `lock`.

    Attributes:
        spec: What to start.
        on_exit: Told of its end.
        output: Where its output goes.
        lock: Held while it is decided whether it runs or ends.
        ending: It was told to end.
        abandoned: The cluster was closed and waits for it no longer.
        container: Id of its container, or the name while the engine has not told one; None before it is made.
        running: It was started.
        undelivered: A signal that the engine has not passed on yet; "" for none.
        stream: Its output.
        ended: Set on the loop when nothing of it is left.
        task: Tells about its end.
    """

    spec: WorkerSpec
    on_exit: Callable[[WorkerExit], None]
    output: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    ending: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    container: str | None = None
    running: bool = False
    undelivered: str = ""
    stream: Iterator[bytes] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def worker_id(self) -> str:
        return self.spec.worker_id


class ContainerCluster:
    """Workers as containers; implements `ports.Cluster`. Used on one event loop only.

    Args:
        engine: Docker or Podman.
        logs: Where output goes; shared with other clusters.
        installation: Its id, for the labels.
        network: `host`, or the name of a network of the engine.
        shm_bytes: Size of `/dev/shm` where an endpoint names none.
        gpu_driver: How GPUs are asked for; None decides by the engine.
        login: Who fetches the image of an endpoint: (endpoint id, its container) → login; raises
            PilotlightError where the stored one cannot be read.
        on_progress: Awaited on the loop while the image of a worker is being fetched, at first and then every
            few seconds: (worker id, bytes fetched, bytes in all as far as they are known).
        on_fetched: Awaited on the loop when the image of a worker has been fetched: (worker id).
        volume_roots: Folders below which all may be given to containers.
        close_grace_s: From SIGTERM to SIGKILL in `close`.
    """

    def __init__(
        self,
        engine: ContainerEngine,
        logs: WorkerLogs,
        *,
        installation: str,
        network: str,
        shm_bytes: int,
        gpu_driver: GpuDriver | None = None,
        login: Callable[[str, Container], Login | None] = lambda _id, _container: None,
        on_progress: Callable[[str, int, int], Coroutine[object, object, None]] | None = None,
        on_fetched: Callable[[str], Coroutine[object, object, None]] | None = None,
        volume_roots: Sequence[Path] = (),
        close_grace_s: float = 5.0,
    ) -> None:
        self.engine = engine
        self._logs = logs
        self._installation = installation
        self._network = network
        self._shm_bytes = shm_bytes
        self._gpu_driver = gpu_driver
        self._login = login
        self._on_progress = on_progress
        self._on_fetched = on_fetched
        self._volume_roots = tuple(volume_roots)
        self._close_grace_s = close_grace_s
        self._children: dict[str, _Child] = {}
        self._closed = False
        self._unswept = False

    async def start(self, spec: WorkerSpec, on_exit: Callable[[WorkerExit], None]) -> ProcessIdentity | None:
        """Begin to make a container; see the port. What goes wrong later is told by `on_exit`."""
        if self._closed:
            raise ClusterError(f"worker {spec.worker_id} was not started: the cluster is closed")
        if spec.worker_id in self._children:
            raise ClusterError(f"worker {spec.worker_id} was not started: a worker of this id is running")
        child = _Child(spec, on_exit, self._logs.open(spec.worker_id))
        self._children[spec.worker_id] = child
        loop = asyncio.get_running_loop()
        thread = threading.Thread(
            target=self._live, args=(child, loop), name=f"container-{spec.worker_id}", daemon=True
        )
        thread.start()
        return None

    async def terminate(self, worker_id: str) -> None:
        """Send SIGTERM to the container's main process; see the port."""
        child = self._children.get(worker_id)
        if child is not None and not child.ending.is_set():
            await call_in_thread(partial(self._end, child, "SIGTERM"), name=f"terminate-{worker_id}")

    async def kill(self, worker_id: str) -> None:
        """End the container; see the port. That is repeated until it has ended."""
        child = self._children.get(worker_id)
        if child is None:
            return
        self._note(child, "killed")
        end = partial(self._end, child, "SIGKILL")
        while not child.ended.is_set():
            await call_in_thread(end, name=f"kill-{worker_id}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.ended.wait(), RETRY_S)
            if child.running and not child.undelivered:
                # An engine that ended while it started a container takes it for one that does not run, and
                # passes no signal on; removing it ends it all the same.
                end = partial(self._drop, child)

    def has(self, worker_id: str) -> bool:
        """Whether this is one of its workers."""
        return worker_id in self._children

    async def freeze(self, worker_id: str) -> int:
        """Pause the container; see the port."""
        child, container = self._running(worker_id)
        try:
            await call_in_thread(partial(self.engine.pause, container), name=f"freeze-{worker_id}")
        except ClusterError:
            # One that gave no answer may have paused it all the same.
            with contextlib.suppress(ClusterError):
                await call_in_thread(partial(self.engine.unpause, container), name=f"thaw-{worker_id}")
            raise
        self._note(child, "frozen: its container is paused")
        return await call_in_thread(lambda: proportional_bytes(_pids(worker_id)), name=f"memory-{worker_id}")

    async def gpu_memory(self, worker_id: str, devices: Sequence[int]) -> int:
        """Memory on GPUs; see the port."""
        return await call_in_thread(
            lambda: memory.gpu_bytes(_pids(worker_id), devices), name=f"memory-{worker_id}"
        )

    async def thaw(self, worker_id: str) -> None:
        """Let the container go on; see the port."""
        child, container = self._running(worker_id)
        await call_in_thread(partial(self.engine.unpause, container), name=f"thaw-{worker_id}")
        self._note(child, "thawed")

    def _running(self, worker_id: str) -> tuple[_Child, str]:
        child = self._children.get(worker_id)
        if child is None or not child.running or child.container is None:
            raise ClusterError(f"worker {worker_id} has no container that runs")
        return child, child.container

    async def sweep(self, workers: Mapping[str, ProcessIdentity | None]) -> Sequence[str]:
        """Remove what an earlier life left; see the port. Also what nobody remembers is removed.

        Where every worker on record has a process of its own, an engine that is slow is not waited for. One
        that does not answer is asked again before the next container is made.
        """
        needed = any(identity is None for identity in workers.values())
        self._unswept = True
        sweeping = asyncio.wrap_future(start_in_thread(self._sweep, name="sweep-containers"))
        try:
            swept = await asyncio.wait_for(sweeping, None if needed else PATIENCE_S)
        except (TimeoutError, ClusterError) as error:
            # Most machines that run no containers have no engine either.
            log = _log.warning if needed else _log.debug
            log("containers.not_swept", reason=str(error) or f"no answer within {PATIENCE_S} s")
            return []
        for worker_id in swept:
            text = "ended the container left over by an earlier gateway"
            await asyncio.wrap_future(self._logs.note(worker_id, text))
        return swept

    async def close(self) -> None:
        """End all containers, politely at first; see the port. Idempotent. The logs stay open.

        Containers that cannot be ended, because the engine does not answer, are left to the next sweep.
        """
        self._closed = True
        left = list(self._children.values())
        await _end_within(left, self.terminate, self._close_grace_s)
        left = [child for child in left if not child.ended.is_set()]
        await _end_within(left, self.kill, self.engine.timeout_s)
        for child in left:
            if not child.ended.is_set():
                _log.error("containers.left_behind", worker_id=child.worker_id, container=child.container)
                child.abandoned.set()
                del self._children[child.worker_id]
                # Whoever waits for its end has waited long enough.
                child.ended.set()
        await call_in_thread(self.engine.close, name="close-engine")

    def _end(self, child: _Child, signal_name: str) -> None:
        with child.lock:
            child.ending.set()
            child.undelivered = signal_name if child.running else ""
        self._signal(child)

    def _signal(self, child: _Child) -> None:
        """Send the signal that is owed to a container, if any."""
        signal_name = child.undelivered
        if not signal_name:
            return
        assert child.container is not None, child.worker_id
        try:
            self.engine.signal(child.container, signal_name)
        except ClusterError as error:
            # Its thread meets the same trouble and sends the signal when the engine is back.
            _log.error("containers.signal_failed", worker_id=child.worker_id, error=str(error))
        else:
            with child.lock:
                if child.undelivered == signal_name:
                    child.undelivered = ""

    def _drop(self, child: _Child) -> None:
        if child.container is not None:
            try:
                self.engine.remove(child.container)
            except ClusterError as error:
                _log.error("containers.not_removed", worker_id=child.worker_id, error=str(error))

    def _sweep(self) -> list[str]:
        swept, whole = [], True
        for container_id, (worker_id, runs) in self.engine.containers(self._installation).items():
            if worker_id in self._children:
                continue
            try:
                self.engine.remove(container_id)
            except UnreachableError:
                raise
            except ClusterError as error:
                # One that cannot be removed must not keep the others, nor the gateway, from anything.
                _log.error("containers.leftover_not_removed", worker_id=worker_id, error=str(error))
                whole = False
            else:
                if runs and worker_id:
                    swept.append(worker_id)
        self._unswept = not whole
        return sorted(swept)

    def _note(self, child: _Child, text: str) -> None:
        if not child.abandoned.is_set():
            self._logs.note(child.worker_id, text)

    # In the thread of a worker.

    def _live(self, child: _Child, loop: asyncio.AbstractEventLoop) -> None:
        failure: Failure | None = None
        code: int | None = None
        try:
            try:
                self._make(child, loop)
                code, failure = self._follow(child)
            finally:
                self._remove(child)
        except _EndedError:
            pass
        except PilotlightError as error:
            failure = failure_of(error, child.spec)
        except Exception as error:  # noqa: BLE001 - the end of a thread: the worker must not be lost
            _log.exception("containers.defect", worker_id=child.worker_id)
            failure = Failure(kind="container_failed", cause=repr(error))
        finally:
            os.close(child.output)
            # The loop may be closed by now, and then nobody waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._gone, child, code, failure)

    def _make(self, child: _Child, loop: asyncio.AbstractEventLoop) -> None:
        """Have the image, make the container and start it, unless it is told to end meanwhile."""
        if self._unswept:
            self._sweep()
        container = child.spec.container
        assert container is not None, child.worker_id
        volumes = tuple(resolve_volume(volume, self._volume_roots) for volume in container.volumes)
        spec = replace(child.spec, container=replace(container, volumes=volumes))
        facts = self.engine.facts()
        driver: GpuDriver = self._gpu_driver or ("cdi" if facts.podman else "nvidia")
        if spec.devices:
            _check_gpus(facts, driver)
        plan = plan_container(
            spec,
            Place(
                installation=self._installation,
                network=self._network,
                shm_bytes=self._shm_bytes,
                gpu_driver=driver,
                # Root in a container of a user's own engine is that user outside, thus us.
                user="0:0" if facts.rootless else _own_user(),
                remapped=facts.remapped,
            ),
        )
        container_id = self._create(child, container.image, plan, loop)
        child.stream = self.engine.attach(container_id)
        with child.lock:
            if child.ending.is_set():
                raise _EndedError
            self.engine.start(container_id)
            child.running = True
        text = (
            f"started for endpoint {spec.endpoint_id} as container {container_id[:12]} of {container.image}"
        )
        self._note(child, f"{text} ({facts.name})")

    def _create(
        self, child: _Child, reference: str, plan: ContainerPlan, loop: asyncio.AbstractEventLoop
    ) -> str:
        """Have the image and make the container of it; its id."""
        image = self.engine.image(reference) or self._pull(child, reference, loop)
        if plan.run_folder is not None:
            _make_run_folder(Path(plan.run_folder), plan.config.get("User") or image.user)
        if child.ending.is_set():
            raise _EndedError
        # Before the engine is asked: it may make the container and its answer come too late.
        child.container = plan.name
        try:
            container_id = self.engine.create(plan)
        except MissingError:
            if self.engine.image(reference) is not None:
                raise
            # Somebody has removed the image meanwhile.
            self._pull(child, reference, loop)
            container_id = self.engine.create(plan)
        child.container = container_id
        return container_id

    def _pull(self, child: _Child, reference: str, loop: asyncio.AbstractEventLoop) -> Image:
        """Fetch the image, in another thread: a silent registry must not keep a worker from its end."""
        assert child.spec.container is not None, child.worker_id
        login = self._login(child.spec.endpoint_id, child.spec.container)
        self._note(child, f"fetching image {reference}")
        reported = time.monotonic()

        def report(done: int, total: int) -> None:
            if self._on_progress is not None:
                asyncio.run_coroutine_threadsafe(self._on_progress(child.worker_id, done, total), loop)

        def on_progress(done: int, total: int) -> None:
            nonlocal reported
            if time.monotonic() - reported >= PROGRESS_S and not child.ending.is_set():
                reported = time.monotonic()
                self._note(child, f"fetching image {reference}: {done >> 20} of {total >> 20} MiB")
                report(done, total)

        report(0, 0)
        pull = partial(self.engine.pull, reference, login, on_progress, cancelled=child.ending.is_set)
        pulling = start_in_thread(pull, name=f"pull-{child.worker_id}")
        while not futures.wait([pulling], timeout=ENDING_S).done:
            if child.ending.is_set():
                raise _EndedError
        try:
            pulling.result()
        except ClusterError:
            if child.ending.is_set():
                raise _EndedError from None
            raise
        self._note(child, f"fetched image {reference}")
        if self._on_fetched is not None:
            asyncio.run_coroutine_threadsafe(self._on_fetched(child.worker_id), loop)
        image = self.engine.image(reference)
        if image is None:
            raise PullError(f"image {reference} is gone again")
        return image

    def _follow(self, child: _Child) -> tuple[int | None, Failure | None]:
        """Copy its output until it has ended; its exit code, and why, where more is known than that."""
        container_id, pieces = child.container, child.stream
        assert container_id is not None, child.worker_id
        assert pieces is not None, child.worker_id
        told = False
        while not child.abandoned.is_set():
            try:
                for piece in pieces:
                    told = False
                    _write(child.output, piece)
                status, exceeded = self.engine.wait(container_id)
            except MissingError:
                gone = Failure(kind="container_failed", cause="somebody removed the container")
                return None, None if child.ending.is_set() else gone
            except ClusterError as error:
                # Once for each time that it is lost; a frozen one cannot be listened to again until its thaw.
                log = _log.debug if told else _log.warning
                log("containers.connection_lost", worker_id=child.worker_id, error=str(error))
                told = True
                child.abandoned.wait(RETRY_S)
                pieces = self._pick_up(child, container_id)
            else:
                code = None if status is None else exit_code_of(status)
                # Not every engine says so. Nothing inside can kill a container's main process.
                killed = code == -signal.SIGKILL and not child.ending.is_set()
                exceeded = exceeded or (killed and child.spec.memory_bytes > 0)
                return code, out_of_memory(child.spec) if exceeded else None
        return None, None

    def _pick_up(self, child: _Child, container_id: str) -> Iterator[bytes]:
        """What a container writes from now on, after the engine was away; it gets the signal it is owed."""
        try:
            pieces = self.engine.attach_again(container_id)
        finally:
            # Only now, since it may end by it.
            self._signal(child)
        yield from pieces

    def _remove(self, child: _Child) -> None:
        while child.container is not None and not child.abandoned.is_set():
            try:
                self.engine.remove(child.container)
            except ClusterError as error:
                # Reported each time: its memory and GPUs may not be free, and only the operator can help.
                _log.error("containers.not_removed", worker_id=child.worker_id, error=str(error))
                self._note(child, f"its container cannot be removed: {error}")
                child.abandoned.wait(RETRY_S)
            else:
                return

    # On the loop.

    def _gone(self, child: _Child, code: int | None, failure: Failure | None) -> None:
        child.task = asyncio.create_task(
            self._finish(child, code, failure), name=f"clean-up-{child.worker_id}"
        )

    async def _finish(self, child: _Child, code: int | None, failure: Failure | None) -> None:
        if child.abandoned.is_set():
            return
        text = failure.cause if failure is not None else describe_end(code, ran=child.running)
        try:
            await self._logs.finish(child.worker_id, text)
        except OSError:
            _log.exception("cluster.log_unfinished", worker_id=child.worker_id)
        del self._children[child.worker_id]
        try:
            child.on_exit(WorkerExit(worker_id=child.worker_id, code=code, failure=failure))
        except Exception:  # noqa: BLE001 - a fault in the caller's code must not leave `ended` unset
            _log.exception("cluster.on_exit_failed", worker_id=child.worker_id)
        finally:
            child.ended.set()


class _EndedError(Exception):
    """The worker was told to end before its container ran."""


async def _end_within(
    children: Sequence[_Child], end: Callable[[str], Awaitable[None]], bound_s: float
) -> None:
    """Return when all have ended, at the latest after a time in seconds."""

    async def end_one(child: _Child) -> None:
        await end(child.worker_id)
        await child.ended.wait()

    ends = [asyncio.ensure_future(end_one(child)) for child in children]
    if not ends:
        return
    try:
        await asyncio.wait(ends, timeout=bound_s)
    finally:
        for each in ends:
            each.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


def _check_gpus(facts: EngineFacts, driver: GpuDriver) -> None:
    """Return when the engine does not ignore such a request for GPUs.

    Raises:
        ClusterError: It does; a worker would run, without a GPU.
    """
    if not facts.podman:
        return
    if driver != "cdi":
        raise ClusterError(f"{facts.name} gives GPUs by CDI only, but containers.gpu_driver is {driver!r}")
    if facts.version < PODMAN_CDI:
        first = ".".join(map(str, PODMAN_CDI))
        raise ClusterError(f"{facts.name} gives no GPUs to containers made by its API; use {first} or newer")


def _pids(worker_id: str) -> set[int]:
    """The processes of a container: they are this machine's as well, and carry the worker's cookie."""
    found = processes.find_processes({worker_id: None}).get(worker_id, ())
    return {identity.pid for identity in found}


def _own_user() -> str:
    """Whom workers with sockets run as, so that we can use those; "" where we are root and can anyway."""
    return f"{os.geteuid()}:{os.getegid()}" if os.geteuid() else ""


def _make_run_folder(folder: Path, user: str) -> None:
    """Make the folder of a worker's sockets, for the user that it runs as."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = owner_of(user)
        if owner is None:
            # A user that only the image knows by number; nobody else gets as far as here.
            folder.chmod(0o777)
        elif not os.geteuid():
            os.chown(folder, *owner)
    except OSError as error:
        raise ClusterError(f"folder {folder} for the worker's sockets: {error.strerror}") from error


def _write(descriptor: int, piece: bytes) -> None:
    """Pass output on; when nobody takes it any more, the worker must not notice."""
    view = memoryview(piece)
    with contextlib.suppress(BrokenPipeError):
        while view:
            view = view[os.write(descriptor, view) :]
