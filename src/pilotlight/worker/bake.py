"""`python -m pilotlight.worker.bake`: puts a model into an image that is being built (`vllm-worker.md` §5.3).

Told what by the same variables as a worker (`MODEL_NAME` and its revision, `TOKENIZER_NAME`, `EXTRA_REPOS`),
and where by `HF_HUB_CACHE` or `BASE_PATH`. The token comes by `HF_TOKEN` and goes nowhere. What a worker
finds at its start is chosen and fetched by the code that is used here, and `worker.model` reads the record
that is written here. Without `MODEL_NAME` nothing is done.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from pilotlight.core.storage import VOLUME
from pilotlight.domain.repository import Repository
from pilotlight.engines.flags.values import clean_value
from pilotlight.engines.manifest import load_manifest
from pilotlight.engines.repositories import MODEL_VARIABLE, repositories_needed, with_folders
from pilotlight.errors import EngineEnvironmentError, PilotlightError
from pilotlight.models import hub
from pilotlight.models.cache import find_whole, hub_cache
from pilotlight.worker.model import BAKED_FILE

PROGRESS_SECONDS: Final = 5.0
"""Between two lines of progress in a build's log."""

_RECORDED: Final = ("QUANTIZATION", "MODEL_REVISION", "TOKENIZER_REVISION")


def bake(env: Mapping[str, str], *, root: Path = Path("/")) -> dict[str, Any] | None:
    """Fetch what an environment names and write the record; the record, None where no model is named.

    Args:
        env: The build's environment.
        root: Of the image.

    Raises:
        PilotlightError: Something cannot be had; says why.
        OSError: The record cannot be written.
    """
    name = clean_value(env.get(MODEL_VARIABLE))
    if name is None:
        return None
    folders = {repository: str(_place(repository, env)) for repository in repositories_needed(env)}
    placed = with_folders(env, folders)
    model = Path(placed[MODEL_VARIABLE]).resolve()
    if not model.is_dir():
        raise PilotlightError(f"{MODEL_VARIABLE}={name}: {model} is no folder of the image")
    record = {
        "MODEL_NAME": str(model),
        "TOKENIZER_NAME": placed.get("TOKENIZER") or str(model),
        **{variable: clean_value(env.get(variable)) or "" for variable in _RECORDED},
        "MODEL_ID": name,
        "COMMIT": model.name if model.parent.name == "snapshots" else "",
        "BYTES": sum(path.stat().st_size for path in model.rglob("*") if path.is_file()),
        "VLLM_VERSION": _engine_version(env),
    }
    (root / BAKED_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return record


def _place(repository: Repository, env: Mapping[str, str]) -> Path:
    cache = hub_cache(env)
    found = find_whole(cache, repository)
    if (found or cache).is_relative_to(VOLUME):
        raise PilotlightError(
            f"{repository} would lie in {found or cache}, where a volume that is mounted hides it; bake below"
            " another folder, such as BASE_PATH=/models"
        )
    if found is not None:
        return found
    token = env.get("HF_TOKEN") or None
    return hub.fetch(repository, cache=cache, token=token, on_progress=_Progress(repository))


def _engine_version(env: Mapping[str, str]) -> str:
    """The engine's own word for its version; what the build was told, where it says nothing."""
    try:
        return load_manifest(Path(env.get("PILOTLIGHT_ENGINE_HOME", ""))).version
    except EngineEnvironmentError:
        return env.get("VLLM_VERSION", "")


class _Progress:
    """Prints how far a download is, now and then."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._printed = float("-inf")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._printed >= PROGRESS_SECONDS:
            self._printed = now
            sys.stderr.write(f"{self._repository}: {done >> 20} of {total >> 20} MiB\n")


def main() -> int:
    """The exit code: 0 baked, or nothing to bake; 1 the build must fail."""
    try:
        record = bake(os.environ)
    except (PilotlightError, OSError) as error:
        sys.stderr.write(f"no model was baked: {error}\n")
        return 1
    if record is not None:
        sys.stderr.write(f"baked {record['MODEL_ID']}: {record['BYTES']} bytes in {record['MODEL_NAME']}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
