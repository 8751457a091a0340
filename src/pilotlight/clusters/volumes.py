"""Which folders of this machine a container may see; asked when an endpoint is made, and at each start.

At each start again, because a container that can write to a folder may have put a link in it meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pilotlight.domain.endpoint import Volume
from pilotlight.errors import ClusterError


def resolve_volume(volume: Volume, roots: Sequence[Path]) -> Volume:
    """A volume as a container is given it: a folder without links on its way; a named volume as it is.

    Args:
        volume: As its owner named it.
        roots: Folders below which all may be given.

    Raises:
        ClusterError: The folder does not exist, or lies elsewhere.
    """
    if not volume.source.startswith("/"):
        return volume
    path = Path(volume.source)
    if not path.is_dir():
        raise ClusterError(f"folder {path} does not exist on the gateway's machine; make it first")
    real = path.resolve()
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        shown = str(path) if real == path else f"{path} ({real})"
        raise ClusterError(
            f"folder {shown} may not be given to containers; allowed are named volumes and folders below"
            f" {', '.join(map(str, roots))}: use one of those, or add it to containers.volume_roots"
        )
    return replace(volume, source=str(real))
