"""Which weights `MODEL_NAME` means, and under which names they are served (`vllm-worker.md` §5.2 to §5.4).

The order of §5.2: what is baked into the image, a folder, the hub's cache, a download. Adapters, draft
models, other tokenizers and `EXTRA_REPOS` take the last two steps as well, so that everything is here before
the engine is spawned, and the engine needs no hub (§4.8, §5.3). Without a download all of this takes
milliseconds and asks nobody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from pilotlight.domain.repository import Repository, is_folder_name, is_object_uri
from pilotlight.domain.worker import Failure
from pilotlight.engines.flags import mask_value
from pilotlight.engines.flags.values import clean_value, parse_boolean
from pilotlight.engines.repositories import (
    MODEL_VARIABLE,
    code_repositories,
    load_format,
    may_ask_hub,
    object_store_problem,
    repositories_needed,
    with_folders,
)
from pilotlight.errors import InvalidInputError
from pilotlight.models.cache import code_cache, find_whole, hub_cache
from pilotlight.models.catalog import check_hub_name, weight_bytes
from pilotlight.worker.errors import ModelMissingError
from pilotlight.worker.fetch import fetch_repository

BAKED_FILE: Final = "local_model_args.json"
"""At the root of an image with weights inside: what they are and where (`vllm-worker.md` §5.3)."""

_OLD_BAKED_FILES: Final = {"MODEL_NAME": "local_model_path.txt", "TOKENIZER_NAME": "local_tokenizer_path.txt"}
"""The same in images of worker-vllm 0.2 and 0.3."""

_SNAPSHOT: Final = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[0-9a-f]+/?$")
_CONFIG_FILES: Final = ("config.json", "params.json")
_CHECKED_FORMATS: Final = frozenset({"auto", "hf", "safetensors", "bitsandbytes"})
_ADVICE: Final = "Check MODEL_NAME: a hub id, or a folder with config.json, tokenizer and safetensors."


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What to hand to the engine.

    Attributes:
        source: Folder or object store.
        names: Names to serve it under, the repository id first.
        local: Everything is on this machine; the hub need not be asked.
        environment: The worker's, with folders in the place of repositories.
        notes: One sentence for each thing that the owner should know.
    """

    source: str
    names: tuple[str, ...]
    local: bool
    environment: Mapping[str, str] = field(repr=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Baked:
    """A model within the image.

    Attributes:
        variables: What replaces the environment's own.
        repository: The model's id; None when nobody wrote it down.
        notes: What the owner should know.
    """

    variables: Mapping[str, str]
    repository: str | None
    notes: tuple[str, ...] = ()


async def prepare_model(
    environment: Mapping[str, str],
    *,
    on_progress: Callable[[int, int], None],
    on_wait: Callable[[str], None] = lambda _holder: None,
    engine_home: Path | None = None,
    root: Path = Path("/"),
) -> ResolvedModel:
    """The model to serve and all that belongs to it, downloaded where it is missing.

    Whoever cancels this ends the download.

    Args:
        environment: The worker's.
        on_progress: Told bytes so far and in all of the repository that is being downloaded.
        on_wait: Told who downloads the same at this moment, once per second while that lasts.
        engine_home: The engine's virtual environment, where that is known.
        root: Where an image says what is baked into it.

    Raises:
        ModelMissingError: Something is not here and cannot be had; says what, and what to do.
    """
    env, baked = _with_baked(root, environment)
    name = clean_value(env.get(MODEL_VARIABLE)) or ""
    _check_object_store(name, env, engine_home)
    folders: dict[Repository, str] = {}
    cache = hub_cache(env)
    for repository in _needed(env):
        folder = _find(repository, cache)
        if folder is None:
            folder = await _fetch(repository, cache, env, on_progress, on_wait)
        folders[repository] = str(folder)
    placed = with_folders(env, folders)
    source = placed.get(MODEL_VARIABLE, "")
    names = _names(name, source, baked)
    if not is_object_uri(name):
        source = str(_checked_folder(Path(source), load_format(env)))
    for repository in _needed(env, Path(source)):
        cache = code_cache(env)
        if _find(repository, cache) is None:
            await _fetch(repository, cache, env, on_progress, on_wait)
    notes = baked.notes if baked is not None else ()
    return ResolvedModel(source, names, not may_ask_hub(env), {**placed, MODEL_VARIABLE: source}, notes)


def look_for_model(
    environment: Mapping[str, str], *, engine_home: Path | None = None, root: Path = Path("/")
) -> tuple[ResolvedModel, tuple[Repository, ...]]:
    """What `prepare_model` would answer, as far as it is here, and what it would download first.

    Nothing is downloaded; arguments and errors as there.
    """
    env, baked = _with_baked(root, environment)
    name, cache = clean_value(env.get(MODEL_VARIABLE)) or "", hub_cache(env)
    _check_object_store(name, env, engine_home)
    found = {repository: _find(repository, cache) for repository in _needed(env)}
    for repository, path in found.items():
        if path is None:
            _check_name(repository)
    placed = with_folders(env, {repository: str(path) for repository, path in found.items() if path})
    source = placed.get(MODEL_VARIABLE, "")
    if is_folder_name(source):
        source = str(_checked_folder(Path(source), load_format(env)))
    notes = baked.notes if baked is not None else ()
    model = ResolvedModel(source, _names(name, source, baked), not may_ask_hub(env), placed, notes)
    return model, tuple(repository for repository, path in found.items() if path is None)


def _check_object_store(name: str, env: Mapping[str, str], engine_home: Path | None) -> None:
    if is_object_uri(name) and (problem := object_store_problem(env, engine_home)) is not None:
        raise _missing(f"model {name} cannot be read: {problem}", "Correct the variable.", kind="bad_flag")


def _with_baked(root: Path, environment: Mapping[str, str]) -> tuple[dict[str, str], Baked | None]:
    """The environment with what is baked into the image over it."""
    baked = read_baked(root, environment)
    if baked is None:
        return dict(environment), None
    kept = {name: value for name, value in environment.items() if name != "REVISION"}
    return kept | dict(baked.variables), baked


def read_baked(root: Path, env: Mapping[str, str]) -> Baked | None:
    """What an image has inside, or None when it has no model.

    It overrides the environment (§5.3), but for a tokenizer of another repository than the baked one. A model
    that a volume hides is looked for by its id, like any other.

    Raises:
        ModelMissingError: The image's own file about it cannot be read, or the model that it names is hidden
            and its id is unknown.
    """
    content = _baked_content(root)
    folder = content.get("MODEL_NAME")
    if folder is None:
        return None
    repository = content.get("MODEL_ID") or _repository_of(folder)
    notes: list[str] = []
    asked = clean_value(env.get(MODEL_VARIABLE))
    if asked and repository and asked.lower() not in {repository.lower(), folder.lower()}:
        notes.append(f"{MODEL_VARIABLE}={asked} is ignored: this image has {repository} inside")
    variables: dict[str, str] = {
        name: content[name] for name in ("QUANTIZATION", "MODEL_REVISION") if name in content
    }
    if Path(folder).is_dir():
        variables |= {MODEL_VARIABLE: folder, "MODEL_REVISION": ""} | _baked_tokenizer(
            content, repository, env
        )
        return Baked(variables, repository, tuple(notes))
    cause = f"the model of this image should lie in {folder}, which does not exist; does a volume hide it?"
    if repository is None:
        raise _missing(cause, "Mount the volume elsewhere, or build the image with BASE_PATH=/models.")
    notes.append(f"{cause} {repository} is looked for in the cache and on the hub instead")
    return Baked(variables | {MODEL_VARIABLE: repository}, repository, tuple(notes))


def _baked_tokenizer(
    content: Mapping[str, str], repository: str | None, env: Mapping[str, str]
) -> dict[str, str]:
    folder = content.get("TOKENIZER_NAME")
    if folder is None or not Path(folder).is_dir():
        return {}
    asked = clean_value(env.get("TOKENIZER_NAME")) or clean_value(env.get("TOKENIZER"))
    known = {(name or "").lower() for name in (folder, _repository_of(folder), repository)}
    if asked is not None and asked.lower() not in known:
        return {}
    return {"TOKENIZER_NAME": folder, "TOKENIZER": "", "TOKENIZER_REVISION": ""}


def _baked_content(root: Path) -> dict[str, str]:
    path = root / BAKED_FILE
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        old = {name: root / file for name, file in _OLD_BAKED_FILES.items()}
        return {
            name: text
            for name, file in old.items()
            # A path may hold any bytes.
            if file.is_file() and (text := os.fsdecode(file.read_bytes()).strip())
        }
    except (OSError, msgspec.DecodeError) as error:
        cause = f"{path}, which says what this image has inside, cannot be read: {error}"
        raise _missing(cause, "Build the image again.") from error
    return {name: str(value) for name, value in content.items() if value not in (None, "")}


def _needed(env: Mapping[str, str], folder: Path | None = None) -> tuple[Repository, ...]:
    """What the engine will read; with the model's folder, what its code needs besides."""
    try:
        return repositories_needed(env) if folder is None else code_repositories(env, folder)
    except InvalidInputError as error:
        raise _missing(str(error), "Correct the variable.", kind="bad_flag") from error


def _find(repository: Repository, cache: Path) -> Path | None:
    """Where a repository lies already, whole."""
    # vLLM takes a folder of this name below the working directory for the model; so do we.
    nearby = Path(repository.name)
    try:
        if nearby.is_dir():
            return nearby.resolve()
        return find_whole(cache, repository)
    except OSError:
        # A name that is too long for a file; whether it is one for the hub is checked there.
        return None


def _check_name(repository: Repository) -> None:
    try:
        check_hub_name(repository.name)
    except InvalidInputError as error:
        raise _missing(f"{repository.variable}: {error}", _ADVICE) from error


async def _fetch(
    repository: Repository,
    cache: Path,
    env: Mapping[str, str],
    on_progress: Callable[[int, int], None],
    on_wait: Callable[[str], None],
) -> Path:
    _check_name(repository)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if parse_boolean(env.get(name, "")):
            cause = f"{repository} ({repository.variable}) is not complete in {cache}, and {name} is set"
            raise _missing(cause, "Fetch it with `pilotlight models pull`, or unset the variable.")
    return await fetch_repository(
        repository, cache=cache, environment=env, on_progress=on_progress, on_wait=on_wait
    )


def _checked_folder(folder: Path, reads: str) -> Path:
    """The folder itself, when it holds a model."""
    folder = folder.expanduser().resolve()
    if folder.is_file():
        # One file with everything inside, for an engine with a plugin that reads such.
        return folder
    if not folder.is_dir():
        raise _missing(f"model folder {folder} does not exist", _ADVICE)
    if not any((folder / file).is_file() for file in _CONFIG_FILES):
        raise _missing(f"model folder {folder} has no config.json", _ADVICE)
    if reads in _CHECKED_FORMATS:
        try:
            weight_bytes(folder)
        except InvalidInputError as error:
            raise _missing(str(error), _ADVICE) from error
    return folder


def _names(name: str, source: str, baked: Baked | None) -> tuple[str, ...]:
    """The repository id first, then in lower case, and the folder last for clients of old images (§5.4)."""
    if is_object_uri(name):
        return (name,)
    repository = (baked.repository if baked is not None else None) or _repository_of(name)
    if repository is None and is_folder_name(name):
        return tuple(dict.fromkeys((name, str(Path(source).expanduser().resolve()))))
    repository = repository or name
    return tuple(dict.fromkeys((repository, repository.lower(), name, source)))


def _repository_of(folder: str) -> str | None:
    """The id of the repository whose snapshot a folder is."""
    cached = _SNAPSHOT.search(folder)
    return f"{cached['owner']}/{cached['name']}" if cached else None


def _missing(cause: str, advice: str, *, kind: str = "model_not_found") -> ModelMissingError:
    return ModelMissingError(Failure(kind=kind, cause=mask_value(cause), advice=advice))
