"""A container engine of the tests' own: real Podman on a socket, with its own storage, and images made here.

There is no registry to fetch anything from, so a base image is packed from what this machine has: its Python
and the libraries that needs, and BusyBox for a shell. The storage lies in the cache, since packing and importing
takes longer than most tests; each image's tag holds the hash of what it was made from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import inspect
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = Path(__file__).with_name("images") / "engine"
LOCKS = [ROOT / "requirements" / f"{name}.lock" for name in ("base", "build", "worker")]
PROGRAMS = ("podman", "buildah", "runc", "busybox")
START_S = 60
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"

# One user's limits are the largest that containers can be given, and crun does not run everywhere runc does.
CONFIGURATION = """
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"

[containers]
netns = "host"
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
"""

_LEFT_OUT = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "idlelib",
    "tkinter",
    "turtledemo",
}


def require_podman() -> None:
    """Fail where these tests cannot run: what they check is checked nowhere else."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.fail(
            f"not installed: {', '.join(missing)} (Debian: apt-get install podman buildah runc busybox-static)"
        )
    if os.geteuid():
        pytest.fail("the tests of containers run Podman as root")


def cache() -> Path:
    """Where storage lies between runs."""
    base = os.environ.get("PILOTLIGHT_CACHE")
    if base is None:
        base = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pilotlight")
    return Path(base).expanduser().absolute() / "containers"


