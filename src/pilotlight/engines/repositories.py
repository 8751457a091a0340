"""Which repositories of a hub an environment asks for, and the same environment with folders in their place.

The engine runs without the hub: whoever starts it has every repository here first, by the rules of
vllm-worker.md §5.2 and §5.3, and hands it folders (§4.8: adapters are resolved before the engine is spawned).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pilotlight.domain.repository import (
    WEIGHT_PATTERNS,
    Repository,
    RepositoryKind,
    is_folder_name,
    is_object_uri,
)
from pilotlight.engines.flags.lora import LoraModule, lora_modules
from pilotlight.engines.flags.raw import CONFIG_FILE, group_arguments
from pilotlight.engines.flags.speculative import METHODS_AS_MODELS
from pilotlight.engines.flags.values import clean_value, compact, parse_boolean, parse_object, split_list

MODEL_VARIABLE: Final = "MODEL_NAME"

_MODEL_REVISIONS: Final = ("MODEL_REVISION", "REVISION")
_TOKENIZERS: Final = ("TOKENIZER_NAME", "TOKENIZER")
_DRAFTS: Final[Mapping[str, str | None]] = {
    "SPECULATIVE_CONFIG": None,
    "SPECULATIVE_MODEL": "SPECULATIVE_MODEL_REVISION",
    "SPEC_MODEL": "SPECULATIVE_MODEL_REVISION",
}
"""Variables that name a draft model, and where its revision stands; None is within the value."""

_LOAD_FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    "safetensors": ("*.safetensors",),
    "fastsafetensors": ("*.safetensors",),
    "runai_streamer": ("*.safetensors",),
    "pt": ("*.pt",),
    "npcache": ("*.bin",),
    "mistral": ("consolidated*.safetensors",),
    "tensorizer": ("*.tensors",),
}
"""Weight files that a `LOAD_FORMAT` reads (vLLM 0.32, default_loader.py); others take what is best."""

_OBJECT_FORMATS: Final = frozenset({"auto", "runai_streamer", "runai_streamer_sharded", "modelexpress"})
_STREAMER: Final = "runai_model_streamer"

_NETWORK_OPTIONS: Final = (
    "--tokenizer",
    "--lora-modules",
    "--default-mm-loras",
    "--speculative-config",
    "--spec-model",
    "--hf-config-path",
    "-sc",
)
"""Options of raw arguments that may name a repository; any beginning counts, as it may for argparse."""


def repositories_needed(env: Mapping[str, str]) -> tuple[Repository, ...]:
    """Every repository that the engine of this environment would read, the model first.

    Folders and object stores are left out. Values that cannot be understood are left out as well: the flags'
    own check refuses them.

    Args:
        env: Variables by the names of vllm-worker.md §4.9.
    """
    found: list[Repository] = []
    ignore = tuple(_words(env.get("IGNORE_PATTERNS")))
    model = clean_value(env.get(MODEL_VARIABLE))
    revision = _first(env, _MODEL_REVISIONS)
    if model is not None:
        reads = load_format(env)
        found.append(
            Repository(
                name=model,
                revision=revision,
                kind=RepositoryKind.CONFIG if reads == "dummy" else RepositoryKind.MODEL,
                variable=MODEL_VARIABLE,
                patterns=_LOAD_FORMATS.get(reads, WEIGHT_PATTERNS),
                ignore=ignore,
            )
        )
    tokenizer = _first(env, _TOKENIZERS)
    tokenizer_revision = clean_value(env.get("TOKENIZER_REVISION"))
    if tokenizer is not None and (tokenizer != model or tokenizer_revision not in {None, revision}):
        variable = next(name for name in _TOKENIZERS if clean_value(env.get(name)))
        found.append(_config(tokenizer, tokenizer_revision, variable))
    if (config := clean_value(env.get("HF_CONFIG_PATH"))) is not None:
        found.append(_config(config, revision, "HF_CONFIG_PATH"))
    if (draft := _draft(env)) is not None:
        found.append(draft)
    for variable, paths in (
        ("LORA_MODULES", [module.path for module in _adapters(env)]),
        ("DEFAULT_MM_LORAS", list(_mm_adapters(env).values())),
    ):
        found += [Repository(name=path, kind=RepositoryKind.ADAPTER, variable=variable) for path in paths]
    for word in _words(env.get("EXTRA_REPOS")):
        # What is no repository's id is refused whole, so that credentials within stay recognisable.
        name, _, wanted = (word, "", "") if "://" in word else word.partition("@")
        found.append(
            Repository(
                name=name,
                revision=wanted or None,
                kind=RepositoryKind.EXTRA,
                variable="EXTRA_REPOS",
                ignore=ignore,
            )
        )
    remote = [one for one in found if not is_folder_name(one.name) and not is_object_uri(one.name)]
    return tuple(dict.fromkeys(remote))


def code_repositories(env: Mapping[str, str], folder: Path) -> tuple[Repository, ...]:
    """Other repositories whose code a model runs; none unless `TRUST_REMOTE_CODE` allows it.

    The engine looks for them in the client library's own cache, by their ids.

    Args:
        env: The engine's environment.
        folder: The model's files; `auto_map` in its configurations names classes as `ORG/NAME--FILE.CLASS`.
    """
    if not parse_boolean(env.get("TRUST_REMOTE_CODE", "")):
        return ()
    names: dict[str, None] = {}
    for file in ("config.json", "tokenizer_config.json"):
        try:
            config = parse_object((folder / file).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError):
            continue
        classes = config.get("auto_map")
        for named in classes.values() if isinstance(classes, dict) else ():
            # A tokenizer has two of them, of which either may be null.
            for reference in named if isinstance(named, list) else [named]:
                name, separator, _ = str(reference or "").partition("--")
                if separator:
                    names[name] = None
    revision = clean_value(env.get("CODE_REVISION"))
    return tuple(_config(name, revision, "TRUST_REMOTE_CODE") for name in names)


def with_folders(env: Mapping[str, str], folders: Mapping[Repository, str]) -> dict[str, str]:
    """The environment with folders in the place of repositories, and without their revisions.

    `MODEL_NAME` becomes a folder too; under which names it is served is the caller's business (§5.4).

    Args:
        env: As given to `repositories_needed`.
        folders: Where each of those repositories lies; those without an entry stay as they are.
    """
    by_use = {(repository.variable, repository.name): folder for repository, folder in folders.items()}

    def placed(variable: str, name: str) -> str:
        return by_use.get((variable, name), name)

    changed = dict(env)
    model = clean_value(env.get(MODEL_VARIABLE))
    if model is not None and placed(MODEL_VARIABLE, model) != model:
        changed[MODEL_VARIABLE] = placed(MODEL_VARIABLE, model)
        for name in _MODEL_REVISIONS:
            changed.pop(name, None)
    tokenizer = _first(env, _TOKENIZERS)
    if tokenizer is not None:
        folder = next((found for one in _TOKENIZERS if (found := placed(one, tokenizer)) != tokenizer), None)
        if folder is None and tokenizer == model:
            # The same repository at the same revision: the model's folder has it.
            folder = changed[MODEL_VARIABLE]
        if folder is not None and folder != tokenizer:
            for name in (*_TOKENIZERS, "TOKENIZER_REVISION"):
                changed.pop(name, None)
            changed["TOKENIZER"] = folder
    config = clean_value(env.get("HF_CONFIG_PATH"))
    if config is not None:
        changed["HF_CONFIG_PATH"] = placed("HF_CONFIG_PATH", config)
    if (draft := _draft(env)) is not None:
        changed |= _draft_placed(env, draft, placed(draft.variable, draft.name))
    if modules := _adapters(env):
        entries = [
            {
                **(parse_object(module.argument) or {"name": module.name}),
                "path": placed("LORA_MODULES", module.path),
            }
            for module in modules
        ]
        changed["LORA_MODULES"] = compact(entries)
    if modalities := _mm_adapters(env):
        changed["DEFAULT_MM_LORAS"] = compact(
            {name: placed("DEFAULT_MM_LORAS", path) for name, path in modalities.items()}
        )
    return changed


def load_format(env: Mapping[str, str]) -> str:
    """How the engine reads weights: `LOAD_FORMAT`, in lower case."""
    return (clean_value(env.get("LOAD_FORMAT")) or "auto").lower()


def object_store_problem(env: Mapping[str, str], engine_home: Path | None) -> str | None:
    """What keeps the engine from streaming its model from an object store, or None.

    vLLM 0.32 reads `s3://`, `gs://` and `az://` with Run:ai's streamer alone (config/vllm.py); with
    `LOAD_FORMAT` unset it chooses that by itself.

    Args:
        env: The engine's environment.
        engine_home: Its virtual environment, where that is known.
    """
    reads = load_format(env)
    if reads not in _OBJECT_FORMATS:
        legal = ", ".join(sorted(_OBJECT_FORMATS - {"auto"}))
        return f"LOAD_FORMAT={reads} cannot read from an object store; leave it out, or choose one of {legal}"
    found = list(engine_home.glob("lib/python3*/*-packages/vllm")) if engine_home is not None else []
    if found and not any((package.parent / _STREAMER).is_dir() for package in found):
        return (
            f"the engine at {engine_home} has no {_STREAMER}, which reads from object stores: use an engine "
            "with `vllm[runai]`, or copy the model into a folder and name that"
        )
    return None


def may_ask_hub(env: Mapping[str, str], *, root: Path = Path("/")) -> bool:
    """Whether raw arguments or a file could name a repository that nobody sees here.

    Args:
        env: The engine's environment.
        root: Where the configuration file lies that is used when none is named.
    """
    if clean_value(env.get("VLLM_CONFIG_FILE")) is not None or (root / CONFIG_FILE[1:]).is_file():
        return True
    if not (clean_value(env.get("SPECULATIVE_CONFIG")) or "{").startswith("{"):
        return True
    try:
        arguments = shlex.split(env.get("VLLM_EXTRA_ARGS", ""))
    except ValueError:
        return True
    meant = (option.partition(".")[0].replace("_", "-") for option, _ in group_arguments(arguments) if option)
    return any(known.startswith(option) for option in meant for known in _NETWORK_OPTIONS)


def _adapters(env: Mapping[str, str]) -> Sequence[LoraModule]:
    try:
        return lora_modules(clean_value(env.get("LORA_MODULES")) or "")
    except ValueError:
        return ()


def _mm_adapters(env: Mapping[str, str]) -> Mapping[str, str]:
    parsed = _object(env.get("DEFAULT_MM_LORAS"))
    return {name: path for name, path in parsed.items() if isinstance(path, str) and path}


def _draft(env: Mapping[str, str]) -> Repository | None:
    """The draft model; a whole configuration wins over its parts (§4.7)."""
    for variable, revision in _DRAFTS.items():
        text = clean_value(env.get(variable))
        if text is None:
            continue
        config = _object(text) if revision is None else {"model": text, "revision": env.get(revision)}
        name = config.get("model")
        if not isinstance(name, str) or name.lower() in {"", *METHODS_AS_MODELS}:
            return None
        wanted = config.get("revision")
        wanted = clean_value(wanted) if isinstance(wanted, str) else None
        return Repository(name=name, revision=wanted, variable=variable)
    return None


def _draft_placed(env: Mapping[str, str], draft: Repository, folder: str) -> dict[str, str]:
    if folder == draft.name:
        return {}
    revision = _DRAFTS[draft.variable]
    if revision is not None:
        return {draft.variable: folder, revision: ""}
    return {draft.variable: compact({**_object(env[draft.variable]), "model": folder})}


def _config(name: str, revision: str | None, variable: str) -> Repository:
    return Repository(name=name, revision=revision, kind=RepositoryKind.CONFIG, variable=variable)


def _first(env: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((value for name in names if (value := clean_value(env.get(name))) is not None), None)


def _words(text: str | None) -> list[str]:
    return split_list(clean_value(text) or "")


def _object(text: str | None) -> dict[str, Any]:
    return parse_object(clean_value(text) or "{}") or {}
