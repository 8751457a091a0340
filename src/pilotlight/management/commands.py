"""The command that is an endpoint's worker, checked before anything is stored or started.

A worker of the kinds `queue` and `load-balancer` begins in an empty folder of its own, so what a relative
path names is never there; saying so here costs nobody a cold start.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pilotlight.core.health_check import (
    HEALTH_PATH_VARIABLE,
    HEALTH_PORT_VARIABLE,
    PORT_VARIABLE,
    health_path,
)
from pilotlight.core.placement import HostResources
from pilotlight.domain.endpoint import EndpointKind
from pilotlight.errors import InvalidInputError

_SCRIPTS = frozenset({".py", ".pyc", ".sh", ".js", ".mjs", ".cjs", ".ts", ".rb", ".pl"})
_HEALTH_PATH_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedCommand:
    """What a revision is made of.

    Attributes:
        command: Program and arguments.
        env: The complete environment.
        gpu_count: GPUs per worker.
        memory_bytes: Host memory per worker; 0 means the installation's default.
        model: Empty; these workers serve none that we know.
    """

    command: tuple[str, ...]
    env: Mapping[str, str]
    gpu_count: int
    memory_bytes: int
    model: str = ""

    @property
    def title(self) -> str:
        """What an endpoint without a name is called after: its script, else its program."""
        named = next((item for item in self.command[1:2] if Path(item).suffix in _SCRIPTS), self.command[0])
        return Path(named).stem


class CommandChecker:
    """Checks commands against this host.

    Args:
        read_host: Reads what the host has; may block.
        reserve_bytes: Host memory never given to workers.
    """

    def __init__(self, *, read_host: Callable[[], HostResources], reserve_bytes: int) -> None:
        self._read_host = read_host
        self._reserve_bytes = reserve_bytes

    async def check(
        self,
        kind: EndpointKind,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        gpu_count: int | None,
        memory_bytes: int | None,
    ) -> CheckedCommand:
        """Check a command and what it needs.

        Args:
            kind: queue or load-balancer.
            command: Program and arguments.
            env: As the owner set it.
            gpu_count: GPUs per worker; None means none.
            memory_bytes: Host memory per worker; None means the installation's default.

        Raises:
            InvalidInputError: The first thing that does not fit; names it, its value and what is legal.
        """
        await asyncio.to_thread(check_program, command, env)
        if kind is EndpointKind.LOAD_BALANCER:
            check_ports(env)
        host = await asyncio.to_thread(self._read_host)
        check_resources(host, self._reserve_bytes, gpu_count=gpu_count, memory_bytes=memory_bytes)
        return CheckedCommand(
            command=tuple(command), env=dict(env), gpu_count=gpu_count or 0, memory_bytes=memory_bytes or 0
        )


def check_resources(
    host: HostResources, reserve_bytes: int, *, gpu_count: int | None, memory_bytes: int | None
) -> None:
    """Return when this host has what a worker needs.

    Args:
        host: What it has.
        reserve_bytes: Host memory never given to workers.
        gpu_count: GPUs per worker; None means none.
        memory_bytes: Host memory per worker; None means the installation's default.

    Raises:
        InvalidInputError: It has not; says what it has.
    """
    if gpu_count and gpu_count > len(host.gpus):
        raise InvalidInputError(
            f"gpu_count is {gpu_count}, but this host has {len(host.gpus)} GPUs", field="gpu_count"
        )
    most = max(0, host.memory_bytes_total - reserve_bytes)
    if memory_bytes is not None and memory_bytes > most:
        raise InvalidInputError(
            f"memory_bytes is {memory_bytes}, but this host can give a worker at most {most}",
            field="memory_bytes",
        )


def check_program(command: Sequence[str], env: Mapping[str, str]) -> None:
    """Return when the program of a command can be run on this host.

    Args:
        command: Program and arguments.
        env: The endpoint's environment; its PATH counts, else the gateway's.

    Raises:
        InvalidInputError: It cannot; says why.
    """
    program = command[0]
    path = Path(program)
    if "/" in program:
        if not path.is_absolute():
            raise InvalidInputError(
                f"program {program!r} is a relative path, but every worker begins in an empty folder of its"
                " own; give its absolute path",
                field="command",
            )
        if not path.is_file():
            raise InvalidInputError(f"program {program!r} does not exist", field="command")
        if not os.access(path, os.X_OK):
            raise InvalidInputError(
                f"program {program!r} may not be executed; make it executable, or name its interpreter first",
                field="command",
            )
    elif shutil.which(program, path=env.get("PATH") or os.environ.get("PATH")) is None:
        raise InvalidInputError(
            f"program {program!r} is not found in the {'endpoint' if env.get('PATH') else 'gateway'}'s PATH;"
            " give its absolute path",
            field="command",
        )
    for argument in command[1:2]:
        script = Path(argument)
        if script.suffix in _SCRIPTS and not argument.startswith("-"):
            if not script.is_absolute():
                raise InvalidInputError(
                    f"script {argument!r} is a relative path, but every worker begins in an empty folder of"
                    " its own; give its absolute path",
                    field="command",
                )
            if not script.is_file():
                raise InvalidInputError(f"script {argument!r} does not exist", field="command")


def check_ports(env: Mapping[str, str]) -> None:
    """Return when a load-balancing worker can be given its ports and be asked for its health.

    Raises:
        InvalidInputError: The environment chooses a port, or a path that is none.
    """
    for name in (PORT_VARIABLE, HEALTH_PORT_VARIABLE):
        if name in env:
            raise InvalidInputError(
                f"env.{name} is {env[name]!r}, but several workers share this machine, so each gets a free"
                f" port in {PORT_VARIABLE} (and {HEALTH_PORT_VARIABLE}); leave it out and listen there",
                field=f"env.{name}",
            )
    path = health_path(env)
    legal = path.startswith("/") and len(path) <= _HEALTH_PATH_MAX and path.isascii() and path.isprintable()
    if not legal or " " in path or "#" in path:
        raise InvalidInputError(
            f"env.{HEALTH_PATH_VARIABLE} is {path[:100]!r}; legal is an encoded path such as /ping",
            field=f"env.{HEALTH_PATH_VARIABLE}",
        )
