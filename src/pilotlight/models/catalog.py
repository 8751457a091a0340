"""What a model's name means: the built-in model, a folder of this machine, or a Hugging Face repository.

`resolve_model` reads only small files (config.json, the index and headers of weight files), so it is cheap
enough to run before anything is stored. It blocks: callers in an event loop use a thread. Whether the engine
can serve the model is decided elsewhere, from the facts given here.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pilotlight.errors import InvalidInputError

BUILTIN_MODEL = "pilotlight/ember"
"""The model that ships inside the package."""

CONFIG_FILE = "config.json"
MODEL_FIELD = "model"

_CONFIG_BYTES_MAX = 8 * 1024 * 1024
_HEADER_BYTES_MAX = 100 * 1024 * 1024  # the safetensors format's own limit
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Where configurations keep their context length; vLLM 0.32 takes the smallest."""

_ROPE_UNSCALED = frozenset(
    {"default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mrope"}
)
"""Kinds of rotary embedding whose factor does not lengthen the context (vLLM 0.32, config/model.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a model before it is loaded. 0 and "" mean that its configuration does not say.

    Attributes:
        name: `pilotlight/ember`, the hub's repository id, or the absolute folder.
        kind: Where its files come from.
        path: The folder with its files; None for a hub model that is not complete in the cache.
        architectures: Model classes named by config.json.
        model_type: The configuration's own word for the family.
        max_context: Longest context in tokens.
        num_attention_heads: Query heads per layer.
        num_kv_heads: Key-value heads per layer.
        hidden_size: Width of the residual stream.
        layers: Number of decoder layers.
        dtype: Data type of the checkpoint, such as `bfloat16`.
        weight_bytes: Size of the weight files that the engine would load.
        kv_values_per_token: Numbers that one token adds to the KV cache, all layers together.
        quantization: Method, such as `awq`; "" when not quantised.
        custom_code: Whether the repository brings model code of its own (`auto_map`).
        full_attention: Whether every layer keeps every token in its cache, so that its size can be computed.
    """

    name: str
    kind: Literal["builtin", "folder", "hub"]
    path: Path | None
    architectures: tuple[str, ...] = ()
    model_type: str = ""
    max_context: int = 0
    num_attention_heads: int = 0
    num_kv_heads: int = 0
    hidden_size: int = 0
    layers: int = 0
    dtype: str = ""
    weight_bytes: int = 0
    kv_values_per_token: int = 0
    quantization: str = ""
    custom_code: bool = False
    full_attention: bool = False


def resolve_model(
    name: str, *, cache: Path, revision: str | None = None, token: str | None = None
) -> ModelFacts:
    """The facts of a model, from its name.

    Args:
        name: `pilotlight/ember`; a folder (absolute, or beginning with `./`, `../` or `~`); or a
            Hugging Face id.
        cache: The hub cache, where models fetched before lie.
        revision: Branch, tag or commit of a hub model; None is its main branch.
        token: Hugging Face token for gated and private models.

    Raises:
        InvalidInputError: No such model, or its files are incomplete; names what is missing and where.
        HubUnreachableError: The hub does not answer and the cache does not have the model.
    """
    if name == BUILTIN_MODEL:
        return read_folder(builtin_folder(), name=BUILTIN_MODEL, kind="builtin")
    if is_folder_name(name):
        # Symlinks stay as the user named them.
        folder = Path(os.path.abspath(Path(name).expanduser()))  # noqa: PTH100
        return read_folder(folder, name=str(folder), kind="folder")
    check_hub_name(name)
    # The client library costs 40 MB and half a second; most installations never deploy a hub model.
    from pilotlight.models import hub  # noqa: PLC0415

    return hub.resolve(name, cache=cache, revision=revision, token=token)


def builtin_folder() -> Path:
    """Where the built-in model's files lie."""
    return Path(__file__).with_name("ember")


