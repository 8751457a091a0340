"""Endpoints whose workers are containers: what they need, checked and fetched before anything is stored.

The image is fetched at once, so that a name that is wrong, or a registry that refuses, is told to whoever
deploys, and the first worker starts without waiting for it. Passwords of registries are sealed for their
endpoint and their registry, like credentials of buckets for their job; nobody ever sees them again.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pilotlight.clusters.container_engine import (
    ContainerEngine,
    Image,
    Login,
    NoEngineError,
    PullError,
    UnreachableError,
)
from pilotlight.clusters.container_plan import registry_of
from pilotlight.clusters.volumes import resolve_volume
from pilotlight.core.placement import HostResources
from pilotlight.domain.endpoint import MODEL_VARIABLE, Container, EndpointKind, Volume
from pilotlight.engines.manifest import MANIFEST_NAME, EngineManifest, manifest_of
from pilotlight.errors import ClusterError, EngineEnvironmentError, InvalidInputError
from pilotlight.management.checks import Progress, concurrency_notes, decide_gpu_count, plan_flags
from pilotlight.management.commands import check_ports, check_resources
from pilotlight.management.problems import UnavailableError
from pilotlight.management.schemas import CreateEndpoint, ReviseEndpoint
from pilotlight.models.catalog import ModelFacts
from pilotlight.sealing import InstallationSecret, UnsealError
from pilotlight.threads import call_in_thread

ENGINE_HOME_VARIABLE = "PILOTLIGHT_ENGINE_HOME"
"""In images of our worker: the folder with the list of the engine's flags."""

PULLS_MAX = 2
"""Images fetched at the same time; more would only share the same line and disk."""


class RegistryLogins:
    """Seals passwords of registries, and reads them when an image is fetched.

    Args:
        secret: The installation's.
    """

    def __init__(self, secret: InstallationSecret) -> None:
        self._secret = secret

    @property
    def installation(self) -> str:
        """The installation's id."""
        return self._secret.installation_id

    def seal(self, endpoint_id: str, container: Container) -> Container:
        """The container with its password sealed for endpoint and registry; one without stays as it is."""
        if not container.registry_password:
            return container
        sealed = self._secret.seal(_purpose(endpoint_id, container), container.registry_password.encode())
        return replace(container, registry_password=base64.b64encode(sealed).decode())

    def of(self, endpoint_id: str, container: Container) -> Login | None:
        """Who fetches the image of a stored revision; None for anybody.

        Raises:
            PullError: The password cannot be read any more.
        """
        if not container.registry_user:
            return None
        try:
            sealed = base64.b64decode(container.registry_password, validate=True)
            password = self._secret.unseal(_purpose(endpoint_id, container), sealed).decode()
        except (UnsealError, binascii.Error) as error:
            raise PullError(
                f"image {container.image} cannot be fetched: the password of {container.registry_user} was"
                " sealed with another secret (secret.key); deploy again with the password"
            ) from error
        return Login(user=container.registry_user, password=password)


def plain_login(container: Container) -> Login | None:
    """Who fetches the image of a container whose password is not sealed yet; None for anybody."""
    if not container.registry_user:
        return None
    return Login(user=container.registry_user, password=container.registry_password)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedContainer:
    """What a revision is made of.

    Attributes:
        container: How its workers run; the password as it was given.
        model: What a vLLM worker serves; "" for other kinds.
        command: Arguments for the image.
        env: The complete environment.
        gpu_count: GPUs per worker.
        memory_bytes: Host memory per worker; 0 means the installation's default, and no limit.
    """

    container: Container
    model: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    gpu_count: int
    memory_bytes: int

    @property
    def title(self) -> str:
        """What an endpoint without a name is called after: the image's last name."""
        return re.split(r"[:@]", self.container.image.rsplit("/", 1)[-1])[0]


def container_of(body: CreateEndpoint | ReviseEndpoint, before: Container | None = None) -> Container:
    """The container that a request asks for; the password, where one is sent, as it is.

    Args:
        body: The request; of a change, what it leaves out stays.
        before: What is stored.

    Raises:
        InvalidInputError: The image comes from another registry, which must not be told the stored password.
    """
    sent = body.model_fields_set
    container = before or Container(image=body.image or "")
    if "image" in sent and body.image:
        container = replace(container, image=body.image)
    if "volumes" in sent:
        volumes = tuple(Volume(**volume.model_dump()) for volume in body.volumes)
        container = replace(container, volumes=volumes)
    if "shm_bytes" in sent:
        container = replace(container, shm_bytes=body.shm_bytes or 0)
    if "registry_user" in sent:
        password = body.registry_password.get_secret_value() if body.registry_password else ""
        container = replace(container, registry_user=body.registry_user or "", registry_password=password)
    elif container.registry_user and before is not None:
        old, new = registry_of(before.image), registry_of(container.image)
        if new != old:
            raise InvalidInputError(
                f"the stored password of {container.registry_user} is for {old}, but image {container.image}"
                f" comes from {new}; send registry_user and registry_password of {new}, or null for both",
                field="registry_password",
            )
    return container


