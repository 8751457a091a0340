"""How many GPUs a worker may use; torch is not asked, which takes seconds and holds memory on the first one.

`vllm-worker.md` §4.6: the entries of CUDA_VISIBLE_DEVICES, else the lines of `nvidia-smi -L`. That program
may take a second, so it is spared where the driver's own list has one GPU at most.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

LIST_SECONDS: Final = 30.0
"""Longest answer of `nvidia-smi`; the first one after a boot loads the driver."""

DRIVER_LIST: Final = Path("/proc/driver/nvidia/gpus")
"""One folder for each GPU that the kernel's driver has."""

_LIST_COMMAND: Final = ("nvidia-smi", "-L")


def visible_gpus(env: Mapping[str, str], *, driver: Path = DRIVER_LIST) -> int:
    """How many GPUs a program with this environment may use; may block for `LIST_SECONDS`."""
    known = known_gpus(env, driver=driver)
    if known is not None:
        return known
    try:
        listed = subprocess.run(
            _LIST_COMMAND, capture_output=True, timeout=LIST_SECONDS, check=True, env={**os.environ, **env}
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return _count(listed.stdout)


async def ask_gpus(env: Mapping[str, str], *, driver: Path = DRIVER_LIST) -> int:
    """As `visible_gpus`; whoever cancels this ends the question."""
    known = known_gpus(env, driver=driver)
    if known is not None:
        return known
    try:
        process = await asyncio.create_subprocess_exec(
            *_LIST_COMMAND,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, **env},
        )
    except OSError:
        return 0
    try:
        async with asyncio.timeout(LIST_SECONDS):
            listed, _ = await process.communicate()
    except TimeoutError:
        return 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return 0 if process.returncode else _count(listed)


def known_gpus(env: Mapping[str, str], *, driver: Path = DRIVER_LIST) -> int | None:
    """The number where nobody needs to be asked, else None.

    Args:
        env: Whose CUDA_VISIBLE_DEVICES counts, up to an entry that is no device.
        driver: The driver's list, of which a container may see some only: 0 and 1 are certain.
    """
    if "CUDA_VISIBLE_DEVICES" in env:
        count = 0
        for entry in env["CUDA_VISIBLE_DEVICES"].split(","):
            if not entry.strip() or entry.strip().startswith("-"):
                break
            count += 1
        return count
    try:
        found = len(list(driver.iterdir()))
    except OSError:
        return None
    return found if found <= 1 else None


def _count(listed: bytes) -> int:
    return sum(line.startswith(b"GPU ") for line in listed.splitlines())
