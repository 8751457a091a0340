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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pilotlight.domain.repository import (
    WEIGHT_PATTERNS,
    Repository,
    RepositoryKind,
    is_folder_name,
    is_object_uri,
)
from pilotlight.errors import InvalidInputError
from pilotlight.models.quantization import forms_of

BUILTIN_MODEL = "pilotlight/ember"
"""The model that ships inside the package."""

CONFIG_FILE = "config.json"
PARAMS_FILE = "params.json"
"""The same in Mistral's own format; counts where there is no config.json."""

MODEL_FIELD = "model"

CONFIG_BYTES_MAX = 8 * 1024 * 1024
_INDEX_BYTES_MAX = 128 * 1024 * 1024
"""Of a weight index: a line per tensor, of which models with many experts have a hundred thousand."""

_INDEX_FILES = {"*.safetensors": "model.safetensors.index.json", "*.bin": "pytorch_model.bin.index.json"}
"""Which file names the shards of a weight format."""

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

_PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
}
"""Mistral's own names for what config.json says."""

_PARAMS_CONTEXT = 128_000
"""Context of a model whose params.json names none (vLLM 0.32)."""

_ROPE_UNSCALED = frozenset(
    {"default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mrope"}
)
"""Kinds of rotary embedding whose factor does not lengthen the context (vLLM 0.32, config/model.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a model before it is loaded. 0 and "" mean that its configuration does not say.

    Attributes:
        name: `pilotlight/ember`, the hub's repository id, the absolute folder, or a URI of an object store.
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
        quantization_forms: The same more exactly, as in `models.quantization`.
        custom_code: Whether the repository brings model code of its own (`auto_map`).
        full_attention: Whether every layer keeps every token in its cache, so that its size can be computed.
    """

    name: str
    kind: Literal["builtin", "folder", "hub", "object"]
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
    quantization_forms: tuple[str, ...] = ()
    custom_code: bool = False
    full_attention: bool = False


def resolve_model(
    wanted: Repository, *, cache: Path, token: str | None = None, endpoint: str | None = None
) -> ModelFacts:
    """The facts of a model.

    Args:
        wanted: What of it the engine will read; by name `pilotlight/ember`; a folder (absolute, or beginning
            with `./`, `../` or `~`); a place in an object store (`s3://…`), of which nothing but the name is
            known; or a Hugging Face id.
        cache: The hub cache, where models fetched before lie.
        token: Hugging Face token for gated and private models.
        endpoint: URL of the hub; None is the one this process is set to.

    Raises:
        InvalidInputError: No such model, or its files are incomplete; names what is missing and where.
        HubUnreachableError: The hub does not answer and the cache does not have the model.
    """
    name = wanted.name
    if name == BUILTIN_MODEL:
        return read_folder(builtin_folder(), wanted, kind="builtin")
    if is_folder_name(name):
        # Symlinks stay as the user named them.
        folder = Path(os.path.abspath(Path(name).expanduser()))  # noqa: PTH100
        return read_folder(folder, replace(wanted, name=str(folder)), kind="folder")
    if is_object_uri(name):
        # Nothing of it can be read here; the engine does that.
        return ModelFacts(name=name, kind="object", path=None)
    check_hub_name(name)
    # The client library costs 40 MB and half a second; most installations never deploy a hub model.
    from pilotlight.models import hub  # noqa: PLC0415

    return hub.resolve(wanted, cache=cache, token=token, endpoint=endpoint)


def builtin_folder() -> Path:
    """Where the built-in model's files lie."""
    return Path(__file__).with_name("ember")


def check_hub_name(name: str, *, field: str = MODEL_FIELD) -> None:
    """Return when a name could be a Hugging Face repository id, else raise InvalidInputError."""
    if not _HUB_NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith((".git", "-", ".")):
        msg = (
            f"model {name!r} is neither {BUILTIN_MODEL}, nor a folder (absolute, or beginning with ./), "
            "nor an object store (s3://, gs://, az://), nor a Hugging Face id such as Qwen/Qwen3-0.6B"
        )
        raise InvalidInputError(msg, field=field)


def read_folder(folder: Path, wanted: Repository, *, kind: Literal["builtin", "folder", "hub"]) -> ModelFacts:
    """The facts of a model whose files lie in a folder, which must be complete.

    Args:
        folder: The folder that holds its configuration and the weights.
        wanted: What the model is called, and which weights of it are wanted.
        kind: Where the files came from.

    Raises:
        InvalidInputError: Folder, configuration or weights are missing, broken or incomplete.
    """
    if not folder.exists():
        raise InvalidInputError(f"model folder {folder} does not exist", field=MODEL_FIELD)
    if not folder.is_dir():
        raise InvalidInputError(f"model {folder} is not a folder", field=MODEL_FIELD)
    config = read_configuration(folder)
    size = 0 if wanted.kind is RepositoryKind.CONFIG else weight_bytes(folder, wanted.patterns)
    return facts_of(config, name=wanted.name, kind=kind, path=folder, weight_bytes=size)


