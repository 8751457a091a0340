"""Builds the engine's own virtual environment: `python -m pilotlight.engines.install`, or this file alone.

The gateway never shares vLLM's pins (docs/decisions/0003-engine-environment.md), so vLLM lives in an
environment of its own. The environment is made in a cache folder under a name that is the hash of everything
it is made from, and the place where Pilotlight looks (`.venv-engine` of a checkout) is a link to it: a second
checkout, or the same one after `make clean`, is ready at once. The order of work:

    1. decide: CPU or CUDA, from the devices of this machine   (`decide_engine`, pure)
    2. look: is the environment there, whole and linked?       (`plan_steps`, pure)
    3. under a lock: download, install, verify, probe, stamp, link   (`Installer`)

An interrupted run leaves its downloads and no stamp; the next one keeps the downloads and builds the rest
anew. Standard library only: this runs before anything is installed.
"""

# The path is put right before anything else is imported: as a plain script this folder would be searched
# first, and its modules would hide the standard library's of the same name.
import sys

if not __package__:
    sys.path[0] = __file__.rsplit("/", maxsplit=1)[0] + "/../.."

import argparse
import enum
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from pilotlight.engines.environments import (
    CommandError,
    Reporter,
    SetupError,
    content_key,
    create_environment,
    exclusive,
    is_environment,
    lock_entries,
    read_json,
    remove_tree,
    run_pip,
    run_streaming,
    site_packages,
    write_atomically,
)
from pilotlight.engines.manifest import MANIFEST_NAME, EngineManifest, load_manifest
from pilotlight.errors import EngineEnvironmentError

RECIPE = 1
"""Counted up when the same locks are to be installed in another way; makes existing environments stale."""

STAMP_NAME = "pilotlight-installed.json"
"""Written into an environment when, and only when, it is complete."""

LOCKS = Path(__file__).with_name("locks")
PROBE = Path(__file__).with_name("probe.py")

TORCH_INDEX_VARIABLE = "PILOTLIGHT_TORCH_INDEX_URL"
TORCH_INDEX_PUBLIC = "https://download.pytorch.org/whl/cpu"

EngineKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one kind of engine is installed.

    Attributes:
        kind: What torch is built for.
        locks: In the order of installation; the first one of the CPU engine holds torch alone.
        disk_bytes: Free disk that the installation needs, measured generously.
        duration: How long it takes, for a person.
    """

    kind: EngineKind
    locks: tuple[str, ...]
    disk_bytes: int
    duration: str


RECIPES: dict[EngineKind, Recipe] = {
    "cpu": Recipe(
        "cpu",
        ("torch-cpu.lock", "engine-cpu.lock"),
        3_500_000_000,
        "about 2 minutes and a download of 0.6 GB",
    ),
    "cuda": Recipe("cuda", ("engine-cuda.lock",), 12_000_000_000, "about 10 minutes and a download of 5 GB"),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What the decision is made from.

    Attributes:
        system: `sys.platform`.
        architecture: `platform.machine()`.
        python: Version of the Python that runs us, as (major, minor).
        cpu_flags: Flags of the first processor; empty where the kernel does not say.
        nvidia_devices: Device nodes of NVIDIA GPUs that can be opened from here.
        nvidia_listed: GPUs that `nvidia-smi -L` lists.
        nvidia_driver: Whether the kernel has NVIDIA's driver loaded.
    """

    system: str
    architecture: str
    python: tuple[int, int]
    cpu_flags: frozenset[str]
    nvidia_devices: tuple[str, ...]
    nvidia_listed: tuple[str, ...]
    nvidia_driver: bool


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Which engine to install, and why."""

    recipe: Recipe
    reason: str


def look_at_machine() -> Machine:
    """The facts of this machine; costs a millisecond, or one `nvidia-smi -L` where only that can tell."""
    devices = tuple(sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*")))
    listed: tuple[str, ...] = ()
    if not devices and (command := shutil.which("nvidia-smi")):
        try:
            answer = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20, check=False)
            listed = tuple(line.strip() for line in answer.stdout.splitlines() if line.startswith("GPU "))
        except (OSError, subprocess.TimeoutExpired):
            listed = ()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return Machine(
        system=sys.platform,
        architecture=platform.machine(),
        python=sys.version_info[:2],
        cpu_flags=frozenset(flags[1].split() if flags else ()),
        nvidia_devices=devices,
        nvidia_listed=listed,
        nvidia_driver=Path("/proc/driver/nvidia/version").exists(),
    )


def decide_engine(machine: Machine, requested: Literal["cpu", "cuda", "auto"]) -> EngineChoice:
    """The engine for this machine.

    1. A machine that vLLM has no build for is refused.
    2. A request for one kind is obeyed.
    3. A GPU that can be opened from here decides for CUDA, everything else for the CPU. A loaded driver
    without
       devices is a container that was not given the GPU: vLLM for CUDA would not start in it.

    Raises:
        SetupError: No engine can run here; the message says what would.
    """
    if machine.system != "linux" or machine.architecture not in {"x86_64", "aarch64"}:
        msg = (
            f"vLLM has no build for {machine.system} on {machine.architecture}: "
            "Pilotlight's engine needs Linux on x86_64 or aarch64"
        )
        raise SetupError(msg)
    if machine.python < (3, 11):
        msg = f"Python {machine.python[0]}.{machine.python[1]} is too old: Python 3.11 or newer is needed"
        raise SetupError(msg)
    gpus = machine.nvidia_listed or machine.nvidia_devices
    if requested == "cuda" or (requested == "auto" and gpus):
        found = (
            f"{len(gpus)} NVIDIA GPU{'s' if len(gpus) != 1 else ''} found" if gpus else "no NVIDIA GPU found"
        )
        return EngineChoice(RECIPES["cuda"], found if requested == "auto" else f"asked for; {found}")
    if machine.architecture == "x86_64" and machine.cpu_flags and "avx2" not in machine.cpu_flags:
        msg = "vLLM for CPUs needs a processor with AVX2, and this one has none"
        raise SetupError(msg)
    if requested == "cpu":
        return EngineChoice(RECIPES["cpu"], "asked for")
    if machine.nvidia_driver:
        return EngineChoice(
            RECIPES["cpu"],
            "NVIDIA's driver is loaded, but no GPU can be opened from here (a container without GPUs?)",
        )
    return EngineChoice(RECIPES["cpu"], "no NVIDIA GPU found")


class Step(enum.Enum):
    """One step of an installation, in the order of work."""

    BUILD = "build the environment"
    PROBE = "ask the engine what it understands"
    LINK = "link it"


@dataclass(frozen=True, slots=True)
class Standing:
    """What is there already.

    Attributes:
        complete: The environment has the stamp of exactly this recipe and a Python that can run.
        described: It has a manifest of the vLLM that is installed.
        linked: The place where Pilotlight looks leads to it.
    """

    complete: bool
    described: bool
    linked: bool


def plan_steps(standing: Standing) -> tuple[Step, ...]:
    """What is left to do; nothing for an environment that is complete, described and linked."""
    if not standing.complete:
        return (Step.BUILD, Step.PROBE, Step.LINK)
    return tuple(
        step for step, done in ((Step.PROBE, standing.described), (Step.LINK, standing.linked)) if not done
    )


def torch_sources(override: str | None) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Where to look for the CPU build of torch, in order: (name for a person, arguments of pip).

    The version asked for ends in `+cpu`, which no CUDA build can satisfy, so an index without the build is
    found out without a download.

    Args:
        override: An index that was set by hand; then it is the only one.
    """
    if override:
        return ((f"the index in {TORCH_INDEX_VARIABLE}", ("--index-url", override)),)
    return (
        ("pip's configured index", ()),
        (TORCH_INDEX_PUBLIC, ("--index-url", TORCH_INDEX_PUBLIC)),
    )