class ImageChecker:
    """Checks containers against this host, and has their images here.

    Args:
        engine: Docker or Podman.
        logins: Seals passwords.
        read_host: Reads what the host has; may block.
        reserve_bytes: Host memory never given to workers.
        volume_roots: Folders below which all may be given to containers.
        leads: Whether workers run on this gateway's machine now.
    """

    def __init__(
        self,
        *,
        engine: ContainerEngine,
        logins: RegistryLogins,
        read_host: Callable[[], HostResources],
        reserve_bytes: int,
        volume_roots: Sequence[Path] = (),
        leads: Callable[[], bool] = lambda: True,
    ) -> None:
        self._engine = engine
        self.logins = logins
        self._read_host = read_host
        self._reserve_bytes = reserve_bytes
        self._volume_roots = tuple(volume_roots)
        self._leads = leads
        self._pulling = asyncio.Semaphore(PULLS_MAX)

    async def check(
        self,
        kind: EndpointKind,
        container: Container,
        login: Callable[[], Login | None],
        *,
        model: str | None,
        model_kept: str = "",
        command: Sequence[str],
        env: Mapping[str, str],
        gpu_count: int | None,
        gpus_kept: int = 0,
        memory_bytes: int | None,
        progress: Progress,
    ) -> CheckedContainer:
        """Check a container and have its image here.

        Args:
            kind: What the image's program is.
            container: As its owner wants it.
            login: Tells who fetches the image, asked only if it is fetched; None for anybody.
            model: What a vLLM worker serves; None takes the model that the image says it holds.
            model_kept: Taken where the image says nothing.
            command: Arguments for the image; empty for its own.
            env: As the owner set it.
            gpu_count: GPUs per worker; None means what the image's engine needs, none for other images.
            gpus_kept: With None, not fewer than these, unless the engine is built for CPUs.
            memory_bytes: What a worker may use; None means the installation's default, and no limit.
            progress: Told about each step.

        Raises:
            InvalidInputError: The first thing that does not fit; names it, its value and what is legal.
            UnavailableError: The container engine does not answer, or is another gateway's.
        """
        if not self._leads():
            raise UnavailableError(
                "another gateway leads and has the workers, so images are for it to check and fetch: ask it"
            )
        progress("checking", f"image {container.image}")
        await asyncio.to_thread(check_volumes, container.volumes, self._volume_roots)
        if kind is EndpointKind.LOAD_BALANCER:
            check_ports(env)
        host = await asyncio.to_thread(self._read_host)
        gpus = gpus_kept if gpu_count is None else gpu_count
        check_resources(host, self._reserve_bytes, gpu_count=gpus, memory_bytes=memory_bytes)
        image = await self._image(container.image, login, progress)
        if not command and not image.command:
            raise InvalidInputError(
                f"image {container.image} says not what to run (neither CMD nor ENTRYPOINT); give a command",
                field="command",
            )
        full = dict(env)
        if kind is EndpointKind.VLLM:
            full[MODEL_VARIABLE] = model = _model(container.image, model, env, image, kept=model_kept)
            gpus, notes = await self._check_engine(container.image, image, model, full, gpu_count, gpus_kept)
            check_resources(host, self._reserve_bytes, gpu_count=gpus, memory_bytes=memory_bytes)
            for note in (*notes, *concurrency_notes(env)):
                progress("checking", note)
        for note in await call_in_thread(
            partial(self._volume_notes, container.volumes), name="look-at-volumes"
        ):
            progress("checking", note)
        return CheckedContainer(
            container=container,
            model=model or "",
            command=tuple(command),
            env=full,
            gpu_count=gpus,
            memory_bytes=memory_bytes or 0,
        )

    async def _check_engine(
        self,
        reference: str,
        image: Image,
        model: str,
        env: Mapping[str, str],
        gpu_count: int | None,
        gpus_kept: int,
    ) -> tuple[int, Sequence[str]]:
        """GPUs per worker, and what the owner should know, as far as the image tells of its engine."""
        manifest, notes = await self._manifest(reference, image)
        if manifest is None:
            return gpus_kept if gpu_count is None else gpu_count, notes
        plan = plan_flags(env, manifest, model)
        # What the model itself would say of them is known only in the container.
        facts = ModelFacts(name=model, kind="hub", path=None)
        return decide_gpu_count(facts, plan.ranks, manifest, gpu_count, kept=gpus_kept), plan.notes

    async def _manifest(self, reference: str, image: Image) -> tuple[EngineManifest | None, Sequence[str]]:
        """What our images tell of their engine; where there is nothing, sentences that say why."""
        home = image.env.get(ENGINE_HOME_VARIABLE)
        if not home:
            return None, []
        path = f"{home}/{MANIFEST_NAME}"
        read = partial(self._engine.read_file, reference, path, installation=self.logins.installation)
        try:
            data = await call_in_thread(read, name="read-manifest")
            if data is not None:
                return manifest_of(data, f"image {reference}"), []
        except UnreachableError as error:
            raise UnavailableError(str(error)) from error
        except (ClusterError, EngineEnvironmentError) as error:
            return None, [f"{error}: the engine checks the environment at its start"]
        return None, [f"image {reference} has no {path}: its engine checks the environment at its start"]

    def _volume_notes(self, volumes: Sequence[Volume]) -> list[str]:
        """What is to be known of named volumes: a name that is misspelt makes a new one."""
        named = [volume.source for volume in volumes if not volume.source.startswith("/")]
        try:
            missing = [name for name in named if not self._engine.has_volume(name)]
        except ClusterError as error:
            return [f"whether the volumes {', '.join(named)} exist is not known: {error}"]
        return [f"volume {name} does not exist yet: the first worker gets an empty one" for name in missing]

    async def _image(self, reference: str, login: Callable[[], Login | None], progress: Progress) -> Image:
        loop = asyncio.get_running_loop()
        message = f"image {reference}"
        stopped = False

        def on_progress(done: int, total: int) -> None:
            if not stopped:
                loop.call_soon_threadsafe(progress, "downloading", message, done, total)

        def fetch() -> Image:
            self._engine.pull(reference, login(), on_progress, cancelled=lambda: stopped)
            image = self._engine.image(reference)
            if image is None:
                raise PullError(f"image {reference} is gone again")
            return image

        try:
            image = await call_in_thread(partial(self._engine.image, reference), name="look-at-image")
            if image is None:
                async with self._pulling:
                    image = await call_in_thread(fetch, name="fetch-image")
        except NoEngineError as error:
            raise InvalidInputError(str(error), field="image") from error
        except UnreachableError as error:
            raise UnavailableError(str(error)) from error
        except ClusterError as error:
            raise InvalidInputError(str(error), field="image") from error
        finally:
            stopped = True
        return image


