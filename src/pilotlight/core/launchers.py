"""Which launchers there shall be, and when one that ended comes again. Asked by `clusters.launchers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

LAUNCHER_BYTES: Final = 600_000_000
"""Host memory that one takes while no engine shares it; measured with vLLM 0.32 on a CPU: 0.55 GB."""

PAUSES_S: Final = (1.0, 2.0, 5.0, 15.0)
"""Before each further try after failed lives in a row; after one more it is given up."""

STEADY_S: Final = 60.0
"""A life that was ready for so long makes the failures before it forgotten."""


def choose_launchers(wanted: Mapping[str, int], most: int) -> frozenset[str]:
    """Fingerprints of the launchers that shall run: those wanted most recently.

    Args:
        wanted: When each was last wanted, as a number that grows.
        most: So many at once.
    """
    newest = sorted(wanted, key=lambda fingerprint: (-wanted[fingerprint], fingerprint))
    return frozenset(newest[:most])


def decide_pause(failures: int, pauses_s: Sequence[float] = PAUSES_S) -> float | None:
    """Seconds until the next try after so many failed lives in a row (at least 1); None gives it up."""
    return pauses_s[failures - 1] if failures <= len(pauses_s) else None


def explain_no_room(available_bytes: int, *, reserve_bytes: int, worker_bytes: int) -> str:
    """Why no launcher may be started now, "" where one may.

    Beside it there must be room for a worker and for what workers never get: it is there to serve workers,
    not to take their place.

    Args:
        available_bytes: Host memory that could be taken now.
        reserve_bytes: Never given to workers.
        worker_bytes: What one worker that would use it is expected to take.
    """
    needed = LAUNCHER_BYTES + reserve_bytes + worker_bytes
    if available_bytes >= needed:
        return ""
    return (
        f"too little memory: {available_bytes / 1e9:.1f} GB are available, and a launcher"
        f" ({LAUNCHER_BYTES / 1e9:.1f} GB) is started only while {needed / 1e9:.1f} GB are, so that a worker"
        f" ({worker_bytes / 1e9:.1f} GB) and the reserve ({reserve_bytes / 1e9:.1f} GB) fit beside it"
    )
