"""What this machine has for workers: memory, within the container's limit, and NVIDIA GPUs.

`read_host` feeds `core.placement`. Everything here blocks: the first call loads NVIDIA's driver library
(tens of milliseconds with GPUs), later ones read a few small files.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import structlog

from pilotlight.core.placement import Gpu, HostResources

_log = structlog.get_logger(__name__)

_UNLIMITED = 1 << 60
"""Version 1 of cgroups writes a number near 2^63 where there is no limit."""


def read_host() -> HostResources:
    """Memory as it is now and the GPUs that exist; without GPU or driver, `gpus` is empty."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for limit, used in _read_cgroup_memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return HostResources(
        memory_bytes_total=total,
        memory_bytes_available=available,
        gpus=_read_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")),
    )


def _read_cgroup_memory(membership: Path, mount: Path) -> Iterator[tuple[int, int]]:
    """Pairs of limit and use in bytes, one for each cgroup above us that has a limit.

    Page cache that can be dropped at once is not counted as use, as in MemAvailable.

    Args:
        membership: /proc/self/cgroup.
        mount: /sys/fs/cgroup.
    """
    try:
        entries = [line.split(":", 2) for line in membership.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    for entry in entries:
        if len(entry) != 3:
            continue
        _, controllers, path = entry
        if controllers == "":
            root, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        # A container without its own cgroup namespace sees the host's path but mounts only its own part.
        if not folder.is_dir():
            folder = root
        while True:
            limit = _read_number(folder / names[0])
            used = _read_number(folder / names[1])
            if limit is not None and used is not None and limit < _UNLIMITED:
                yield limit, max(0, used - _read_stat(folder / "memory.stat", names[2]))
            if folder == root:
                break
            folder = folder.parent


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # ValueError: "max"
        return None


def _read_stat(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


@functools.cache
def _read_gpus(visible: str | None) -> tuple[Gpu, ...]:
    """The GPUs the operator lets us use, by index; read once, because GPUs do not come and go.

    Args:
        visible: The gateway's own CUDA_VISIBLE_DEVICES: indices or (abbreviated) UUIDs, None for all.
    """
    # Here, because the module is large and most CPU-only commands never ask.
    import pynvml  # noqa: PLC0415

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        gpus = [_read_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        _log.warning("devices.gpu_unreadable", error=str(error))
        return ()
    finally:
        pynvml.nvmlShutdown()
    if visible is None:
        return tuple(gpu for gpu, _ in gpus)
    wanted = [name.strip() for name in visible.split(",") if name.strip()]
    return tuple(
        gpu
        for gpu, uuid in gpus
        if any(
            name == str(gpu.index) or (name.startswith("GPU-") and uuid.startswith(name)) for name in wanted
        )
    )


def _read_gpu(pynvml: Any, index: int) -> tuple[Gpu, str]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        memory_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:
        # GPUs that share the host's memory do not report any of their own.
        memory_bytes = 0
    gpu = Gpu(index=index, name=_text(pynvml.nvmlDeviceGetName(handle)), memory_bytes=memory_bytes)
    return gpu, _text(pynvml.nvmlDeviceGetUUID(handle))


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