def read_configuration(folder: Path) -> dict[str, Any]:
    """A model's configuration: config.json, else params.json in the words of config.json."""
    params = folder / PARAMS_FILE
    if not (folder / CONFIG_FILE).exists() and params.is_file():
        return config_of_params(read_config(params))
    return read_config(folder / CONFIG_FILE)


def read_config(path: Path, *, bytes_max: int = CONFIG_BYTES_MAX) -> dict[str, Any]:
    """A JSON object in a file; InvalidInputError when it is missing, too large or is none."""
    try:
        if path.stat().st_size > bytes_max:
            msg = f"{path} has {path.stat().st_size} bytes; at most {bytes_max} are read"
            raise InvalidInputError(msg, field=MODEL_FIELD)
        content = path.read_bytes()
    except FileNotFoundError as error:
        msg = f"model folder {path.parent} has no {path.name}; it must hold a model in Hugging Face's format"
        raise InvalidInputError(msg, field=MODEL_FIELD) from error
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}", field=MODEL_FIELD) from error
    return parse_config(content, str(path))


def parse_config(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object, read from somewhere; InvalidInputError, which names that, when it is none."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{where} is not valid JSON: {error}", field=MODEL_FIELD) from error
    if not isinstance(parsed, dict):
        msg = f"{where} holds a JSON {type(parsed).__name__}; expected an object"
        raise InvalidInputError(msg, field=MODEL_FIELD)
    return parsed


def weight_bytes(folder: Path, patterns: Sequence[str] = WEIGHT_PATTERNS) -> int:
    """Total size of the weight files the engine would load.

    Args:
        folder: The model's.
        patterns: Weight formats, in the order of preference; the first that is there counts.

    Raises:
        InvalidInputError: No weights, a shard named by the index is missing, or a file is cut short.
    """
    for pattern in patterns:
        index = folder / _INDEX_FILES.get(pattern, "")
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        shards = _indexed_shards(index) if index.is_file() else ()
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
            raise InvalidInputError(
                f"{folder} is incomplete: {len(missing)} of {len(shards)} weight files named by {index.name} "
                f"are missing ({shown})",
                field=MODEL_FIELD,
            )
        if shards:
            files = [folder / shard for shard in shards]
        if files:
            for path in files:
                if path.suffix == ".safetensors":
                    _check_safetensors(path)
            return sum(path.stat().st_size for path in files)
    msg = f"model folder {folder} holds no weights ({', '.join(patterns[:-1])} or {patterns[-1]})"
    raise InvalidInputError(msg.replace("( or ", "("), field=MODEL_FIELD)


def _indexed_shards(index: Path) -> Sequence[str]:
    weight_map = read_config(index, bytes_max=_INDEX_BYTES_MAX).get("weight_map")
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
    quantization = quantization if isinstance(quantization, dict) else {}
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
        quantization=str(quantization.get("quant_method", "")),
        quantization_forms=forms_of(quantization),
        custom_code=isinstance(config.get("auto_map"), dict),
        full_attention=_is_full_attention(text),
    )


def config_of_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same in the words of config.json (vLLM 0.32, transformers_utils/configs/mistral.py)."""
    moe, multimodal = params.get("moe"), params.get("multimodal")
    parts = multimodal if isinstance(multimodal, dict) else {}
    if parts.get("vision_encoder_args") or params.get("vision_encoder"):
        architecture = "PixtralForConditionalGeneration"
    elif isinstance(audio := parts.get("whisper_model_args"), dict):
        encoder = audio.get("encoder_args")
        causal = isinstance(encoder, dict) and encoder.get("causal")
        architecture = "VoxtralRealtimeGeneration" if causal else "VoxtralForConditionalGeneration"
    elif params.get("model_type") == "mamba":
        architecture = "Mamba2ForCausalLM"
    elif isinstance(moe, dict):
        shared = _integer(moe, "num_shared_experts")
        architecture = "MistralLarge3ForCausalLM" if shared else "MixtralForCausalLM"
    else:
        architecture = "MistralForCausalLM"
    renamed = {new: params[old] for old, new in _PARAMS.items() if old in params}
    return {"max_position_embeddings": _PARAMS_CONTEXT, **params, **renamed, "architectures": [architecture]}


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
