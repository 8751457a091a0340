"""A forked process's environment: the one that Python and C see, and the one that /proc shows of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

VISIBLE = ("PILOTLIGHT_WORKER_ID", "VLLM_API_KEY")
"""Variables by which others find the processes of an engine."""

OWN = ("PYTHONPATH", "PILOTLIGHT_ENGINE_FORK", "VLLM_WORKER_MULTIPROC_METHOD", "SPT_NOENV")
"""What an engine gets from its launcher rather than from its worker program."""


class EnvironmentRefusedError(Exception):
    """The engine's environment cannot be made; the message says why."""


def replace(env: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Makes this process's environment the given one, also where /proc shows it.

    Args:
        env: The whole environment but for `OWN`.
        own: The launcher's environment.

    Raises:
        EnvironmentRefusedError: A visible variable is missing, or longer than its placeholder, or the memory
            cannot be written.
    """
    start, end = _place()
    try:
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            block = memory.read(end - start)
            assert block is not None
            for offset, content in overwrites(block, env):
                memory.seek(start + offset)
                memory.write(content)
    except OSError as error:
        raise EnvironmentRefusedError(f"the environment in /proc cannot be written: {error}") from error
    os.environ.clear()
    os.environ.update(env)
    os.environ.update({name: own[name] for name in OWN if name in own})


def overwrites(block: bytes, env: Mapping[str, str]) -> list[tuple[int, bytes]]:
    """What to write where, so that a block of NUL-terminated `NAME=value` shows the visible variables.

    A shorter value is filled up with NULs, which readers take for empty entries.

    Raises:
        EnvironmentRefusedError: It cannot be done.
    """
    writes: list[tuple[int, bytes]] = []
    for name in VISIBLE:
        mark = f"\0{name}=".encode()
        # With a NUL before it, the first entry is found like every other.
        at = (b"\0" + block).find(mark)
        if at < 0:
            raise EnvironmentRefusedError(f"the launcher was started without {name}")
        begin = at + len(mark) - 1
        room = block.find(b"\0", begin) - begin
        value = env.get(name, "").encode()
        if not value or len(value) > room:
            raise EnvironmentRefusedError(f"{name} must have 1 to {room} bytes, not {len(value)}")
        writes.append((begin, value.ljust(room, b"\0")))
    return writes


def _place() -> tuple[int, int]:
    """Where the environment that the program was started with is in its memory."""
    # After the command name, which may hold blanks: the first is field 3 of proc_pid_stat(5).
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[50 - 3]), int(fields[51 - 3])