class Podman:
    """One engine: its service, its storage, and the images of the tests.

    Args:
        folder: Fresh; for the socket and the service's log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "podman.sock"
        self.url = f"unix://{self.socket}"
        self.storage = cache()
        self.storage.mkdir(parents=True, exist_ok=True)
        configuration = folder / "containers.conf"
        configuration.write_text(CONFIGURATION)
        self.registries = folder / "registries.conf"
        self.registries.write_text("")
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(configuration),
            "CONTAINERS_REGISTRIES_CONF": str(self.registries),
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> list[str]:
        """Where storage is."""
        # What is mounted must not be taken for mounted after a reboot, so this folder must not survive one.
        return ["--root", str(self.storage / "root"), "--runroot", "/run/pilotlight-tests"]

    def start(self) -> None:
        """Serve on the socket."""
        with (self.folder / "podman.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["podman", *self.options, "system", "service", "--time", "0", self.url],
                cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not self.socket.exists():
            assert self.process.poll() is None, (self.folder / "podman.log").read_text()
            assert time.monotonic() < deadline, "the service does not come up"
            time.sleep(0.02)

    def stop(self) -> None:
        """End the service; containers live on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.socket.unlink(missing_ok=True)

    def run(self, *arguments: str, program: str = "podman") -> str:
        """The output of a command of Podman or Buildah."""
        done = subprocess.run(
            [program, *self.options, *arguments], env=self.environment, capture_output=True, check=False
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout.decode()}\n{done.stderr.decode()}"
        return done.stdout.decode()

    def containers(self, label: str = "io.pilotlight.worker") -> list[str]:
        """Ids of all containers with a label, running or not."""
        return self.run("ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={label}").split()

    def volumes(self, container: str) -> set[str]:
        """Names of a container's volumes, anonymous ones as well."""
        return set(self.run("inspect", "--format", "{{range .Mounts}}{{.Name}} {{end}}", container).split())

    def has_volume(self, name: str) -> bool:
        """Whether a volume is here."""
        return self._exists("volume", name)

    def has(self, image: str) -> bool:
        """Whether an image is here."""
        return self._exists("image", image)

    def _exists(self, kind: str, name: str) -> bool:
        command = ["podman", *self.options, kind, "exists", name]
        return subprocess.run(command, env=self.environment, check=False).returncode == 0

    # Images.

    def image(self, name: str, parts: Sequence[bytes], make: Callable[[str], None]) -> str:
        """The reference of an image, made now if it is missing; then older ones of its name go.

        Args:
            name: Of the image.
            parts: What it is made from; another content is another image.
            make: Makes it under the reference that it is given.
        """
        tag = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        reference = f"localhost/pilotlight-{name}:{tag}"
        if self.has(reference):
            return reference
        # One lock for all, because images share layers, which go with the last image that has them.
        with (self.storage / "making.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.has(reference):
                make(reference)
                self._remove_older(reference)
        return reference

    def _remove_older(self, reference: str) -> None:
        name = reference.rpartition(":")[0]
        listed = self.run("images", "--filter", f"reference={name}", "--format", "{{.Repository}}:{{.Tag}}")
        for each in set(listed.split()) - {reference}:
            # One that a container uses stays, until the next time.
            command = ["podman", *self.options, "rmi", each]
            subprocess.run(command, env=self.environment, capture_output=True, check=False)

    def base(self) -> str:
        """A machine with this Python and a shell, and the unmodified `runpod` package."""
        closure = sorted(f"{name}=={importlib.metadata.version(name)}" for name in closure_of("runpod"))
        packed = "".join(map(inspect.getsource, (pack_base, libraries_of, _keep)))
        parts = [packed.encode(), sys.version.encode(), *(each.encode() for each in closure)]

        def make(reference: str) -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "base.tar"
                pack_base(path, closure_of("runpod"))
                self.run("import", "--change", "ENV PATH=/usr/local/bin:/usr/bin:/bin", str(path), reference)

        return self.image("base", parts, make)

    def engine_base(self) -> str:
        """A base for the images of `containers/`: wheels for their locks, and a stand-in for vLLM."""
        base = self.base()
        stand_in = {path: path.read_bytes() for path in sorted(STAND_IN.rglob("*.py"))}
        parts = [base.encode(), *(lock.read_bytes() for lock in LOCKS), *stand_in.values()]

        def make(reference: str) -> None:
            with tempfile.TemporaryDirectory() as folder:
                for lock in LOCKS:
                    subprocess.run(
                        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                         "--no-deps", "--only-binary=:all:", "--require-hashes", "-r", lock, "-d", f"{folder}/wheels"],
                        check=True,
                    )  # fmt: skip
                shutil.copytree(STAND_IN, Path(folder, "vllm"), ignore=shutil.ignore_patterns("__pycache__"))
                text = f"FROM {base}\nCOPY wheels /wheels\nCOPY vllm /usr/local/lib/{PYTHON}/site-packages/\n"
                Path(folder, "Containerfile").write_text(text)
                self.build_folder(reference, Path(folder), Path(folder, "Containerfile"))

        return self.image("engine-base", parts, make)

    def project_image(self, name: str, *, called: str = "", **arguments: str) -> str:
        """The image of `containers/<name>` on the base of the tests.

        Args:
            name: worker or gateway.
            called: Its own name, where there are several of them with different arguments.
            arguments: Build arguments; `HF_TOKEN` is the secret of that name instead.
        """
        base = self.engine_base()
        repository, tag = base.rsplit(":", 1)
        containerfile = ROOT / "containers" / name / "Containerfile"
        sources = [containerfile, *sorted(path for path in (ROOT / "src").rglob("*") if path.is_file())]
        parts = [
            base.encode(),
            *(
                each
                for path in sources
                if "__pycache__" not in path.parts
                for each in (str(path).encode(), path.read_bytes())
            ),
        ]
        parts += [f"{key}={value}".encode() for key, value in sorted(arguments.items())]
        token = arguments.pop("HF_TOKEN", None)
        given = {"BASE_IMAGE": repository, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        given |= {"VLLM_VERSION" if name == "worker" else "BASE_TAG": tag} | arguments

        def make(reference: str) -> None:
            with tempfile.NamedTemporaryFile("w") as secret:
                secret.write(token or "")
                secret.flush()
                options = (
                    ["--layers"]
                    if token is None
                    else ["--layers", "--secret", f"id=HF_TOKEN,src={secret.name}"]
                )
                self.build_folder(reference, ROOT, containerfile, *options, **given)

        return self.image(called or name, parts, make)

    def build(self, name: str, containerfile: str, files: Mapping[str, str | Path], **arguments: str) -> str:
        """An image built by Buildah from a Containerfile and the files of its context.

        Args:
            name: Of the image.
            containerfile: Its text.
            files: Name in the context → text, or the file it is a copy of.
            arguments: Build arguments.
        """
        content = {
            path: given.read_bytes() if isinstance(given, Path) else given.encode()
            for path, given in files.items()
        }
        parts = [containerfile.encode()]
        parts += [part for path, data in sorted(content.items()) for part in (path.encode(), data)]
        parts += [f"{key}={value}".encode() for key, value in sorted(arguments.items())]

        def make(reference: str) -> None:
            with tempfile.TemporaryDirectory() as folder:
                for path, data in content.items():
                    Path(folder, path).write_bytes(data)
                    Path(folder, path).chmod(0o755)
                Path(folder, "Containerfile").write_text(containerfile)
                self.build_folder(reference, Path(folder), Path(folder, "Containerfile"), **arguments)

        return self.image(name, parts, make)

    def build_folder(
        self, reference: str, context: Path, containerfile: Path, *options: str, **arguments: str
    ) -> None:
        """Build an image as `buildah build` does it."""
        given = [item for key, value in arguments.items() for item in ("--build-arg", f"{key}={value}")]
        self.run(
            "build", "--quiet", "--format", "docker", "--network", "host", "--pull-never",
            "--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096",
            *options, *given, "--tag", reference, "--file", str(containerfile), str(context),
            program="buildah",
        )  # fmt: skip


@contextlib.contextmanager
def running_podman() -> Iterator[Podman]:
    """An engine that serves; what its containers left is removed at the end."""
    require_podman()
    # Not in the folder of the tests: the path of a socket has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="pl-podman-") as folder:
        podman = Podman(Path(folder))
        podman.start()
        try:
            yield podman
        finally:
            podman.stop()


def closure_of(name: str) -> set[str]:
    """A distribution of this environment and all that it requires."""
    found: set[str] = set()
    todo = [name]
    while todo:
        each = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if each in found:
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for text in importlib.metadata.requires(each) or ():
                requirement = Requirement(text)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    todo.append(requirement.name)
                todo += [
                    Requirement(more).name
                    for extra in requirement.extras
                    for more in importlib.metadata.requires(requirement.name) or ()
                    if (marker := Requirement(more).marker) is not None and marker.evaluate({"extra": extra})
                ]
            importlib.metadata.version(each)
            found.add(each)
    return found


def pack_base(path: Path, distributions: set[str]) -> None:
    """Write the root of a small machine: this Python, the packages, the libraries of both, and BusyBox."""
    home = f"usr/local/lib/{PYTHON}"
    with tarfile.open(path, "w") as archive:
        executable = Path(os.path.realpath(sys.executable))
        archive.add(executable, f"usr/local/bin/{PYTHON}", filter=_keep)
        for link in ("python", "python3"):
            _link(archive, f"usr/local/bin/{link}", PYTHON)
        stdlib = Path(sysconfig.get_path("stdlib"))
        archive.add(stdlib, home, filter=_keep)
        binaries = [executable, *stdlib.glob("lib-dynload/*.so")]
        for name in sorted(distributions):
            for file in importlib.metadata.files(name) or ():
                source = Path(str(file.locate()))
                if ".." not in file.parts and source.is_file() and "__pycache__" not in file.parts:
                    archive.add(source, f"{home}/site-packages/{file}", filter=_owned)
                    binaries += [source] if ".so" in source.suffixes else []
        # Debian's Python keeps elsewhere what makes virtual environments.
        if Path("/usr/share/python-wheels").is_dir():
            archive.add("/usr/share/python-wheels", "usr/share/python-wheels", filter=_owned)
        for name, source in sorted(libraries_of(binaries).items()):
            archive.add(os.path.realpath(source), name, filter=_owned)
        busybox = shutil.which("busybox")
        assert busybox is not None
        archive.add(os.path.realpath(busybox), "bin/busybox", filter=_owned)
        for applet in subprocess.run(
            [busybox, "--list"], capture_output=True, text=True, check=True
        ).stdout.split():
            # Its setpriv is not the one of util-linux, which an engine's image has.
            if applet not in {"busybox", "setpriv"}:
                _link(archive, f"bin/{applet}", "busybox")
        for name in ("tmp", "var/tmp", "root", "etc", "run"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name.endswith("tmp") else 0o755
            archive.addfile(entry)
        for name, text in (("passwd", "root:x:0:0::/root:/bin/sh\n"), ("group", "root:x:0:\n")):
            entry = tarfile.TarInfo(f"etc/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))


def libraries_of(binaries: Sequence[Path]) -> dict[str, str]:
    """The shared libraries that programs load: where they go in the image → where they are here."""
    found: dict[str, str] = {}
    text = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False).stdout
    for name, path, loader in re.findall(r"(\S+) => (/\S+)|^\s+(/\S*ld-linux\S+)", text, re.MULTILINE):
        # What comes with a package is found beside it.
        if loader:
            found[loader.lstrip("/")] = loader
        elif "site-packages" not in path:
            found[f"usr/lib/{name}"] = path
    return found


def _keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    parts = entry.name.split("/")
    if _LEFT_OUT & set(parts) or any(part.startswith("config-3") for part in parts):
        return None
    return _owned(entry)


def _owned(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def _link(archive: tarfile.TarFile, name: str, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    archive.addfile(entry)
