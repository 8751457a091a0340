"""`pilotlight doctor`: what is right and wrong on this machine, and what to do about it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
import typer

from pilotlight.cli.output import JsonOption, print_json, print_table, size, write
from pilotlight.client import GatewayUnreachableError, PilotlightClient, find_access
from pilotlight.client.discovery import KEY_FILE, SERVER_FILE
from pilotlight.core.launchers import explain_no_room
from pilotlight.descriptors import ADVICE, attainable_descriptor_limit
from pilotlight.engines.install import look_at_machine
from pilotlight.engines.manifest import load_manifest
from pilotlight.errors import PilotlightError
from pilotlight.huge_pages import why_no_huge_pages
from pilotlight.settings import Settings, load_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

DISK_WARN_BYTES = 5_000_000_000
"""A model of a few billion parameters would not fit any more."""
DISK_FAIL_BYTES = 500_000_000
"""The store and the logs of workers may fail to be written."""

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Attributes:
        name: What it is.
        status: `fail` stops Pilotlight from serving, `warn` may matter.
        detail: What was found.
        advice: What to do; "" where all is well.
    """

    name: str
    status: Verdict
    detail: str
    advice: str = ""


def doctor_command(as_json: JsonOption = False) -> None:
    """Check this machine and say what to mend.

    Looks at settings, data folder, gateway, engine, launchers, GPUs, memory, disk, open files and huge pages.
    Exit code 1 if something keeps Pilotlight from serving here; warnings alone end with 0.

    Examples:
      pilotlight doctor
      pilotlight doctor --json
    """
    checks = run_checks()
    healthy = all(check.status != "fail" for check in checks)
    if as_json:
        print_json({"ok": healthy, "checks": [asdict(check) for check in checks]})
    else:
        print_table(["CHECK", "", "FOUND"], [[check.name, check.status, check.detail] for check in checks])
        todo = [check for check in checks if check.advice]
        if todo:
            write("\nWhat to do:\n")
        for check in todo:
            write(f"  {check.name}: {check.advice}\n")
    if not healthy:
        raise typer.Exit(1)


def run_checks() -> list[Check]:
    """Every check, in the order in which things are needed."""
    try:
        settings = load_settings()
    except PilotlightError as error:
        advice = "correct the setting in the environment or in pilotlight.toml"
        return [Check("settings", "fail", str(error), advice)]
    checks: list[Callable[[Settings], Check]] = [
        check_data_folder,
        check_gateway,
        check_engine,
        check_launchers,
        check_gpus,
        check_memory,
        check_disk,
        check_descriptors,
        check_huge_pages,
    ]
    return [Check("settings", "ok", "valid"), *(check(settings) for check in checks)]


