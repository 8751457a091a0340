"""Docker or Podman, through the Docker SDK: images and containers, and errors that say what to do.

The only module that imports the SDK, and only when something is asked of it: it takes memory and time that an
installation without containers need not spend. Everything blocks; `clusters.containers` calls it in threads
of its own.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotlight.clusters.container_plan import (
    INSTALLATION_LABEL,
    WORKER_LABEL,
    ContainerPlan,
    split_reference,
)
from pilotlight.errors import ClusterError

SOCKETS = ("/run/podman/podman.sock", "/var/run/docker.sock")
"""Where container engines of the machine listen; a user's own Podman is looked for after them."""

_ERROR_CHARS_MAX = 500
_PIECES_MAX = 16
"""Of a file in an image, of up to 2 MiB each."""
_STATUS_TRIES, _STATUS_PAUSE_S = 50, 0.1
_LIVES = frozenset({"running", "paused"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Who fetches an image from its registry.

    Attributes:
        user: His name there.
        password: His password or token.
    """

    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image on this machine.

    Attributes:
        id: Its content's digest.
        user: The user its programs run as; "" for root.
        env: Its variables.
        command: Whether it knows what to run.
    """

    id: str
    user: str
    env: Mapping[str, str]
    command: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What is to be known of the container engine.

    Attributes:
        name: `Podman 4.3.1`, `Docker 28.0.1`.
        version: The first two numbers of it.
        podman: Whether it is Podman.
        rootless: Whether root in its containers is its own user outside.
        remapped: Whether root in its containers is nobody outside, although the engine is root (Docker's
            `userns-remap`).
    """

    name: str
    version: tuple[int, ...]
    podman: bool
    rootless: bool = False
    remapped: bool = False


class MissingError(ClusterError):
    """An image or container that the engine does not have."""


class PullError(ClusterError):
    """An image that cannot be fetched."""


class UnreachableError(ClusterError):
    """The engine does not answer."""


class NoEngineError(UnreachableError):
    """This machine has no engine that could be asked; trying again does not help."""


class ContainerEngine:
    """One container engine, reached when it is first needed.

    Args:
        url: Its socket, such as `unix:///run/podman/podman.sock`; "" looks for one.
        timeout_s: How long an answer to a short question is waited for.
    """

    def __init__(self, url: str = "", *, timeout_s: int = 60) -> None:
        self._url = url
        self.timeout_s = timeout_s
        self._api: Any = None
        self._facts: EngineFacts | None = None
        self._lock = threading.Lock()

    def facts(self) -> EngineFacts:
        """What it is.

        Raises:
            UnreachableError: It does not answer.
        """
        api = self._connect()
        if self._facts is None:
            with _translated():
                version, info = api.version(), api.info()
            # Podman names itself among its components; its version field alone could be Docker's.
            names = [str(part.get("Name", "")) for part in version.get("Components") or ()]
            podman = any("podman" in name.lower() for name in names)
            number = str(version.get("Version", ""))
            # `name=rootless`, `name=seccomp,profile=default`
            options = {
                str(each).split(",")[0].removeprefix("name=") for each in info.get("SecurityOptions") or ()
            }
            self._facts = EngineFacts(
                name=f"{'Podman' if podman else 'Docker'} {number}".strip(),
                version=tuple(int(part) for part in re.findall(r"\d+", number)[:2]),
                podman=podman,
                rootless="rootless" in options,
                remapped="userns" in options,
            )
        return self._facts

    def image(self, reference: str) -> Image | None:
        """An image on this machine; None when it is not here.

        Raises:
            UnreachableError: The engine does not answer.
            ClusterError: It cannot tell.
        """
        api = self._connect()
        try:
            with _translated():
                found = api.inspect_image(reference)
        except MissingError:
            return None
        config = found.get("Config") or {}
        pairs = [str(item).partition("=") for item in config.get("Env") or ()]
        return Image(
            id=str(found.get("Id", "")),
            user=str(config.get("User") or ""),
            env={name: value for name, _, value in pairs},
            command=bool(config.get("Cmd") or config.get("Entrypoint")),
        )

    def pull(
        self,
        reference: str,
        login: Login | None,
        on_progress: Callable[[int, int], None],
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Fetch an image from its registry.

        Args:
            reference: Which.
            login: Who fetches it; None for anybody.
            on_progress: Told bytes fetched and bytes in all, as far as they are known.
            cancelled: Asked now and then; true gives it up.

        Raises:
            UnreachableError: The engine does not answer.
            PullError: It cannot be fetched, in the engine's words, or was given up.
        """
        api = self._connect()
        repository, tag = split_reference(reference)
        # Without a login the SDK looks for one that the gateway's user has stored with `docker login`.
        auth = None if login is None else {"username": login.user, "password": login.password}
        layers: dict[str, tuple[int, int]] = {}
        with _translated():
            steps = api.pull(repository, tag=tag, stream=True, decode=True, auth_config=auth)
            for step in steps:
                if cancelled():
                    steps.close()
                    raise PullError(f"image {reference} was not fetched: given up")
                if step.get("error"):
                    raise PullError(f"image {reference} cannot be fetched: {_short(step['error'])}")
                detail = step.get("progressDetail") or {}
                if step.get("id") and detail.get("total"):
                    layers[step["id"]] = (int(detail.get("current") or 0), int(detail["total"]))
                on_progress(sum(at for at, _ in layers.values()), sum(size for _, size in layers.values()))
        if self.image(reference) is None:
            raise PullError(f"image {reference} cannot be fetched: the registry has none of this name")

    def has_volume(self, name: str) -> bool:
        """Whether there is a volume of this name; the engine makes one that a container names and is missing.

        Raises:
            UnreachableError: The engine does not answer.
            ClusterError: It cannot tell.
        """
        api = self._connect()
        try:
            with _translated():
                api.inspect_volume(name)
        except MissingError:
            return False
        return True

    def read_file(self, reference: str, path: str, *, installation: str) -> bytes | None:
        """A small file of an image that is here; None where it has none of this name.

        Args:
            reference: Which image.
            path: The file's absolute path; not a link.
            installation: Whose container it is that is made for this, for a moment; `containers` lists it.

        Raises:
            UnreachableError: The engine does not answer.
            ClusterError: It cannot tell.
        """
        api = self._connect()
        with _translated():
            # Only a container has files that can be read; this one is never started.
            made = api.create_container_from_config(
                {"Image": reference, "Cmd": ["none"], "Labels": {INSTALLATION_LABEL: installation}}
            )["Id"]
        try:
            with _translated():
                pieces, _ = api.get_archive(made, path)
                data = b"".join(itertools.islice(pieces, _PIECES_MAX))
            return _first_file(data)
        except MissingError:
            return None
        except (tarfile.TarError, ValueError) as error:
            raise ClusterError(f"{path} of image {reference} cannot be read: {error}") from error
        finally:
            self.remove(made)

    def create(self, plan: ContainerPlan) -> str:
        """Make a container; its id.

        Raises:
            MissingError: The image is not here.
            ClusterError: The engine refuses it, in its words.
        """
        api = self._connect()
        with _translated():
            return str(api.create_container_from_config(plan.config, plan.name)["Id"])

    def attach(self, container_id: str) -> Iterator[bytes]:
        """What a container that was not started yet writes to stdout and stderr; ends with it."""
        return _pieces(self._attach(container_id))

    def attach_again(self, container_id: str) -> Iterator[bytes]:
        """What a container that was started writes from now on; ends with it, at once where it has ended.

        Raises:
            MissingError: Somebody has removed it.
            UnreachableError: The engine does not answer.
            ClusterError: It refuses, as Podman does for a paused one.
        """
        if not self.runs(container_id):
            return iter(())
        stream = self._attach(container_id)
        if self.runs(container_id):
            return _pieces(stream)
        # Podman prepares one that ended before it was attached to for another start, and its output would be
        # waited for until then.
        with contextlib.suppress(OSError):
            stream.close()
        return iter(())

    def start(self, container_id: str) -> None:
        """Start it.

        Raises:
            ClusterError: It cannot run, in the engine's words.
        """
        api = self._connect()
        with _translated():
            api.start(container_id)

    def wait(self, container_id: str) -> tuple[int | None, bool]:
        """Return when it has ended: its exit status, None if unknown, and whether it took too much memory.

        Raises:
            MissingError: Somebody has removed it.
            UnreachableError: The engine does not answer.
        """
        api = self._connect()
        with _translated():
            # Podman says -1 of one that has ended just now and whose status is not written down yet.
            for _ in range(_STATUS_TRIES):
                status = int(api.wait(container_id, timeout=None)["StatusCode"])
                if status >= 0:
                    break
                time.sleep(_STATUS_PAUSE_S)
            state = api.inspect_container(container_id)["State"]
        return status if status >= 0 else None, bool(state.get("OOMKilled"))

    def runs(self, container_id: str) -> bool:
        """Whether its main process lives; that of a paused one does.

        Raises:
            MissingError: Somebody has removed it.
            UnreachableError: The engine does not answer.
        """
        api = self._connect()
        with _translated():
            state = api.inspect_container(container_id)["State"]
        return bool(state.get("Running") or state.get("Paused"))

    def signal(self, container_id: str, name: str) -> None:
        """Signal its main process; harmless when it has ended or is gone.

        Raises:
            UnreachableError: The engine does not answer.
            ClusterError: It refuses, although the process lives.
        """
        api = self._connect()
        with contextlib.suppress(MissingError):
            try:
                with _translated():
                    api.kill(container_id, name)
            except _RefusedError:
                if self.runs(container_id):
                    raise

    def pause(self, container_id: str) -> None:
        """Stop all processes of a container in place, by the kernel's freezer.

        Raises:
            MissingError: Somebody has removed it.
            UnreachableError: The engine does not answer.
            ClusterError: It cannot, in its words; rootless engines need version 2 of cgroups.
        """
        api = self._connect()
        with _translated():
            api.pause(container_id)

    def unpause(self, container_id: str) -> None:
        """Let a paused container go on.

        Raises:
            MissingError: Somebody has removed it.
            UnreachableError: The engine does not answer.
            ClusterError: It is not paused, or cannot go on.
        """
        api = self._connect()
        with _translated():
            api.unpause(container_id)

    def remove(self, container: str) -> None:
        """End one if it runs, and remove it with its anonymous volumes; harmless when it is gone.

        Args:
            container: Its id or name.

        Raises:
            UnreachableError: The engine does not answer.
            ClusterError: It refuses.
        """
        api = self._connect()
        with contextlib.suppress(MissingError), _translated():
            api.remove_container(container, v=True, force=True)

    def containers(self, installation: str) -> dict[str, tuple[str, bool]]:
        """All containers of an installation: id → (worker id, whether it runs or is paused).

        Those that `read_file` makes have "" as their worker.

        Raises:
            UnreachableError: The engine does not answer.
            ClusterError: It cannot tell.
        """
        api = self._connect()
        with _translated():
            found = api.containers(all=True, filters={"label": f"{INSTALLATION_LABEL}={installation}"})
        return {
            str(each["Id"]): (str(each["Labels"].get(WORKER_LABEL, "")), each.get("State") in _LIVES)
            for each in found
        }

    def close(self) -> None:
        """Give its connections back; idempotent."""
        api, self._api = self._api, None
        if api is not None:
            api.close()

    def _attach(self, container_id: str) -> Any:
        api = self._connect()
        with _translated():
            return api.attach(container_id, stdout=True, stderr=True, stream=True, logs=False)

    def _connect(self) -> Any:
        with self._lock:
            if self._api is None:
                url = self._url or find_socket(os.environ)
                # Here, because it takes memory and a tenth of a second; most installations run no container.
                from docker import APIClient  # noqa: PLC0415

                with _translated():
                    self._api = APIClient(base_url=url, version="auto", timeout=self.timeout_s)
            return self._api


def find_socket(env: Mapping[str, str]) -> str:
    """Where a container engine listens: DOCKER_HOST, else a socket that exists.

    Args:
        env: The gateway's environment.

    Raises:
        NoEngineError: There is none, or DOCKER_HOST names one of another machine.
    """
    if named := env.get("DOCKER_HOST"):
        if not named.startswith("unix://"):
            raise NoEngineError(
                f"DOCKER_HOST is {named}, but workers run on this machine: unset it, name a socket"
                " (unix:///…), or set containers.url"
            )
        return named
    own = [Path(env["XDG_RUNTIME_DIR"], "podman", "podman.sock")] if env.get("XDG_RUNTIME_DIR") else []
    candidates = [*(Path(path) for path in SOCKETS), *own]
    found = next((path for path in candidates if os.access(path, os.R_OK | os.W_OK)), None)
    if found is None:
        raise NoEngineError(
            f"no container engine: none of {', '.join(map(str, candidates))} can be used; start Docker or"
            " `podman system service`, or set containers.url"
        )
    return f"unix://{found}"


class _RefusedError(ClusterError):
    """The engine will not do this now."""


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn the SDK's errors into ours."""
    from docker import errors  # noqa: PLC0415 - as above
    from requests.exceptions import RequestException  # noqa: PLC0415
    from urllib3.exceptions import HTTPError  # noqa: PLC0415

    try:
        yield
    except errors.NotFound as error:
        raise MissingError(_short(error.explanation or error)) from error
    except errors.APIError as error:
        raise _RefusedError(_short(error.explanation or error)) from error
    except (errors.DockerException, RequestException, HTTPError, OSError) as error:
        raise UnreachableError(f"the container engine does not answer: {_short(error)}") from error


def _first_file(data: bytes) -> bytes:
    """Content of an archive's first entry; ValueError for anything but a file. Docker follows no links."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        entry = archive.next()
        if entry is None or not entry.isfile():
            raise ValueError("it is no file" if entry is None or not entry.issym() else "it is a link")
        file = archive.extractfile(entry)
        assert file is not None, entry
        return file.read()


def _pieces(stream: Iterator[bytes]) -> Iterator[bytes]:
    with _translated():
        yield from stream


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _ERROR_CHARS_MAX else f"{text[: _ERROR_CHARS_MAX - 1]}…"
