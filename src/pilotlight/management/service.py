"""Endpoints: made, revised, deleted. The one place that changes them; every management API speaks to it.

A change has two halves. The first checks, may fetch gigabytes, and touches nothing; giving it up leaves no
trace. The second stores, tells the directory, and wakes the autoscaler; it is short, serialised, and
finishes even when its caller has gone away.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from pilotlight.core.placement import HostResources
from pilotlight.domain.endpoint import (
    ENGINE_VERSION_VARIABLE,
    MODEL_VARIABLE,
    RESERVED_ENDPOINT_IDS,
    Endpoint,
    EndpointKind,
    Revision,
    Routing,
    ScalerType,
)
from pilotlight.domain.ids import short_id
from pilotlight.domain.worker import Worker
from pilotlight.engines.manifest import EngineManifest
from pilotlight.errors import ConflictError, InvalidInputError, NotFoundError
from pilotlight.management.checks import CheckedModel, ModelChecker, Progress, ProgressStage
from pilotlight.management.commands import CheckedCommand, CommandChecker
from pilotlight.management.directory import EndpointDirectory
from pilotlight.management.engine_url import served_model
from pilotlight.management.images import CheckedContainer, ImageChecker, container_of, plain_login
from pilotlight.management.schemas import (
    CONTAINER_FIELDS,
    MASK,
    NAME_LENGTH_MAX,
    CreateEndpoint,
    EndpointView,
    ReviseEndpoint,
    check_kind_scaler,
    check_scaler,
    check_workers,
    foreign_fields,
)
from pilotlight.management.views import StartEstimates, endpoint_view
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet, Health
from pilotlight.ports.store import EndpointStore, WorkerStore
from pilotlight.settings import Settings

ENDPOINTS_MAX = 1000
"""Endpoints of one installation; the directory holds them all in memory."""

_T = TypeVar("_T")

_REVISION_FIELDS = CONTAINER_FIELDS | {
    "model", "command", "env", "engine_url", "engine_version", "gpu_count", "memory_bytes", "image"
}  # fmt: skip

Checked = CheckedModel | CheckedCommand | CheckedContainer
"""What a revision is made of."""


class ManagementStore(EndpointStore, WorkerStore, Protocol):
    """What the service keeps."""


def no_progress(
    stage: ProgressStage, message: str, done: int | None = None, total: int | None = None
) -> None:
    """Progress that nobody wants to know."""


class EndpointService:
    """Makes, revises, deletes and describes endpoints.

    Args:
        store: Where endpoints are kept.
        directory: The gateway's view of them, refreshed after each change.
        fleet: The living workers.
        settings: Where data lies, what is kept in reserve, when an endpoint counts as unhealthy.
        clock: Time.
        entropy: Gives that many random bytes, such as `os.urandom`.
        wake: Tells the autoscaler that an endpoint has changed.
        manifest_loader: Reads what the engine of a version (None: the usual one) understands; raises
            EngineEnvironmentError, and InvalidInputError for a version that is not installed.
        host_reader: Reads what the host has; may block.
        on_deleted: Awaited after an endpoint was deleted: ends its jobs, held requests and workers.
        base_url: Gives the base URL under which clients reach us, without a slash at the end.
        images: Checks and fetches container images.
        estimates: How long starts take.
    """

    def __init__(
        self,
        *,
        store: ManagementStore,
        directory: EndpointDirectory,
        fleet: Fleet,
        settings: Settings,
        clock: Clock,
        entropy: Callable[[int], bytes],
        wake: Callable[[str], None],
        manifest_loader: Callable[[str | None], EngineManifest],
        host_reader: Callable[[], HostResources],
        on_deleted: Callable[[str], Awaitable[None]],
        base_url: Callable[[], str],
        images: ImageChecker,
        estimates: StartEstimates,
    ) -> None:
        self._store = store
        self._directory = directory
        self._fleet = fleet
        self._failures_max = settings.workers.start_failures_max
        self._clock = clock
        self._entropy = entropy
        self._wake = wake
        self._on_deleted = on_deleted
        self.base_url = base_url
        self.engine_home = settings.engine_home
        self.checker = ModelChecker(
            load_manifest=manifest_loader,
            read_host=host_reader,
            reserve_bytes=settings.workers.memory_reserve_bytes,
        )
        self.commands = CommandChecker(
            read_host=host_reader, reserve_bytes=settings.workers.memory_reserve_bytes
        )
        self.images = images
        self._estimates = estimates
        self._changing = asyncio.Lock()

    def endpoints(self) -> Sequence[Endpoint]:
        """All living endpoints, oldest first."""
        return self._directory.endpoints()

    def endpoint(self, endpoint_id: str) -> Endpoint:
        """One living endpoint. NotFoundError when there is none with this id."""
        endpoint = self._directory.endpoint(endpoint_id)
        if endpoint is None:
            raise NotFoundError(f"endpoint {endpoint_id} does not exist")
        return endpoint

    def workers(self, endpoint_id: str) -> Sequence[Worker]:
        """The living workers of an endpoint, oldest first."""
        return self._fleet.workers(endpoint_id)

    def health(self, endpoint_id: str) -> Health:
        """The recent starts of an endpoint."""
        return self._fleet.health(endpoint_id)

    async def worker(self, endpoint_id: str, worker_id: str) -> Worker:
        """One worker of an endpoint, living or remembered. NotFoundError when there is none."""
        self.endpoint(endpoint_id)
        living = self._fleet.worker(worker_id)
        if living is not None and living.endpoint_id == endpoint_id:
            return living
        for worker in await self._store.workers(endpoint_id=endpoint_id, living=False):
            if worker.id == worker_id:
                return worker
        raise NotFoundError(f"endpoint {endpoint_id} has no worker {worker_id}")

    def view(self, endpoint: Endpoint) -> EndpointView:
        """An endpoint as `/pilotlight/v1` shows it, with its workers as they are now."""
        return endpoint_view(
            endpoint,
            self._fleet.workers(endpoint.id),
            self._fleet.health(endpoint.id),
            self._estimates,
            base_url=self.base_url(),
            failures_max=self._failures_max,
        )

    async def create(self, body: CreateEndpoint, progress: Progress = no_progress) -> Endpoint:
        """A new endpoint, checked and stored, its weights on this machine.

        Args:
            body: What was asked for.
            progress: Told about each step.

        Raises:
            InvalidInputError: Something about the model or the command does not fit; nothing was stored.
            ConflictError: The name is taken.
            EngineEnvironmentError: No engine is installed.
            UnavailableError: The hub or the fixed engine does not answer.
        """
        if body.name is not None:
            self._check_name(body.name)
        if len(self._directory.endpoints()) >= ENDPOINTS_MAX:
            raise ConflictError(f"there are {ENDPOINTS_MAX} endpoints already; delete one first")
        for name, value in body.env.items():
            if value == MASK:
                raise InvalidInputError(f"env.{name} holds the mask that answers show", field=f"env.{name}")
        kind = EndpointKind(body.kind)
        made: Checked
        if body.image is not None:
            container = container_of(body)
            made = await self.images.check(
                kind, container, lambda: plain_login(container), model=body.model, command=body.command or (),
                env=body.env, gpu_count=body.gpu_count, memory_bytes=body.memory_bytes, progress=progress,
            )  # fmt: skip
        elif kind is EndpointKind.VLLM:
            env = _with_version(body.env, body)
            made = await self._checked(body.model, env, body.engine_url, body.gpu_count, progress)
        else:
            progress("checking", f"command {body.command[0] if body.command else ''}")
            made = await self.commands.check(
                kind, body.command or (), body.env, gpu_count=body.gpu_count, memory_bytes=body.memory_bytes
            )
        progress("storing", "endpoint")
        return await _finish(self._store_new(body, made))

    async def revise(
        self, endpoint_id: str, body: ReviseEndpoint, progress: Progress = no_progress
    ) -> Endpoint:
        """An endpoint with the fields changed that were sent.

        Model or command, environment, engine URL, GPUs and memory make a new revision, whose workers replace
        the old ones; sending the same model or command again makes one too, since its files may have
        changed. All else changes in place, except the kind, which never does.

        Args:
            endpoint_id: Which endpoint.
            body: What was asked for.
            progress: Told about each step.

        Raises:
            NotFoundError: No such endpoint.
            InvalidInputError: As for `create`.
            ConflictError: The name is taken, or somebody else changed the endpoint meanwhile.
        """
        current = self.endpoint(endpoint_id)
        sent = body.model_fields_set
        if "name" in sent:
            self._check_name(body.name, but=endpoint_id)
        _apply_settings(current, body)
        _check_revised_kind(current, body)
        if "image" in sent or current.revision.container is not None:
            revision = await self._revised_container(current, body, progress)
        elif current.kind is EndpointKind.VLLM:
            revision = await self._revised(current.revision, body, progress)
        else:
            revision = await self._revised_command(current, body, progress)
        progress("storing", "endpoint")
        return await _finish(self._store_changed(endpoint_id, body, revision))

    async def delete(self, endpoint_id: str) -> None:
        """Forget an endpoint: its jobs are cancelled, its workers end.

        Raises:
            NotFoundError: No such endpoint.
        """
        await _finish(self._store_deleted(endpoint_id))

    async def _store_new(self, body: CreateEndpoint, model: Checked) -> Endpoint:
        async with self._changing:
            now = self._clock.now_ms()
            endpoint_id = self._new_id()
            endpoint = Endpoint(
                id=endpoint_id,
                name=body.name or self._free_name(model.title),
                kind=EndpointKind(body.kind),
                revision=Revision(
                    endpoint_id=endpoint_id,
                    version=1,
                    model=model.model,
                    command=model.command,
                    env=model.env,
                    engine_url=body.engine_url,
                    gpu_count=model.gpu_count,
                    memory_bytes=model.memory_bytes,
                    created_ms=now,
                    container=(
                        self.images.logins.seal(endpoint_id, model.container)
                        if isinstance(model, CheckedContainer)
                        else None
                    ),
                ),
                workers_min=body.min,
                workers_max=body.max,
                idle_timeout_ms=body.idle_timeout_s * 1000,
                scaler=ScalerType(body.scaler_of_kind),
                scaler_value=body.scaler_value,
                execution_timeout_ms=body.execution_timeout_ms,
                concurrency=body.concurrency,
                flashboot=body.flashboot,
                routing=Routing(body.routing),
                created_ms=now,
                updated_ms=now,
            )
            await self._store.add_endpoint(endpoint)
            await self._directory.refresh()
        self._wake(endpoint_id)
        return endpoint

    async def _store_changed(
        self, endpoint_id: str, body: ReviseEndpoint, revision: Revision | None
    ) -> Endpoint:
        async with self._changing:
            current = self.endpoint(endpoint_id)
            now = self._clock.now_ms()
            if revision is not None and revision.version != current.revision.version + 1:
                raise ConflictError(
                    f"endpoint {endpoint_id} got version {current.revision.version} meanwhile; try again"
                )
            changed = replace(_apply_settings(current, body), updated_ms=now)
            if revision is not None:
                changed = replace(changed, revision=replace(revision, created_ms=now))
            await self._store.update_endpoint(changed)
            await self._directory.refresh()
        self._wake(endpoint_id)
        return changed

    async def _store_deleted(self, endpoint_id: str) -> None:
        async with self._changing:
            self.endpoint(endpoint_id)
            await self._store.delete_endpoint(endpoint_id, now_ms=self._clock.now_ms())
            await self._directory.refresh()
        # The endpoint is gone for new requests; what it still has ends after them.
        await self._on_deleted(endpoint_id)

    async def _revised(self, current: Revision, body: ReviseEndpoint, progress: Progress) -> Revision | None:
        sent = body.model_fields_set
        if not _REVISION_FIELDS & sent:
            return None
        env = _kept_secrets(body.env, current) if "env" in sent else dict(current.env)
        if "env" not in sent:
            env.pop(MODEL_VARIABLE, None)
            if "model" in sent and current.engine_url is None:
                env = await self.checker.without_defaults(current.model, env)
        env = _with_version(env, body)
        engine_url = body.engine_url if "engine_url" in sent else current.engine_url
        gpu_count = body.gpu_count if "gpu_count" in sent else None
        gpus_kept = 0 if "gpu_count" in sent else current.gpu_count
        same_kind = (engine_url is None) == (current.engine_url is None)
        model = body.model if "model" in sent else current.model if same_kind else None
        if model is None and engine_url is None:
            raise InvalidInputError("engine_url is taken away, so model is needed", field="model")
        checked = await self._checked(model, env, engine_url, gpu_count, progress, gpus_kept)
        revision = Revision(
            endpoint_id=current.endpoint_id,
            version=current.version + 1,
            model=checked.model,
            env=checked.env,
            engine_url=engine_url,
            gpu_count=checked.gpu_count,
            memory_bytes=checked.memory_bytes,
        )
        unchanged = replace(
            revision,
            version=current.version,
            memory_bytes=current.memory_bytes,
            created_ms=current.created_ms,
        )
        if unchanged == current and not {"model", "engine_url"} & sent:
            return None
        return revision

    async def _revised_command(
        self, endpoint: Endpoint, body: ReviseEndpoint, progress: Progress
    ) -> Revision | None:
        sent, current = body.model_fields_set, endpoint.revision
        if not _REVISION_FIELDS & sent:
            return None
        command = tuple(body.command) if "command" in sent else current.command
        progress("checking", f"command {command[0]}")
        checked = await self.commands.check(
            endpoint.kind,
            command,
            _kept_secrets(body.env, current) if "env" in sent else dict(current.env),
            gpu_count=body.gpu_count if "gpu_count" in sent else current.gpu_count,
            memory_bytes=body.memory_bytes if "memory_bytes" in sent else current.memory_bytes or None,
        )
        revision = replace(
            current,
            version=current.version + 1,
            command=checked.command,
            env=checked.env,
            gpu_count=checked.gpu_count,
            memory_bytes=checked.memory_bytes,
        )
        if replace(revision, version=current.version) == current and "command" not in sent:
            return None
        return revision

    async def _revised_container(
        self, endpoint: Endpoint, body: ReviseEndpoint, progress: Progress
    ) -> Revision | None:
        sent, current = body.model_fields_set, endpoint.revision
        if not _REVISION_FIELDS & sent:
            return None
        before, logins = current.container, self.images.logins
        container = container_of(body, before)
        fresh = "registry_password" in sent or before is None
        env = _kept_secrets(body.env, current) if "env" in sent else dict(current.env)
        if "env" not in sent:
            env.pop(MODEL_VARIABLE, None)
            # What was computed or written for processes means nothing to an image.
            if before is None and current.model and current.engine_url is None:
                env.pop(ENGINE_VERSION_VARIABLE, None)
                env = await self.checker.without_defaults(current.model, env)
        model = body.model if "model" in sent else None if "image" in sent else current.model
        memory_bytes = current.memory_bytes if before is not None else 0
        checked = await self.images.check(
            endpoint.kind,
            container,
            lambda: plain_login(container) if fresh else logins.of(endpoint.id, container),
            model=model or None,
            model_kept=current.model,
            command=body.command if "command" in sent else current.command if before is not None else (),
            env=env,
            gpu_count=body.gpu_count if "gpu_count" in sent else None,
            gpus_kept=0 if "gpu_count" in sent else current.gpu_count,
            memory_bytes=body.memory_bytes if "memory_bytes" in sent else memory_bytes or None,
            progress=progress,
        )
        revision = Revision(
            endpoint_id=endpoint.id,
            version=current.version + 1,
            model=checked.model,
            command=checked.command,
            env=checked.env,
            gpu_count=checked.gpu_count,
            memory_bytes=checked.memory_bytes,
            created_ms=current.created_ms,
            container=logins.seal(endpoint.id, container) if fresh else container,
        )
        same = replace(revision, version=current.version) == current
        return None if same and not {"image", "model", "command"} & sent else revision

    async def _checked(
        self,
        model: str | None,
        env: dict[str, str],
        engine_url: str | None,
        gpu_count: int | None,
        progress: Progress,
        gpus_kept: int = 0,
    ) -> CheckedModel:
        if engine_url is None:
            assert model is not None, "one of model and engine_url is given"
            return await self.checker.check(model, env, gpu_count, progress, gpus_kept=gpus_kept)
        if gpu_count:
            raise InvalidInputError(
                f"gpu_count is {gpu_count}, but an engine_url uses no GPU of ours", field="gpu_count"
            )
        if model is None:
            progress("checking", f"engine {engine_url}")
            model = await served_model(engine_url)
        return CheckedModel(model=model, env={**env, MODEL_VARIABLE: model}, gpu_count=0, memory_bytes=0)

    def _check_name(self, name: str, *, but: str = "") -> None:
        taken = next((e for e in self._directory.endpoints() if e.name == name and e.id != but), None)
        if taken is not None:
            raise ConflictError(
                f"name {name!r} belongs to endpoint {taken.id}; choose another, or revise that endpoint"
            )

    def _free_name(self, model: str) -> str:
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-.")
        base = (base or "endpoint")[: NAME_LENGTH_MAX - 5]
        taken = {endpoint.name for endpoint in self._directory.endpoints()}
        candidates = [base, *(f"{base}-{number}" for number in range(2, len(taken) + 3))]
        return next(name for name in candidates if name not in taken)

    def _new_id(self) -> str:
        while True:
            candidate = short_id(self._entropy(14))
            if candidate not in RESERVED_ENDPOINT_IDS and self._directory.endpoint(candidate) is None:
                return candidate

    async def manifest(self) -> EngineManifest:
        """What the installed engine understands. EngineEnvironmentError when there is none."""
        return await self.checker.manifest()

    async def host(self) -> HostResources:
        """What this host has now."""
        return await self.checker.host()


def _apply_settings(endpoint: Endpoint, body: ReviseEndpoint) -> Endpoint:
    """The endpoint with what changes in place; InvalidInputError when it contradicts itself."""
    sent = body.model_fields_set
    changed = replace(
        endpoint,
        name=body.name if "name" in sent else endpoint.name,
        workers_min=body.min if "min" in sent else endpoint.workers_min,
        workers_max=body.max if "max" in sent else endpoint.workers_max,
        idle_timeout_ms=(
            body.idle_timeout_s * 1000 if "idle_timeout_s" in sent else endpoint.idle_timeout_ms
        ),
        scaler=ScalerType(body.scaler) if "scaler" in sent else endpoint.scaler,
        scaler_value=body.scaler_value if "scaler_value" in sent else endpoint.scaler_value,
        execution_timeout_ms=(
            body.execution_timeout_ms if "execution_timeout_ms" in sent else endpoint.execution_timeout_ms
        ),
        concurrency=body.concurrency if "concurrency" in sent else endpoint.concurrency,
        flashboot=body.flashboot if "flashboot" in sent else endpoint.flashboot,
        routing=Routing(body.routing) if "routing" in sent else endpoint.routing,
    )
    try:
        check_workers(changed.workers_min, changed.workers_max)
        check_scaler(changed.scaler.value, changed.scaler_value)
        check_kind_scaler(changed.kind.value, changed.scaler.value)
    except ValueError as error:
        raise InvalidInputError(str(error)) from error
    return changed


def _check_revised_kind(endpoint: Endpoint, body: ReviseEndpoint) -> None:
    """Return when the fields sent belong to the endpoint's kind, else raise InvalidInputError."""
    sent, kind = body.model_fields_set, endpoint.kind
    if "kind" in sent and body.kind != kind:
        raise InvalidInputError(
            f"kind is {body.kind}, but endpoint {endpoint.name} is of kind {kind}, which cannot change;"
            " make another endpoint",
            field="kind",
        )
    vllm, contained = kind is EndpointKind.VLLM, "image" in sent or endpoint.revision.container is not None
    if not contained and (wrong := sorted(CONTAINER_FIELDS & sent)):
        raise InvalidInputError(
            f"{wrong[0]} belongs to an image, but endpoint {endpoint.name} has none", field=wrong[0]
        )
    if contained and "engine_url" in sent:
        raise InvalidInputError("image and engine_url exclude each other", field="engine_url")
    named = [name for name in ("registry_user", "registry_password") if name in sent]
    if len(named) == 1 or (body.registry_user is None) != (body.registry_password is None):
        raise InvalidInputError("registry_user and registry_password belong together", field="registry_user")
    if wrong := sorted(foreign_fields(kind.value, contained=contained) & sent):
        belongs = "the kinds queue and load-balancer" if vllm else "the kind vllm"
        raise InvalidInputError(
            f"{wrong[0]} belongs to {belongs}, but endpoint {endpoint.name} is of kind {kind}", field=wrong[0]
        )