def check_data_folder(settings: Settings) -> Check:
    """Whether the data folder can be used, and only by its owner."""
    name, home = "data folder", settings.home
    existing = _existing(home)
    if home.exists() and not home.is_dir():
        return Check(name, "fail", f"{home} is not a folder", "move it away, or set PILOTLIGHT_HOME")
    if not os.access(existing, os.W_OK | os.X_OK):
        advice = "change its owner or mode, or set PILOTLIGHT_HOME to a folder of yours"
        return Check(name, "fail", f"{existing} is not writable", advice)
    if existing != home:
        return Check(name, "ok", f"{home} will be created at the first start")
    open_paths = [str(path) for path in _private(home) if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if open_paths:
        return Check(
            name, "warn", f"others may read {', '.join(open_paths)}", f"chmod go-rwx {' '.join(open_paths)}"
        )
    return Check(name, "ok", str(home))


def check_gateway(settings: Settings) -> Check:
    """Whether a gateway answers where commands will look for one, and takes our key."""
    name = "gateway"
    try:
        access = find_access(settings.home)
        with PilotlightClient.of(access) as client:
            status = client.status()
    except GatewayUnreachableError as error:
        return Check(name, "warn", str(error).split(";")[0], "start one with `pilotlight up`")
    except PilotlightError as error:
        advice = (
            "check PILOTLIGHT_URL and PILOTLIGHT_API_KEY, or start another one with `pilotlight up --port`"
        )
        return Check(name, "fail", str(error), advice)
    endpoints, workers = status.get("endpoints", 0), status.get("workers", 0)
    text = f"version {status.get('version')} at {access.url}: {endpoints} endpoints, {workers} workers"
    return Check(name, "ok", text)


def check_engine(settings: Settings) -> Check:
    """Whether the engine's environment is there and described."""
    name = "engine"
    if settings.engine.command:
        return Check(name, "ok", f"replaced by {settings.engine.command[0]}")
    try:
        manifest = load_manifest(settings.engine_home)
    except PilotlightError as error:
        return Check(name, "fail", str(error), "run `make setup`, or the command above")
    return Check(
        name, "ok", f"vLLM {manifest.version}, torch {manifest.torch_version}, {settings.engine_home}"
    )


def check_launchers(settings: Settings) -> Check:
    """Whether engines can be forked instead of importing for themselves; asks a gateway that runs."""
    name = "launchers"
    if not settings.launchers.enabled:
        return Check(name, "ok", "none: launchers.enabled is false")
    if settings.engine.command:
        return Check(name, "ok", "none: engine.command replaces the engine")
    try:
        with PilotlightClient.of(find_access(settings.home)) as client:
            launchers = client.launchers()
    except PilotlightError:
        return _check_room(settings)
    if not launchers:
        return Check(name, "ok", "none: no endpoint can use one")
    text = "; ".join(
        f"{one['fingerprint']} (vLLM {one['engine_version']}): {one['state']}, {one['launches']} launches"
        + (f", {one['problem']}" if one["problem"] else "")
        for one in launchers
    )
    failed = [one["log"] for one in launchers if one["state"] == "failed"]
    if not failed:
        return Check(name, "ok", text)
    logs = ", ".join(str(settings.home / "logs" / f"{log}.log") for log in failed)
    advice = f"starts take longer meanwhile; free memory if that is the reason, else read {logs}"
    return Check(name, "warn", text, advice)


def _check_room(settings: Settings) -> Check:
    """Whether there is memory for one now."""
    workers = settings.workers
    problem = explain_no_room(
        psutil.virtual_memory().available,
        reserve_bytes=workers.memory_reserve_bytes,
        worker_bytes=workers.memory_default_bytes,
    )
    if problem:
        return Check("launchers", "warn", problem, "end other programs, or live with slower starts")
    return Check("launchers", "ok", "they start with the gateway")


def check_gpus(settings: Settings) -> Check:
    """Which GPUs there are, and whether the engine can use them."""
    name = "GPUs"
    machine = look_at_machine()
    gpus = machine.nvidia_listed or machine.nvidia_devices
    if not gpus:
        if machine.nvidia_driver:
            advice = "start this container with its GPUs, if it should have them"
            return Check(name, "warn", "a driver is loaded, but no GPU can be opened", advice)
        return Check(name, "ok", "none; models run on the CPU")
    try:
        platform = load_manifest(settings.engine_home).platform
    except PilotlightError:
        platform = None
    if platform == "cpu":
        advice = "install vLLM for CUDA: python -m pilotlight.engines.install --engine cuda"
        return Check(name, "warn", f"{len(gpus)}, but the engine is built for CPUs", advice)
    return Check(name, "ok", f"{len(gpus)}: {', '.join(gpus)}")


def check_memory(settings: Settings) -> Check:
    """Whether one worker of unknown size would fit into memory now."""
    memory = psutil.virtual_memory()
    needed = settings.workers.memory_default_bytes + settings.workers.memory_reserve_bytes
    text = f"{size(memory.available)} of {size(memory.total)} free"
    if memory.available < needed:
        advice = f"one worker may need {size(needed)}: end other programs, or deploy a smaller model"
        return Check("memory", "warn", text, advice)
    return Check("memory", "ok", text)


def check_disk(settings: Settings) -> Check:
    """Whether there is room for the store, logs and weights."""
    place = _existing(settings.home)
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check("disk", "fail", f"cannot look at {place}: {error}", "check that the disk is mounted")
    text = f"{size(free)} free at {place}"
    if free < DISK_FAIL_BYTES:
        return Check("disk", "fail", text, f"free at least {size(DISK_FAIL_BYTES)}, or move PILOTLIGHT_HOME")
    if free < DISK_WARN_BYTES:
        return Check("disk", "warn", text, "larger models will not fit; free some space")
    return Check("disk", "ok", text)


def check_descriptors(_: Settings) -> Check:
    """Whether a gateway started from here may have enough files and sockets open."""
    limit = attainable_descriptor_limit()
    if limit.shortage:
        return Check("open files", "warn", limit.shortage, ADVICE)
    return Check("open files", "ok", f"{limit.soft} at a time, enough for {limit.streams} streams")


def check_huge_pages(settings: Settings) -> Check:
    """Whether a gateway started from here may put its memory into huge pages."""
    name = "huge pages"
    if not settings.server.huge_pages:
        return Check(name, "ok", "not used: server.huge_pages is false")
    if problem := why_no_huge_pages():
        advice = (
            "as root, `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`, on Linux 6.1 or later; or"
            " set server.huge_pages to false, and requests may cost more"
        )
        return Check(name, "warn", problem, advice)
    return Check(name, "ok", "the gateway's memory goes into them")


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next((one for one in (path, *path.parents) if one.exists()), Path("/"))


def _private(home: Path) -> Iterator[Path]:
    return (path for path in (home, home / SERVER_FILE, home / KEY_FILE) if path.exists())