def cache_folder() -> Path:
    """The folder for what can be built again: `PILOTLIGHT_CACHE`, else one in the user's cache folder."""
    if chosen := os.environ.get("PILOTLIGHT_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pilotlight"


def default_engine_home(prefix: Path) -> Path:
    """Where the engine of a Pilotlight that is installed under this prefix is found.

    Args:
        prefix: `sys.prefix` of the Python that runs Pilotlight.

    Returns:
        `.venv-engine` beside that environment if it exists, or of the checkout that this file belongs to;
        else a folder in the user's data folder. It need not exist yet.
    """
    sibling = prefix.parent / ".venv-engine"
    if sibling.is_dir():
        return sibling
    if (checkout := _checkout()) is not None:
        return checkout / ".venv-engine"
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "pilotlight" / "engines" / "vllm"


def _checkout() -> Path | None:
    root = Path(__file__).resolve().parents[3]
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return None
    return root if project.get("name") == "pilotlight" else None


def environment_key(recipe: Recipe, locks: Path = LOCKS) -> str:
    """The hash of everything that makes an environment what it is: locks, recipe, Python, machine."""
    return content_key(
        f"{RECIPE} {recipe.kind}",
        f"{platform.python_implementation()} {sys.version_info[:2]} {platform.machine()}",
        *((locks / name).read_bytes() for name in recipe.locks),
    )


@dataclass(frozen=True, slots=True)
class Installer:
    """Brings one engine environment into being, and a link to it.

    Attributes:
        recipe: What to install.
        link: Where Pilotlight looks.
        cache: Folder of all environments; `engines/<kind>-<hash>` within is ours.
        reporter: Told of every step.
        key: See `environment_key`.
        locks: Folder of the lock files.
    """

    recipe: Recipe
    link: Path
    cache: Path
    reporter: Reporter
    key: str
    locks: Path = LOCKS

    @property
    def home(self) -> Path:
        """The environment's real place."""
        return self.cache / "engines" / f"{self.recipe.kind}-{self.key[:16]}"

    @property
    def log(self) -> Path:
        """The whole output of all commands of all attempts."""
        return self.home.with_name(f"{self.home.name}.log")

    @property
    def wheels(self) -> Path:
        """Downloads of an installation under way; they outlive an interruption."""
        return self.home.with_name(f"{self.home.name}.wheels")

    def look(self) -> Standing:
        """What is there; reads three small files."""
        complete = is_environment(self.home) and read_json(self.home / STAMP_NAME).get("key") == self.key
        return Standing(
            complete=complete,
            described=complete and self._manifest() is not None,
            linked=self.link.is_symlink() and self.link.resolve() == self.home.resolve(),
        )

    def _manifest(self) -> EngineManifest | None:
        try:
            return load_manifest(self.home)
        except EngineEnvironmentError:
            return None

    def install(self) -> tuple[Step, ...]:
        """Do what is left to do and return it; several at once wait for each other and share the result.

        Raises:
            SetupError: It did not work; the message says what to do. A later call goes on from the downloads.
        """
        if not plan_steps(self.look()):
            return ()
        with exclusive(self.home.with_name(f"{self.home.name}.lock"), self.reporter):
            steps = plan_steps(self.look())
            if Step.BUILD in steps:
                self._check_disk()
                try:
                    self._build()
                except CommandError as error:
                    msg = (
                        f"{error}\nFull output: {self.log}\n"
                        "Mend the cause and run the same command again; the downloads are kept"
                    )
                    raise SetupError(msg) from error
            if Step.PROBE in steps:
                self._probe()
            if Step.BUILD in steps:
                # Last: an environment without a stamp is built anew.
                if environment_key(self.recipe, self.locks) != self.key:
                    msg = "the locks changed while they were being installed: run the same command again"
                    raise SetupError(msg)
                write_atomically(
                    self.home / STAMP_NAME, json.dumps({"key": self.key, "engine": self.recipe.kind})
                )
                shutil.rmtree(self.wheels, ignore_errors=True)
            if Step.LINK in steps:
                self._link()
        return steps

    def _check_disk(self) -> None:
        folder = next(path for path in (self.home, *self.home.parents) if path.exists())
        free = shutil.disk_usage(folder).free
        if free < self.recipe.disk_bytes:
            msg = (
                f"the {self.recipe.kind} engine needs {self.recipe.disk_bytes / 1e9:.1f} GB of disk, "
                f"and {folder} has {free / 1e9:.1f} GB left: "
                "make room, or set PILOTLIGHT_CACHE to a folder on a larger disk"
            )
            raise SetupError(msg)

    def _build(self) -> None:
        create_environment(self.home, reporter=self.reporter, log=self._open_log())
        self.wheels.mkdir(exist_ok=True)
        if self.recipe.kind == "cpu":
            self._download_torch()
        for name in self.recipe.locks:
            if name != "torch-cpu.lock":
                self._download(name, ())
        for name in self.recipe.locks:
            self._install(name)
            if self.recipe.kind == "cpu":
                self._verify_torch()

    def _open_log(self) -> Path:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("", encoding="utf-8")
        return self.log

    def _download_torch(self) -> None:
        failures: list[str] = []
        for source, arguments in torch_sources(os.environ.get(TORCH_INDEX_VARIABLE)):
            try:
                self._download("torch-cpu.lock", arguments, source)
            except CommandError as error:
                failures.append(f"{source}: {error}")
            else:
                return
        msg = (
            f"no CPU build of torch found; set {TORCH_INDEX_VARIABLE} to an index that has it. Tried\n  "
            + "\n  ".join(failures)
            + f"\nFull output: {self.log}"
        )
        raise SetupError(msg)

    def _download(self, lock: str, arguments: Sequence[str], source: str = "pip's configured index") -> None:
        self.reporter.line(f"downloading {lock} ({lock_entries(self.locks / lock)} packages) from {source}")
        self._pip("download", lock, ("--dest", self.wheels, *arguments))

    def _install(self, lock: str) -> None:
        self.reporter.line(f"installing {lock}")
        # Modules are compiled when they are first imported, by the probe or a first start: compiling the many
        # that nothing ever imports would take longer than all the rest of this step.
        self._pip("install", lock, ("--no-index", "--find-links", self.wheels, "--no-compile"))

    def _pip(self, command: str, lock: str, arguments: Sequence[str | Path]) -> None:
        path = self.locks / lock
        strictly = ("--require-hashes", "--no-deps", "--only-binary=:all:", "-r", path)
        run_pip(
            self.home,
            (command, *strictly, *arguments),
            total=lock_entries(path),
            verb=f"{command}ing",
            reporter=self.reporter,
            log=self.log,
        )

    def _verify_torch(self) -> None:
        """Stop before vLLM lands beside a CUDA build: it would import, and break much later.

        `torch.__version__` is read from the file that defines it, for torch cannot be imported without its
        own requirements, which are not installed yet.
        """
        text = (site_packages(self.home) / "torch" / "version.py").read_text(encoding="utf-8")
        found = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
        version = found[1] if found else "unknown"
        if not version.endswith("+cpu"):
            msg = f"torch {version} is no CPU build (it does not end in +cpu); set {TORCH_INDEX_VARIABLE}"
            raise SetupError(msg)

    def _probe(self) -> None:
        self.reporter.line("asking vLLM what it understands (imports it once, about 15 s)")
        try:
            run_streaming(
                [self.home / "bin" / "python", "-I", PROBE, "--output", self.home / MANIFEST_NAME],
                reporter=self.reporter,
                log=self.log,
                doing="importing vLLM",
            )
            manifest = load_manifest(self.home)
        except (CommandError, EngineEnvironmentError) as error:
            msg = f"the installed vLLM does not work: {error}\nFull output: {self.log}"
            raise SetupError(msg) from error
        if manifest.platform != self.recipe.kind:
            built = f"torch {manifest.torch_version} was built for {manifest.platform}"
            msg = f"{built}, not for {self.recipe.kind}"
            raise SetupError(msg)

    def _link(self) -> None:
        """Let the link lead to the environment; a real environment at its place is replaced."""
        if self.link.exists() and not self.link.is_symlink() and not (self.link / "pyvenv.cfg").is_file():
            msg = f"{self.link} exists and is no virtual environment: move it away, or name another (--into)"
            raise SetupError(msg)
        self.link.parent.mkdir(parents=True, exist_ok=True)
        aside = self.link.with_name(f"{self.link.name}.replaced-{os.getpid()}")
        fresh = self.link.with_name(f"{self.link.name}.linking-{os.getpid()}")
        fresh.symlink_to(self.home, target_is_directory=True)
        if self.link.is_dir() and not self.link.is_symlink():
            # First out of the way and then removed: programs that run from it find the new one at once.
            self.reporter.line(f"replacing the environment at {self.link}")
            self.link.rename(aside)
        fresh.replace(self.link)
        remove_tree(aside)


def describe_plan(choice: EngineChoice, installer: Installer, steps: tuple[Step, ...]) -> str:
    """What is about to happen about the engine, in one line for a person."""
    recipe = choice.recipe
    name = {"cpu": "vLLM for CPUs", "cuda": "vLLM for NVIDIA GPUs"}[recipe.kind]
    if Step.BUILD in steps:
        return (
            f"engine: {choice.reason}, so {name} goes into {installer.home} "
            f"(needs {recipe.disk_bytes / 1e9:.1f} GB of disk, {recipe.duration})"
        )
    if steps:
        return (
            f"engine: {choice.reason}, {name} is installed; left to do: {', '.join(s.value for s in steps)}"
        )
    return f"engine: {name} is ready at {installer.link}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Install the engine, or with `--check` say whether it is there; returns 0, or 1 (failed, not there)."""
    parser = argparse.ArgumentParser(
        prog="python -m pilotlight.engines.install",
        description="Install vLLM into a virtual environment of its own. Running it again costs nothing.",
    )
    parser.add_argument(
        "--into", type=Path, help="where Pilotlight is to find it; becomes a link into the cache"
    )
    parser.add_argument("--engine", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if there is work left"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = parser.parse_args(arguments)
    reporter = Reporter()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        choice = decide_engine(look_at_machine(), options.engine)
        link = (options.into or default_engine_home(Path(sys.prefix))).expanduser().absolute()
        installer = Installer(choice.recipe, link, cache_folder(), reporter, environment_key(choice.recipe))
        steps = plan_steps(installer.look())
        if steps or not options.json:
            reporter.line(describe_plan(choice, installer, steps))
        if not options.check:
            installer.install()
            if steps:
                reporter.line(f"engine: ready at {link}")
    except (SetupError, EngineEnvironmentError, OSError) as error:
        reporter.line(f"engine: {error}")
        return 1
    except KeyboardInterrupt:
        reporter.line("engine: interrupted; run the same command again, it goes on from the downloads")
        return 130
    ready = not options.check or not steps
    if options.json:
        _print_result(installer, choice, steps, ready=ready)
    return 0 if ready else 1


def _print_result(installer: Installer, choice: EngineChoice, steps: Sequence[Step], *, ready: bool) -> None:
    manifest = load_manifest(installer.home) if ready else None
    result = {
        "status": "ready" if ready else "incomplete",
        "engine": choice.recipe.kind,
        "reason": choice.reason,
        "home": str(installer.link),
        "environment": str(installer.home),
        "steps": [step.name.lower() for step in steps],
        "vllm": manifest.version if manifest else None,
        "torch": manifest.torch_version if manifest else None,
        "seconds": round(installer.reporter.elapsed_s, 3),
    }
    sys.stdout.write(json.dumps(result) + "\n")


def _interrupt(_number: int, _frame: object) -> NoReturn:
    """Treat SIGTERM as Ctrl-C: the child is ended and nothing half-done gets a stamp."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