def hub_cache(env: Mapping[str, str]) -> Path:
    """The cache of hub models that a program with this environment uses.

    The client library's own rule, so that gateway, workers and other programs share one download.
    """
    if env.get("HF_HUB_CACHE"):
        return Path(env["HF_HUB_CACHE"]).expanduser()
    if env.get("HF_HOME"):
        return Path(env["HF_HOME"]).expanduser() / "hub"
    base = env.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def is_folder_name(name: str) -> bool:
    """Whether a model's name means a folder of this machine."""
    return name.startswith(("/", "./", "../", "~")) or name in {".", ".."}


def check_hub_name(name: str) -> None:
    """Return when a name could be a Hugging Face repository id, else raise InvalidInputError."""
    if not _HUB_NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith((".git", "-", ".")):
        msg = (
            f"model {name!r} is neither {BUILTIN_MODEL}, nor a folder (absolute, or beginning with ./), "
            "nor a Hugging Face id such as Qwen/Qwen3-0.6B"
        )
        raise InvalidInputError(msg, field=MODEL_FIELD)


def read_folder(folder: Path, *, name: str, kind: Literal["builtin", "folder", "hub"]) -> ModelFacts:
    """The facts of a model whose files lie in a folder, which must be complete.

    Args:
        folder: The folder that holds config.json and the weights.
        name: What the model is called.
        kind: Where the files came from.

    Raises:
        InvalidInputError: Folder, configuration or weights are missing, broken or incomplete.
    """
    if not folder.exists():
        raise InvalidInputError(f"model folder {folder} does not exist", field=MODEL_FIELD)
    if not folder.is_dir():
        raise InvalidInputError(f"model {folder} is not a folder", field=MODEL_FIELD)
    config = read_config(folder / CONFIG_FILE)
    return facts_of(config, name=name, kind=kind, path=folder, weight_bytes=weight_bytes(folder))


def read_config(path: Path) -> dict[str, Any]:
    """A model's configuration; InvalidInputError when it is missing or is not a JSON object."""
    try:
        if path.stat().st_size > _CONFIG_BYTES_MAX:
            msg = f"{path} has {path.stat().st_size} bytes; at most {_CONFIG_BYTES_MAX} are read"
            raise InvalidInputError(msg, field=MODEL_FIELD)
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        msg = f"model folder {path.parent} has no {path.name}; it must hold a model in Hugging Face's format"
        raise InvalidInputError(msg, field=MODEL_FIELD) from error
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}", field=MODEL_FIELD) from error
    except ValueError as error:
        raise InvalidInputError(f"{path} is not valid JSON: {error}", field=MODEL_FIELD) from error
    if not isinstance(content, dict):
        msg = f"{path} holds a JSON {type(content).__name__}; expected an object"
        raise InvalidInputError(msg, field=MODEL_FIELD)
    return content


def weight_bytes(folder: Path) -> int:
    """Total size of the weight files the engine would load: safetensors, else .bin, else .pt.

    Raises:
        InvalidInputError: No weights, a shard named by the index is missing, or a file is cut short.
    """
    for index, pattern in (
        ("model.safetensors.index.json", "*.safetensors"),
        ("pytorch_model.bin.index.json", "*.bin"),
        ("", "*.pt"),
    ):
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        shards = _indexed_shards(folder / index) if index and (folder / index).is_file() else ()
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
            raise InvalidInputError(
                f"{folder} is incomplete: {len(missing)} of {len(shards)} weight files named by {index} "
                f"are missing ({shown})",
                field=MODEL_FIELD,
            )
        if shards:
            files = [folder / shard for shard in shards]
        if files:
            if pattern == "*.safetensors":
                for path in files:
                    _check_safetensors(path)
            return sum(path.stat().st_size for path in files)
    msg = f"model folder {folder} holds no weights (*.safetensors, *.bin or *.pt)"
    raise InvalidInputError(msg, field=MODEL_FIELD)