def check_volumes(volumes: Sequence[Volume], roots: Sequence[Path]) -> None:
    """Return when a container can be given these volumes.

    Args:
        volumes: As their owner named them.
        roots: Folders below which all may be given to containers.

    Raises:
        InvalidInputError: A folder that does not exist here or lies elsewhere, or two volumes at one place.
    """
    taken: set[str] = set()
    for number, volume in enumerate(volumes):
        where = f"volumes.{number}"
        try:
            resolve_volume(volume, roots)
        except ClusterError as error:
            raise InvalidInputError(str(error), field=f"{where}.source") from error
        if volume.target in taken:
            raise InvalidInputError(f"two volumes have the target {volume.target}", field=f"{where}.target")
        taken.add(volume.target)


def _model(reference: str, model: str | None, env: Mapping[str, str], image: Image, *, kept: str) -> str:
    """The name of the model that a vLLM worker's image serves."""
    named = model or env.get(MODEL_VARIABLE) or image.env.get(MODEL_VARIABLE) or kept
    if not named:
        raise InvalidInputError(
            f"image {reference} holds no model that it names ({MODEL_VARIABLE}), so model is needed",
            field="model",
        )
    if env.get(MODEL_VARIABLE, named) != named:
        raise InvalidInputError(
            f"env.{MODEL_VARIABLE} is {env[MODEL_VARIABLE]!r}, but model is {named!r}; leave the variable"
            " out",
            field=f"env.{MODEL_VARIABLE}",
        )
    return named


def _purpose(endpoint_id: str, container: Container) -> str:
    """What a password is sealed for; no job has such an id."""
    return f"registry {registry_of(container.image)} of {endpoint_id}"
