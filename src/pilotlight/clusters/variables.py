"""The environment of workers on this machine, processes and containers; `bootstrap` makes one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from pilotlight.clusters.ports import PortBook
from pilotlight.core.health_check import HEALTH_PORT_VARIABLE, PORT_VARIABLE
from pilotlight.core.placement import HostResources
from pilotlight.core.variables import clean_value
from pilotlight.core.worker_environment import (
    FLASHBOOT_VARIABLE,
    HTTP_HOST_VARIABLE,
    LAUNCHER_VARIABLE,
    RUN_FOLDER_VARIABLE,
    STATE_URL_VARIABLE,
    join_environment,
    without_jobs,
    worker_environment,
)
from pilotlight.domain.endpoint import ENGINE_VERSION_VARIABLE, Endpoint, EndpointKind
from pilotlight.settings import Settings


class WorkerVariables:
    """Says what every worker finds in its environment.

    Args:
        settings: Heartbeats, deadlines, where the engine is.
        local_url: Where workers on this machine reach us.
        ports: Gives load-balancing workers their port.
        run_folder: Where a worker has its sockets: worker id → folder.
        host: Reads what the machine has.

    Attributes:
        launcher: Says where a worker of an endpoint may have its engine forked; None for nowhere.
    """

    def __init__(
        self,
        settings: Settings,
        local_url: str,
        *,
        ports: PortBook,
        run_folder: Callable[[str], Path],
        host: Callable[[], HostResources],
    ) -> None:
        self._settings = settings
        self._local_url = local_url
        self._ports = ports
        self._run_folder = run_folder
        self._host = host
        self.launcher: Callable[[Endpoint], Path | None] = lambda _: None

    def __call__(self, endpoint: Endpoint, worker_id: str, secret: str) -> Mapping[str, str]:
        """The complete environment of a worker.

        Args:
            endpoint: Whose, with the revision it is started from.
            worker_id: Its id.
            secret: Its credential.
        """
        variables = self.before_launcher(endpoint, worker_id, secret)
        socket = self.launcher(endpoint)
        return variables if socket is None else {**variables, LAUNCHER_VARIABLE: str(socket)}

    def before_launcher(self, endpoint: Endpoint, worker_id: str, secret: str) -> Mapping[str, str]:
        """The same without a launcher: what decides which one it can use."""
        contained = endpoint.revision.container is not None
        platform = self._platform(endpoint, worker_id, secret)
        # A container inherits nothing of ours; its image has its own proxies, engine and paths.
        inherited = {} if contained else os.environ
        if endpoint.kind is EndpointKind.QUEUE:
            del platform[STATE_URL_VARIABLE]
            return join_environment(endpoint.revision.env, platform, inherited)
        if endpoint.kind is EndpointKind.LOAD_BALANCER:
            port = str(self._ports.take(worker_id))
            platform = without_jobs(platform) | {PORT_VARIABLE: port, HEALTH_PORT_VARIABLE: port}
            if not contained or self._settings.containers.network == "host":
                # Nobody but us may reach a worker that asks for no key.
                platform[HTTP_HOST_VARIABLE] = "127.0.0.1"
            if not contained:
                platform |= self._engine(endpoint.revision.env)
            return join_environment(endpoint.revision.env, platform, inherited)
        variables = join_environment(endpoint.revision.env, platform, inherited)
        variables[RUN_FOLDER_VARIABLE] = str(self._run_folder(worker_id))
        variables["MAX_CONCURRENCY"] = str(endpoint.concurrency)
        if endpoint.flashboot:
            variables[FLASHBOOT_VARIABLE] = "1"
        if clean_value(variables.get("DRAIN_TIMEOUT")) is None:
            drain_s = min(endpoint.execution_timeout_ms // 1000, self._settings.workers.drain_max_s)
            variables["DRAIN_TIMEOUT"] = str(drain_s)
        if not contained:
            variables |= self._engine(endpoint.revision.env)
        return variables

    def _engine(self, env: Mapping[str, str]) -> dict[str, str]:
        """Where our worker program finds the engine that is installed here, in the version asked for."""
        command = self._settings.engine.command
        replaced = {"PILOTLIGHT_ENGINE_COMMAND": json.dumps(command)} if command else {}
        home = self._settings.engine_home_of(env.get(ENGINE_VERSION_VARIABLE, "").strip())
        return {"PILOTLIGHT_ENGINE_HOME": str(home), **replaced}

    def _platform(self, endpoint: Endpoint, worker_id: str, secret: str) -> dict[str, str]:
        revision = endpoint.revision
        base_url = self._settings.containers.gateway_url if revision.container is not None else ""
        # Which of them it gets is not known here, so a host with several types says none.
        gpu_types = {gpu.name for gpu in self._host().gpus} if revision.gpu_count else set()
        return worker_environment(
            base_url or self._local_url,
            endpoint.id,
            worker_id,
            secret,
            ping_interval_ms=self._settings.jobs.ping_interval_ms,
            gpu_type=gpu_types.pop() if len(gpu_types) == 1 else None,
            gpu_count=revision.gpu_count,
            cpu_count=len(os.sched_getaffinity(0)),
            host_name=socket.gethostname(),
        )