def _indexed_shards(index: Path) -> Sequence[str]:
    weight_map = read_config(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InvalidInputError(f"{index} has no usable weight_map", field=MODEL_FIELD)
    shards = sorted(set(weight_map.values()))
    if any("/" in shard or shard.startswith(".") for shard in shards):
        raise InvalidInputError(f"{index} names files outside its folder", field=MODEL_FIELD)
    return shards


def _check_safetensors(path: Path) -> None:
    """Compare a file's length with what its header promises, so that a cut download fails here."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _HEADER_BYTES_MAX):
                raise ValueError(f"its header should have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}", field=MODEL_FIELD) from error
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        msg = f"{path} is not a complete safetensors file: {error}"
        raise InvalidInputError(msg, field=MODEL_FIELD) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise InvalidInputError(
            f"{path} has {size} bytes, but its header promises {expected}", field=MODEL_FIELD
        )


def facts_of(
    config: Mapping[str, Any],
    *,
    name: str,
    kind: Literal["builtin", "folder", "hub"],
    path: Path | None,
    weight_bytes: int,
) -> ModelFacts:
    """The facts that follow from a configuration; pure.

    Args:
        config: The content of config.json; multimodal ones keep the language model's part in `text_config`.
        name: What the model is called.
        kind: Where its files come from.
        path: Its folder, if it is complete here.
        weight_bytes: Size of its weight files.
    """
    nested = config.get("text_config")
    text: Mapping[str, Any] = {**config, **nested} if isinstance(nested, dict) else config
    heads = _integer(text, "num_attention_heads", "n_head", "num_heads")
    hidden = _integer(text, "hidden_size", "n_embd", "d_model")
    layers = _integer(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    kv_heads = (
        _integer(text, "num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv") or heads
    )
    head_size = _integer(text, "head_dim") or (hidden // heads if heads else 0)
    latent = _integer(text, "kv_lora_rank")
    # Multi-head latent attention keeps one compressed vector per token instead of keys and values per head.
    per_layer = latent + _integer(text, "qk_rope_head_dim") if latent else 2 * kv_heads * head_size
    quantization = config.get("quantization_config") or text.get("quantization_config")
    return ModelFacts(
        name=name,
        kind=kind,
        path=path,
        architectures=_strings(config.get("architectures")) or _strings(text.get("architectures")),
        model_type=str(config.get("model_type") or ""),
        max_context=_max_context(text),
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        hidden_size=hidden,
        layers=layers,
        dtype=str(text.get("dtype") or text.get("torch_dtype") or ""),
        weight_bytes=weight_bytes,
        kv_values_per_token=layers * per_layer,
        quantization=str(quantization.get("quant_method", "")) if isinstance(quantization, dict) else "",
        custom_code=isinstance(config.get("auto_map"), dict),
        full_attention=_is_full_attention(text),
    )


def _is_full_attention(text: Mapping[str, Any]) -> bool:
    layers = text.get("layer_types")
    if isinstance(layers, list) and set(layers) != {"full_attention"}:
        return False
    slides = text.get("sliding_window") and text.get("use_sliding_window", True)
    hybrid = any(key.startswith(("mamba_", "ssm_", "linear_")) for key in text)
    return not slides and not hybrid


def _max_context(text: Mapping[str, Any]) -> int:
    lengths = [length for key in _CONTEXT_KEYS if (length := _integer(text, key))]
    if not lengths:
        return 0
    longest = min(lengths)
    rope = text.get("rope_scaling") or text.get("rope_parameters")
    if isinstance(rope, dict) and "gemma3" not in str(text.get("model_type")):
        kind = rope.get("rope_type") or rope.get("type") or "default"
        factor = rope.get("factor")
        if kind not in _ROPE_UNSCALED and isinstance(factor, int | float) and factor > 0:
            longest = int(longest * factor)
    return max(longest, _integer(text, "model_max_length"))


def _integer(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _strings(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()
