"""Which launcher the engines of an endpoint can be forked from, if any; `bootstrap` tells `Launchers`.

An engine can be forked from a launcher only if both agree in every variable that counts while the engine is
imported, and the worker program compares them. So the environment is made here by the very steps that it
takes on its way to the engine: the platform's variables, the cluster's, the worker program's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from pilotlight.clusters.launcher import LauncherPlan
from pilotlight.clusters.local import LocalCluster
from pilotlight.core.storage import VOLUME, storage_environment
from pilotlight.core.worker_environment import is_own_program
from pilotlight.domain.endpoint import ENGINE_VERSION_VARIABLE, Endpoint, EndpointKind
from pilotlight.domain.worker import Worker
from pilotlight.engines.launching import (
    fingerprint,
    import_environment,
    launcher_command,
    launcher_environment,
)
from pilotlight.engines.manifest import MANIFEST_NAME, EngineManifest
from pilotlight.engines.repositories import may_ask_hub
from pilotlight.engines.versions import load_version
from pilotlight.errors import PilotlightError
from pilotlight.loops.needs import resources_of, worker_spec
from pilotlight.models.catalog import read_configuration
from pilotlight.settings import Settings
from pilotlight.worker.config import WorkerConfig, planned_environment
from pilotlight.worker.errors import ConfigError, ModelMissingError
from pilotlight.worker.model import look_for_model

_NOBODY = "launcher"
"""Stands for a worker's id where the environment of any worker is wanted."""


class Launchable:
    """Says how the engines of an endpoint are launched, or why they cannot be.

    Args:
        settings: Where engines are.
        variables: What the platform tells a worker: (endpoint, worker id, credential) → variables.
        cluster: What worker processes find besides.
        socket: Where the launcher of a fingerprint listens.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        variables: Callable[[Endpoint, str, str], Mapping[str, str]],
        cluster: LocalCluster,
        socket: Callable[[str], Path],
    ) -> None:
        self._settings = settings
        self._variables = variables
        self._cluster = cluster
        self._socket = socket
        self._manifests: dict[str, tuple[int, EngineManifest]] = {}

    def __call__(self, endpoint: Endpoint) -> LauncherPlan | str:
        """How its engines are launched; in words why they cannot be."""
        reason = explain_not_launchable(endpoint, engine_command=self._settings.engine.command)
        if reason:
            return reason
        try:
            manifest = self._manifest(endpoint.revision.env.get(ENGINE_VERSION_VARIABLE, "").strip())
            config = self._worker_config(endpoint)
        except (PilotlightError, ConfigError, OSError) as error:
            return str(error)
        assert config.engine_home is not None
        environment = planned_environment(
            config,
            config.environment,
            engine_key="",
            offline=not may_ask_hub(config.environment),
            platform=manifest.platform,
        )
        name = fingerprint(config.engine_home.resolve(), manifest.version, environment)
        socket = self._socket(name)
        need = resources_of(endpoint, memory_default_bytes=self._settings.workers.memory_default_bytes)
        return LauncherPlan(
            fingerprint=name,
            version=manifest.version,
            socket=socket,
            environment=launcher_environment(self._shared(environment)),
            worker_bytes=need.memory_bytes,
            command=partial(launcher_command, config.engine_home, socket),
            classes=partial(model_classes, config),
        )

    def _manifest(self, version: str) -> EngineManifest:
        """What the engine understands; read anew when its file has changed."""
        changed_ns = (self._settings.engine_home_of(version) / MANIFEST_NAME).stat().st_mtime_ns
        known = self._manifests.get(version)
        if known is None or known[0] != changed_ns:
            engine = self._settings.engine
            manifest = load_version(self._settings.engine_home, engine.homes, version or None)
            known = self._manifests[version] = (changed_ns, manifest)
        return known[1]

    def _worker_config(self, endpoint: Endpoint) -> WorkerConfig:
        """What a worker program of the endpoint would read in its environment."""
        worker = Worker(id=_NOBODY, endpoint_id=endpoint.id, version=endpoint.revision.version)
        variables = self._variables(endpoint, _NOBODY, "")
        found = self._cluster.environment(worker_spec(worker, endpoint, env=variables, program=()))
        found |= storage_environment(found, volume_present=Path(VOLUME).is_dir())
        return WorkerConfig.from_environment(found, python="")

    def _shared(self, engine: Mapping[str, str]) -> dict[str, str]:
        """Of an engine's environment what all who share a launcher have, and what programs need to run."""
        base = self._cluster.base_environment
        own = import_environment(base)
        return {name: text for name, text in base.items() if name not in own} | import_environment(engine)


def explain_not_launchable(endpoint: Endpoint, *, engine_command: Sequence[str] = ()) -> str:
    """Why no worker of the endpoint can ask a launcher, "" where one can. Pure.

    Args:
        endpoint: Whose.
        engine_command: What replaces the engine for all endpoints, if anything.
    """
    revision = endpoint.revision
    if engine_command:
        return f"the setting engine.command replaces vLLM by {engine_command[0]}"
    if revision.engine_url is not None:
        return "its engine is not started here"
    if revision.container is not None:
        return "its workers are containers, with an engine of their own"
    served = endpoint.kind is EndpointKind.LOAD_BALANCER and is_own_program(revision.command)
    if endpoint.kind is not EndpointKind.VLLM and not served:
        return "its workers are not our own program"
    return ""


def model_classes(config: WorkerConfig) -> tuple[str, ...]:
    """The classes that a worker's model names, as far as it is on this machine; reads its configuration."""
    try:
        model, _ = look_for_model(config.environment, engine_home=config.engine_home)
        named = read_configuration(Path(model.source)).get("architectures")
    except (PilotlightError, ModelMissingError, OSError):
        # The start of a worker will say more of it.
        return ()
    if not isinstance(named, list):
        return ()
    return tuple(name for name in named if isinstance(name, str) and name.isidentifier())
