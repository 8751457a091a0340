"""Which weights `MODEL_NAME` means, and under which names they are served (`vllm-worker.md` §5.4)."""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pilotlight.domain.worker import Failure

BUILT_IN_MODELS: Final = {"pilotlight/ember": "ember"}
"""Models shipped inside the package: repository id to folder below `pilotlight/models`."""

_SNAPSHOT: Final = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[0-9a-f]+/?$")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What to hand to the engine.

    Attributes:
        source: Folder or hub id.
        names: Names to serve it under, the repository id first.
        local: The weights are on this machine; no network is needed.
    """

    source: str
    names: tuple[str, ...]
    local: bool


class ModelMissingError(Exception):
    """A local model that is not there or not complete."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.cause)
        self.failure = failure


def resolve_model(name: str) -> ResolvedModel:
    """The model to serve: built in, a local folder, or a hub id passed on as it is.

    Raises:
        ModelMissingError: A local folder was meant and it does not hold a model.
    """
    if name in BUILT_IN_MODELS:
        folder = Path(str(importlib.resources.files("pilotlight"))) / "models" / BUILT_IN_MODELS[name]
        return _local(folder, name)
    path = Path(name).expanduser()
    if name.startswith(("/", "./", "../", "~")) or path.is_dir():
        return _local(path.resolve(), name)
    return ResolvedModel(name, tuple(dict.fromkeys((name, name.lower()))), local=False)


def _local(folder: Path, name: str) -> ResolvedModel:
    if not folder.is_dir():
        raise _missing(f"model folder {folder} does not exist")
    if not any((folder / file).is_file() for file in ("config.json", "params.json")):
        raise _missing(f"model folder {folder} has no config.json")
    cached = _SNAPSHOT.search(str(folder))
    repository = f"{cached['owner']}/{cached['name']}" if cached else name
    names = (repository, repository.lower(), name, str(folder)) if cached else (name, str(folder))
    return ResolvedModel(str(folder), tuple(dict.fromkeys(names)), local=True)


def _missing(cause: str) -> ModelMissingError:
    return ModelMissingError(
        Failure(
            kind="model_not_found",
            cause=cause,
            advice="Check MODEL_NAME: a hub id, or a folder with config.json, tokenizer and safetensors.",
        )
    )