def _with_version(env: Mapping[str, str], body: CreateEndpoint | ReviseEndpoint) -> dict[str, str]:
    """The environment with the engine's version as far as the field says one; null takes it away.

    Raises:
        InvalidInputError: Field and variable contradict each other.
    """
    if "engine_version" not in body.model_fields_set:
        return dict(env)
    rest = {name: value for name, value in env.items() if name != ENGINE_VERSION_VARIABLE}
    version, named = body.engine_version, body.env.get(ENGINE_VERSION_VARIABLE)
    if named is not None and named != version:
        msg = f"env.{ENGINE_VERSION_VARIABLE} is {named!r}, but engine_version is {version!r}; send one"
        raise InvalidInputError(msg, field=f"env.{ENGINE_VERSION_VARIABLE}")
    return rest if version is None else {**rest, ENGINE_VERSION_VARIABLE: version}


def _kept_secrets(env: dict[str, str], current: Revision) -> dict[str, str]:
    """The environment sent, with masks replaced by the values they stand for."""
    kept = dict(env)
    for name, value in env.items():
        if value != MASK:
            continue
        if name not in current.env:
            raise InvalidInputError(f"env.{name} holds the mask, but nothing is stored", field=f"env.{name}")
        kept[name] = current.env[name]
    return kept


async def _finish(change: Coroutine[Any, Any, _T]) -> _T:
    """Wait for a change that must not stop half-way; when we are cancelled, it still finishes first."""
    task = asyncio.ensure_future(change)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen, so that nobody is told it never was; our caller is gone
        raise
