"""LoRA adapters: `LORA_MODULES` in any of its spellings (`vllm-worker.md` §4.8). Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pilotlight.engines.flags.values import compact, listed, parse_json, split_list

_FIELDS: Final = frozenset({"name", "path", "base_model_name", "is_3d_lora_weight"})
"""What vLLM knows of an adapter (0.32, entrypoints/openai/models/protocol.py)."""

ADAPTER_CONFIG: Final = "adapter_config.json"
"""The file in an adapter's folder that says its rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """One adapter.

    Attributes:
        name: Under which it is served.
        path: Folder or repository.
        argument: As vLLM takes it.
    """

    name: str
    path: str
    argument: str


def lora_modules(text: str) -> tuple[LoraModule, ...]:
    """The adapters of a JSON object, a JSON array of objects, or `name=path` pairs.

    Raises:
        ValueError: The text is in none of the three forms, an entry lacks its name or path or has what vLLM
            does not know, or two have the same name.
    """
    modules = _read_modules(text)
    names = [module.name for module in modules]
    if len(set(names)) < len(names):
        raise ValueError(f"names an adapter twice: {next(name for name in names if names.count(name) > 1)}")
    return modules


def _read_modules(text: str) -> tuple[LoraModule, ...]:
    if text.startswith(("[", "{")):
        parsed = parse_json(text)
        entries = [parsed] if isinstance(parsed, dict) else parsed
        if not isinstance(entries, list):
            raise ValueError("is not valid JSON")
        modules = []
        for entry in entries:
            name, path = (entry.get("name"), entry.get("path")) if isinstance(entry, dict) else (None, None)
            if not (isinstance(name, str) and name and isinstance(path, str) and path):
                raise ValueError('must hold objects with "name" and "path"')
            if strange := sorted(entry.keys() - _FIELDS):
                raise ValueError(f"holds {listed(strange, ', ')}; legal are {', '.join(sorted(_FIELDS))}")
            modules.append(LoraModule(name=name, path=path, argument=compact(entry)))
        return tuple(modules)
    pairs = [(pair, *pair.partition("=")) for pair in split_list(text)]
    if not all(name and path for _, name, _, path in pairs):
        raise ValueError("must be JSON or name=path pairs")
    return tuple(LoraModule(name=name, path=path, argument=pair) for pair, name, _, path in pairs)


def rank_of(adapter_config: str) -> int | None:
    """The rank that the text of an `adapter_config.json` says; None if it says none."""
    parsed = parse_json(adapter_config)
    rank = parsed.get("r") if isinstance(parsed, dict) else None
    return rank if isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 else None
