"""Workers as processes of this machine: started, watched, ended completely.

`bootstrap` makes one `LocalCluster`; the supervisor's and autoscaler's loops call it through the port.

Life of a worker here:

1. `start` opens its log and spawns it in a session of its own, with an environment that holds nothing of
   ours but an allow-list. `subprocess` does that by vfork, so it takes about a millisecond however large
   the gateway is. The loop watches the child's pidfd; no SIGCHLD handler, no polling, the same on asyncio
   and uvloop.
2. The main process ends, by itself or by `terminate` or `kill`. It stays a zombie for now: as long as it
   is not reaped, its number, which is also that of its session, cannot be given to a stranger.
3. Everything else of the worker is found and killed (`processes.kill_all`).
4. The main process is reaped, the log is finished, `on_exit` is called, and whoever waits in `kill` or
   `close` goes on.

Output of workers goes through a pipe to the gateway; `logs` says why, and what happens when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from pilotlight.clusters import memory, processes
from pilotlight.clusters.logs import WorkerLogs
from pilotlight.clusters.work_folders import WorkFolders
from pilotlight.core.storage import VOLUME, chosen_cache
from pilotlight.descriptors import set_descriptor_limit
from pilotlight.domain.worker import WORKER_COOKIE, ProcessIdentity
from pilotlight.errors import ClusterError
from pilotlight.memory import proportional_bytes
from pilotlight.ports.cluster import WorkerExit, WorkerSpec

_log = structlog.get_logger(__name__)

INHERITED_VARIABLES = frozenset(
    {
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "XDG_CACHE_HOME",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "CUDA_HOME",
        "CUDA_PATH",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "all_proxy",
    }
)
"""What a worker inherits of the gateway's environment: what programs need to run at all, to find shared
libraries, the download cache and the way out. Never keys or tokens, and nothing of PILOTLIGHT_*; whatever
else a worker shall have is in its `WorkerSpec.env`."""

_INHERITED_PREFIX = "LC_"

_CLUSTER_VARIABLES = {
    # A pipe is block-buffered by default, which would show log lines minutes late.
    "PYTHONUNBUFFERED": "1",
    # setproctitle writes over the environment that /proc shows, and with it over the cookie.
    "SPT_NOENV": "1",
}

_RETRY_S = 5.0


@dataclass(slots=True, eq=False)
class _Child:
    """A worker of this life of the gateway."""

    worker_id: str
    popen: subprocess.Popen[bytes]
    identity: ProcessIdentity
    pidfd: int | None
    on_exit: Callable[[WorkerExit], None]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    stopped: list[ProcessIdentity] = field(default_factory=list)
    asked: bool = False


class LocalCluster:
    """Workers as local processes; implements `ports.Cluster`. Used on one event loop only.

    Args:
        log_folder: Where the workers' logs are kept.
        log_bytes: Size at which a log is rotated.
        base_env: The gateway's environment; of it, workers get `INHERITED_VARIABLES` and `LC_*`.
        host_has_gpus: Whether a worker without devices must be kept from the GPUs that exist.
        close_grace_s: From SIGTERM to SIGKILL in `close`.
        work_folder: Where workers with private folders have them; None means beside the logs.
        descriptors: Soft limit on open files that workers get; None means the gateway's own.

    Attributes:
        logs: The workers' logs, also of those that have ended.
    """

    def __init__(
        self,
        log_folder: Path,
        *,
        log_bytes: int,
        base_env: Mapping[str, str],
        host_has_gpus: bool = False,
        close_grace_s: float = 5.0,
        work_folder: Path | None = None,
        descriptors: int | None = None,
    ) -> None:
        self._folders = WorkFolders(work_folder or log_folder.with_name("work"))
        self.logs = WorkerLogs(log_folder, log_bytes=log_bytes)
        self._base_env = _CLUSTER_VARIABLES | {
            name: value
            for name, value in base_env.items()
            if name in INHERITED_VARIABLES or name.startswith(_INHERITED_PREFIX)
        }
        self._host_has_gpus = host_has_gpus
        self._close_grace_s = close_grace_s
        self._descriptors = descriptors
        self._children: dict[str, _Child] = {}
        self._closed = False
        # Its own threads, because looking for processes must not wait behind downloads and file reads.
        self._executor = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pilotlight-cluster")

    async def start(self, spec: WorkerSpec, on_exit: Callable[[WorkerExit], None]) -> ProcessIdentity:
        """Spawn a worker; see the port."""
        if self._closed:
            raise ClusterError(f"worker {spec.worker_id} was not started: the cluster is closed")
        if spec.worker_id in self._children:
            raise ClusterError(f"worker {spec.worker_id} was not started: a worker of this id is running")
        if not spec.command:
            raise ClusterError(f"worker {spec.worker_id} was not started: it has no command")
        output = self.logs.open(spec.worker_id)
        try:
            folder = self._folders.make(spec.worker_id) if spec.private_folders else "/"
            # No argument that would make it use fork instead of vfork (preexec_fn, user, group).
            popen = subprocess.Popen(  # noqa: ASYNC220 - a millisecond, and a thread would cost more
                list(spec.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=self.environment(spec),
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._folders.remove(spec.worker_id)
            await self.logs.finish(spec.worker_id, f"not started: {reason}")
            raise ClusterError(
                f"worker {spec.worker_id} was not started: {spec.command[0]!r}: {reason}"
            ) from error
        finally:
            os.close(output)
        if self._descriptors is not None:
            set_descriptor_limit(popen.pid, self._descriptors)
        # From here to the end of `_adopt` nothing awaits: a cancelled caller leaves no stray process.
        return self._adopt(spec, popen, on_exit)

    def _adopt(
        self, spec: WorkerSpec, popen: subprocess.Popen[bytes], on_exit: Callable[[WorkerExit], None]
    ) -> ProcessIdentity:
        identity = processes.identify(popen.pid)
        # A child exists at least as a zombie until it is reaped, and only we reap it.
        assert identity is not None, popen.pid
        child = _Child(spec.worker_id, popen, identity, processes.open_pidfd(popen.pid), on_exit)
        self._children[spec.worker_id] = child
        self.logs.note(spec.worker_id, f"started for endpoint {spec.endpoint_id} as process {popen.pid}")
        loop = asyncio.get_running_loop()
        if child.pidfd is not None:
            loop.add_reader(child.pidfd, self._on_main_ended, child)
        else:
            # A sandbox without pidfds: one thread for each worker waits for its end.
            arguments = (popen.pid, loop, lambda: self._on_main_ended(child))
            threading.Thread(target=_watch, args=arguments, name="pilotlight-wait", daemon=True).start()
        return identity

    async def terminate(self, worker_id: str) -> None:
        """Send SIGTERM to the worker's main process; see the port.

        Not to its group: the SDK's heartbeat process would die first (worker-protocol.md §6.3).
        """
        child = self._children.get(worker_id)
        if child is not None:
            self._ask_to_end(child)

    def _ask_to_end(self, child: _Child) -> None:
        # Once: Python on its way out has its handlers no more and would be killed by a second signal, and
        # our own worker program takes it for haste, and gives up what it has in hand.
        if not child.asked:
            child.asked = True
            processes.send_signal(child.identity, signal.SIGTERM)

    async def kill(self, worker_id: str) -> None:
        """End every process of the worker; see the port.

        Raises:
            ClusterError: A process survived SIGKILL; the cluster goes on trying.
        """
        child = self._children.get(worker_id)
        if child is None:
            return
        self.logs.note(worker_id, "killed")
        # Not the main process first: its death would hide whose child a process was.
        await self._kill_all({worker_id: child.identity})
        await child.ended.wait()

    async def freeze(self, worker_id: str) -> int:
        """Stop every process of the worker in place; see the port."""
        child = self._child(worker_id)
        loop = asyncio.get_running_loop()
        stopped = await loop.run_in_executor(self._executor, processes.stop_all, {worker_id: child.identity})
        if not stopped:
            raise ClusterError(f"worker {worker_id} has no process that could be stopped")
        child.stopped = stopped
        self.logs.note(worker_id, f"frozen: {len(stopped)} processes stopped in place")
        pids = [identity.pid for identity in stopped]
        return await loop.run_in_executor(self._executor, proportional_bytes, pids)

    async def gpu_memory(self, worker_id: str, devices: Sequence[int]) -> int:
        """Memory on GPUs; see the port."""
        child = self._children.get(worker_id)
        if child is None:
            return 0

        def read() -> int:
            found = processes.find_processes({worker_id: child.identity}).get(worker_id, ())
            return memory.gpu_bytes({identity.pid for identity in found}, devices)

        return await asyncio.get_running_loop().run_in_executor(self._executor, read)

    async def thaw(self, worker_id: str) -> None:
        """Continue what was stopped; see the port."""
        child = self._child(worker_id)
        # Stopped processes start no others, so these are still all of them.
        processes.let_go_on(child.stopped)
        child.stopped = []
        self.logs.note(worker_id, "thawed")

    def _child(self, worker_id: str) -> _Child:
        child = self._children.get(worker_id)
        if child is None:
            raise ClusterError(f"worker {worker_id} does not run here")
        return child

    async def sweep(self, workers: Mapping[str, ProcessIdentity | None]) -> Sequence[str]:
        """End leftovers of an earlier life; see the port. Workers of this life are left alone.

        Raises:
            ClusterError: A process survived SIGKILL.
        """
        strangers = {each: identity for each, identity in workers.items() if each not in self._children}
        ended = await self._kill_all(strangers) if strangers else {}
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._folders.prune, frozenset(self._children))
        for worker_id, identities in ended.items():
            text = f"ended {len(identities)} processes left over by an earlier gateway"
            await asyncio.wrap_future(self.logs.note(worker_id, text))
        return sorted(ended)

    async def close(self) -> None:
        """End all workers, politely at first, and the logs; see the port. Idempotent.

        Raises:
            ClusterError: A process survived SIGKILL.
        """
        await self.end_all()
        await self.logs.close()
        self._executor.shutdown(wait=False)

    async def end_all(self) -> None:
        """End all workers, politely at first, and start none any more; the logs stay open.

        Raises:
            ClusterError: A process survived SIGKILL.
        """
        self._closed = True
        children = list(self._children.values())
        for child in children:
            self._ask_to_end(child)
        if children:
            waits = [asyncio.ensure_future(child.ended.wait()) for child in children]
            try:
                await asyncio.wait(waits, timeout=self._close_grace_s)
            finally:
                for wait in waits:
                    wait.cancel()
        left = {child.worker_id: child.identity for child in children if not child.ended.is_set()}
        if left:
            await self._kill_all(left)
            for child in children:
                await child.ended.wait()

    @property
    def base_environment(self) -> dict[str, str]:
        """What every process that is started here finds in its environment."""
        return dict(self._base_env)

    def environment(self, spec: WorkerSpec) -> dict[str, str]:
        """All that a worker finds in its environment."""
        own = self._folders.environment(spec.worker_id, self._base_env) if spec.private_folders else {}
        # An endpoint on a volume of its own does not look into the cache that the gateway was given.
        cache = chosen_cache(spec.env, volume_present=Path(VOLUME).is_dir())
        env = self._base_env | own | cache | dict(spec.env)
        env[WORKER_COOKIE] = spec.worker_id
        if spec.devices or self._host_has_gpus:
            # Our indices are the driver's; CUDA counts by speed unless told otherwise. An empty list
            # hides all GPUs.
            env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            env["CUDA_VISIBLE_DEVICES"] = ",".join(str(index) for index in spec.devices)
        return env

    def _on_main_ended(self, child: _Child) -> None:
        if child.pidfd is not None:
            asyncio.get_running_loop().remove_reader(child.pidfd)
            os.close(child.pidfd)
            child.pidfd = None
        child.task = asyncio.create_task(self._clean_up(child), name=f"clean-up-{child.worker_id}")

    async def _clean_up(self, child: _Child) -> None:
        while True:
            try:
                await self._kill_all({child.worker_id: child.identity})
                break
            except ClusterError as error:
                # Reported each time: its memory and GPUs are not free, and only the operator can help.
                _log.error("cluster.kill_incomplete", worker_id=child.worker_id, error=str(error))
                self.logs.note(child.worker_id, str(error))
                await asyncio.sleep(_RETRY_S)
        code = child.popen.wait()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._folders.remove, child.worker_id)
        try:
            await self.logs.finish(child.worker_id, describe_exit(code))
        except OSError:
            _log.exception("cluster.log_unfinished", worker_id=child.worker_id)
        del self._children[child.worker_id]
        try:
            child.on_exit(WorkerExit(worker_id=child.worker_id, code=code))
        except Exception:  # noqa: BLE001 - a fault in the caller's code must not leave `ended` unset
            _log.exception("cluster.on_exit_failed", worker_id=child.worker_id)
        finally:
            child.ended.set()

    async def _kill_all(
        self, workers: Mapping[str, ProcessIdentity | None]
    ) -> dict[str, list[ProcessIdentity]]:
        loop = asyncio.get_running_loop()
        ended = await loop.run_in_executor(self._executor, processes.kill_all, workers)
        mains = {child.identity.pid for child in self._children.values()}
        for identities in ended.values():
            for identity in identities:
                # Orphans become our children where the gateway is process 1 of a container; nobody else
                # would reap them. The main processes are reaped by `_clean_up`.
                if identity.pid not in mains:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(identity.pid, os.WNOHANG)  # noqa: ASYNC222 - does not wait
        return ended


def _watch(pid: int, loop: asyncio.AbstractEventLoop, on_ended: Callable[[], None]) -> None:
    """Block until a child has ended, leave it as a zombie, and tell the loop if it still runs."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(on_ended)


def describe_exit(code: int) -> str:
    """How a process ended, in words, by its exit status; negative is a signal."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
