"""How many files and sockets the gateway may have open at a time, and what its workers get of that.

Most systems start a program with a soft limit of 1,024, which a program may raise to the hard one, because
`select()` cannot handle more and may crash instead of failing. The gateway needs two for every stream and
uses no `select()`, so it raises its own. Children inherit limits, and may well use `select()`: theirs is set
back to what the gateway was started with (systemd.exec(5), on LimitNOFILE=). vLLM raises its own again.
"""

from __future__ import annotations

import contextlib
import resource
from dataclasses import dataclass

STREAMS = 2_000
"""Streams at a time that one gateway is made for."""

_PER_STREAM = 2
"""The client's connection and the engine's."""

_BESIDE = 1_024
"""Store, logs, pipes and polls of workers, idle connections."""

NEEDED = STREAMS * _PER_STREAM + _BESIDE

WANTED = 65_536
"""More is no use, and some programs take memory or time for every descriptor that they might have."""


@dataclass(frozen=True, slots=True)
class DescriptorLimit:
    """What a process may have open.

    Attributes:
        inherited: Its soft limit at first.
        soft: Its soft limit now.
        hard: What that could be raised to.
    """

    inherited: int
    soft: int
    hard: int

    @property
    def streams(self) -> int:
        """How many streams at a time that is enough for."""
        return max(0, (self.soft - _BESIDE) // _PER_STREAM)

    @property
    def shortage(self) -> str:
        """What is wrong, in a sentence; "" where it is enough."""
        if self.soft >= NEEDED:
            return ""
        return (
            f"only {self.soft} files and sockets may be open at a time (hard limit {self.hard}),"
            f" enough for about {self.streams} streams; {STREAMS} need {NEEDED}"
        )


ADVICE = (
    f"raise the hard limit to {NEEDED} or more: LimitNOFILE= of a systemd service, --ulimit nofile= of a"
    " container, nofile in /etc/security/limits.conf of a login, or ulimit -Hn"
)


def raise_descriptor_limit() -> DescriptorLimit:
    """Give this process as many descriptors as it may have, up to `WANTED`; idempotent."""
    inherited, hard = _numbers()
    target = min(WANTED, hard)
    if inherited < target:
        # A sandbox may refuse even this; then it stays as it is, which `shortage` tells.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (target, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
            )
    return DescriptorLimit(inherited, _numbers()[0], hard)


def attainable_descriptor_limit() -> DescriptorLimit:
    """What `raise_descriptor_limit` would come to in a process like this one; changes nothing."""
    inherited, hard = _numbers()
    return DescriptorLimit(inherited, max(inherited, min(WANTED, hard)), hard)


def set_descriptor_limit(pid: int, soft: int) -> None:
    """Set the soft limit of a child that was just started; harmless if it has ended, or is another user's.

    It runs already, but no program opens a thousand files in its first moment. To do it before would mean to
    fork the whole gateway, or to lower its own limit while it serves.
    """
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def _numbers() -> tuple[int, int]:
    """Soft and hard limit; no limit is a large number."""
    soft, hard = (
        WANTED * 1_024 if value == resource.RLIM_INFINITY else value
        for value in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return soft, hard
