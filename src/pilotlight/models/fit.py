"""What a worker of a model will take, and whether a host has it. Pure; asked before an endpoint is stored.

The estimate is a promise that placement counts with, so it errs upwards: a worker that takes less than
promised costs density, one that takes more costs the machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from pilotlight.core.placement import Gpu, HostResources
from pilotlight.core.variables import MEMORY_UTILIZATION, clean_value, is_formal_share
from pilotlight.errors import InvalidInputError
from pilotlight.models.catalog import ModelFacts

Platform = Literal["cpu", "cuda"]

GIB = 1 << 30

CPU_OVERHEAD_BYTES = 2_200_000_000
"""What the engine takes beside weights and KV cache on a CPU: three processes (API server, engine core,
worker) that each import torch and vLLM. Measured with vLLM 0.32.0 and a model of 4 M parameters: idle after
one answer, 1.5 GB in proportional and 1.8 GB in summed resident sizes; the rest is for the worker program and
for activations and allocator under load."""

CUDA_OVERHEAD_BYTES = 4_000_000_000
"""The same with a GPU, where each process also maps the CUDA libraries and pins staging buffers; weights and
cache live on the device. An estimate, not a measurement."""

CPU_BLOCK_TOKENS = 128
"""Tokens in a block of the KV cache where BLOCK_SIZE is not set (vLLM 0.32, platforms/cpu.py)."""

CPU_BLOCKS = 256
"""Blocks of the small KV cache that a CPU endpoint gets by default; allocating them takes almost no time,
while each GiB costs 3.4 s of a start (measured)."""

CPU_CACHE_BYTES_MAX = GIB
"""The default KV cache stays within this unless one request of full length needs more."""

CPU_UTILIZATION = 0.92
"""Part of the host's memory that vLLM 0.32 takes on a CPU where nothing says otherwise."""

DEFAULT_VARIABLES = frozenset({"ENFORCE_EAGER", "KV_CACHE_MEMORY_BYTES"})
"""What `cpu_defaults` may set."""

_DEFAULT_CONTEXT = 2048
_SIZE_VARIABLES = ("KV_CACHE_MEMORY_BYTES", "VLLM_CPU_KVCACHE_SPACE")
_CACHE_VARIABLES = (*_SIZE_VARIABLES, "GPU_MEMORY_UTILIZATION")
_CACHE_OPTIONS = (
    "--kv-cache-memory-bytes",
    "--num-gpu-blocks-override",
    "--gpu-memory-utilization",
)
_CACHE_NAMES = frozenset({"KV_CACHE_MEMORY_BYTES", "NUM_GPU_BLOCKS_OVERRIDE", "GPU_MEMORY_UTILIZATION"})
_HUMAN = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)")
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Host memory one worker is expected to take at most, in bytes."""

    weights: int
    kv_cache: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.kv_cache + self.overhead


def cpu_defaults(
    facts: ModelFacts, env: Mapping[str, str], configured: Collection[str] | None = ()
) -> dict[str, str]:
    """The variables a CPU endpoint gets where its owner said nothing about the matter.

    * ENFORCE_EAGER: compiling takes longer than it saves on the models one serves from a CPU.
    * KV_CACHE_MEMORY_BYTES: room for one request of full length, and 256 blocks if they fit into 1 GiB.
      Without it vLLM claims 92 % of the host's memory and refuses to start where less is available, with
      NUM_GPU_BLOCKS_OVERRIDE too (vLLM 0.32, v1/worker/cpu_worker.py); with an override it is exactly what
      those blocks take.

    Args:
        facts: The model.
        env: What the owner set.
        configured: Options that the engine's configuration file sets, by name in capitals, over which
            variables would win; None where the file cannot be read here: then there are no defaults.
    """
    defaults: dict[str, str] = {}
    if configured is None:
        return defaults
    extra = env.get("VLLM_EXTRA_ARGS", "")
    said = "--enforce-eager" in extra or "ENFORCE_EAGER" in configured
    if value_of(env, "ENFORCE_EAGER") is None and not said:
        defaults["ENFORCE_EAGER"] = "true"
    named = [name for name in _CACHE_VARIABLES if value_of(env, name) is not None]
    if is_formal_share(env.get("GPU_MEMORY_UTILIZATION"), "cpu"):
        named.remove("GPU_MEMORY_UTILIZATION")
    if named or any(option in extra for option in _CACHE_OPTIONS) or not _CACHE_NAMES.isdisjoint(configured):
        return defaults
    block = _block_bytes(facts, env, CPU_BLOCK_TOKENS)
    if not block:
        defaults["KV_CACHE_MEMORY_BYTES"] = str(GIB)
        return defaults
    override = _blocks_override(env)
    if override is None:
        override = max(_full_blocks(facts, env), min(CPU_BLOCKS, CPU_CACHE_BYTES_MAX // block))
    defaults["KV_CACHE_MEMORY_BYTES"] = str(override * block)
    return defaults


def estimate_memory(
    facts: ModelFacts, env: Mapping[str, str], platform: Platform, *, host_memory_bytes: int = 0
) -> MemoryNeed:
    """Host memory one worker of this model will take.

    Args:
        facts: The model.
        env: The endpoint's environment, defaults included.
        platform: What the engine was built for.
        host_memory_bytes: All memory of the host; a CPU worker whose cache is not limited takes a part of it.
    """
    if platform == "cuda":
        offload = float_of(env, "CPU_OFFLOAD_GB") or 0.0
        return MemoryNeed(weights=int(offload * GIB), kv_cache=0, overhead=CUDA_OVERHEAD_BYTES)
    override = _blocks_override(env)
    block = _block_bytes(facts, env, CPU_BLOCK_TOKENS)
    space = parse_human(value_of(env, "VLLM_CPU_KVCACHE_SPACE"))
    cache = parse_human(value_of(env, "KV_CACHE_MEMORY_BYTES"))
    if override is not None and block:
        kv_cache = override * block
    elif space is not None:
        kv_cache = space * GIB
    elif cache is not None:
        kv_cache = cache
    else:
        asked = float_of(env, "GPU_MEMORY_UTILIZATION")
        formal = is_formal_share(env.get("GPU_MEMORY_UTILIZATION"), "cpu")
        share = CPU_UTILIZATION if asked is None or formal else asked
        kv_cache = max(0, int(share * host_memory_bytes) - facts.weight_bytes - CPU_OVERHEAD_BYTES)
    return MemoryNeed(weights=facts.weight_bytes, kv_cache=kv_cache, overhead=CPU_OVERHEAD_BYTES)


def check_context(facts: ModelFacts, env: Mapping[str, str]) -> None:
    """Return when the context length asked for is one that the model has.

    Raises:
        InvalidInputError: MAX_MODEL_LEN is longer than the model's own maximum; names both.
    """
    if value_of(env, "VLLM_ALLOW_LONG_MAX_MODEL_LEN") not in {None, "0"}:
        return
    # These change the model's own maximum in ways that only the engine can compute.
    if any(value_of(env, name) is not None for name in ("HF_OVERRIDES", "ROPE_SCALING", "VLLM_CONFIG_FILE")):
        return
    asked = context_length(env)
    if asked is not None and facts.max_context and asked > facts.max_context:
        msg = (
            f"MAX_MODEL_LEN is {asked} tokens, but the context of {facts.name} ends at {facts.max_context}; "
            "leave it out or set it lower"
        )
        raise InvalidInputError(msg, field="env.MAX_MODEL_LEN")


def check_cache(facts: ModelFacts, env: Mapping[str, str]) -> None:
    """Return when a CPU worker's KV cache has room for one request of full length, without which vLLM ends.

    Raises:
        InvalidInputError: The cache asked for is smaller; names what it is and what is needed.
    """
    lengths = {value_of(env, "MAX_MODEL_LEN"), value_of(env, "MAX_MODEL_LENGTH")}
    # With these vLLM shortens the context to what fits.
    if not facts.full_attention or not lengths.isdisjoint({"auto", "-1"}):
        return
    needed = _full_blocks(facts, env) * _block_bytes(facts, env, CPU_BLOCK_TOKENS)
    cache = estimate_memory(facts, env, "cpu").kv_cache
    named = [
        name for name in (*_SIZE_VARIABLES, "NUM_GPU_BLOCKS_OVERRIDE") if value_of(env, name) is not None
    ]
    if named and cache < needed:
        msg = (
            f"{' and '.join(f'{name}={env[name]}' for name in named)} makes a KV cache of {cache} bytes, but "
            f"one request of full length needs {needed}; set MAX_MODEL_LEN, or make the cache larger"
        )
        raise InvalidInputError(msg, field=f"env.{named[0]}")


def check_fit(need: MemoryNeed, host: HostResources, *, reserve_bytes: int = 0) -> str | None:
    """None when a worker can run on this host once nothing else does, else why not, in words and bytes.

    Args:
        need: What it takes.
        host: What the host has.
        reserve_bytes: Host memory never given to workers.
    """
    if need.total <= host.memory_bytes_total - reserve_bytes:
        return None
    return (
        f"one worker needs {need.total} bytes of memory (weights {need.weights}, KV cache {need.kv_cache}, "
        f"engine {need.overhead}), but this host has {host.memory_bytes_total} bytes, {reserve_bytes} of "
        f"them kept in reserve and {host.memory_bytes_available} available now; a smaller model, "
        "MAX_MODEL_LEN or KV_CACHE_MEMORY_BYTES needs less"
    )


def check_gpu_fit(facts: ModelFacts, env: Mapping[str, str], gpus: tuple[Gpu, ...], count: int) -> str | None:
    """None when the weights fit on `count` of these GPUs, else why not, in words and bytes.

    Args:
        facts: The model.
        env: The endpoint's environment.
        gpus: The host's GPUs; one whose memory is unknown (0) is trusted.
        count: How many of them one worker gets.
    """
    if count > len(gpus):
        return f"one worker needs {count} GPUs, but this host has {len(gpus)}"
    largest = sorted((gpu.memory_bytes for gpu in gpus), reverse=True)[:count]
    if not all(largest):
        return None
    share = float_of(env, "GPU_MEMORY_UTILIZATION") or MEMORY_UTILIZATION
    usable = int(sum(largest) * share)
    offload = int((float_of(env, "CPU_OFFLOAD_GB") or 0.0) * GIB) * count
    needed = max(0, facts.weight_bytes - offload)
    # QUANTIZATION shrinks weights while they are loaded, by an amount that depends on the method.
    if value_of(env, "QUANTIZATION") is not None or needed < usable:
        return None
    return (
        f"the weights of {facts.name} need {needed} bytes of GPU memory, but {usable} bytes are available "
        f"({share:.0%} of {sum(largest)} on {count} GPU{'s' if count != 1 else ''}); use more GPUs or a "
        "smaller model"
    )


def context_length(env: Mapping[str, str]) -> int | None:
    """The context length asked for, in tokens; None when the engine is to choose (`auto`, -1, 0, unset)."""
    for name in ("MAX_MODEL_LEN", "MAX_MODEL_LENGTH"):
        value = value_of(env, name)
        if value is not None:
            return parse_human(value) or None
    return None


def parse_human(value: str | None) -> int | None:
    """A number as vLLM reads it: plain, `32k` (32,000), `1K` (1,024); else None (vllm-worker.md §4.2)."""
    found = _HUMAN.fullmatch((value or "").strip())
    if found is None:
        return None
    unit = found[2]
    return int(float(found[1]) * (_DECIMAL[unit] if unit in _DECIMAL else _BINARY[unit]))


def value_of(env: Mapping[str, str], name: str) -> str | None:
    """A variable's text; None where templates mean "unset" (vllm-worker.md §4.2)."""
    return clean_value(env.get(name))


def float_of(env: Mapping[str, str], name: str) -> float | None:
    """A variable's number; None when unset or not a positive finite number."""
    try:
        number = float(value_of(env, name) or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def _blocks_override(env: Mapping[str, str]) -> int | None:
    value = value_of(env, "NUM_GPU_BLOCKS_OVERRIDE")
    return parse_human(value) or None


def _full_blocks(facts: ModelFacts, env: Mapping[str, str]) -> int:
    """Blocks for one request of full length; one more is the engine's own and never holds tokens."""
    context = context_length(env) or facts.max_context or _DEFAULT_CONTEXT
    return math.ceil(context / _block_tokens(env, CPU_BLOCK_TOKENS)) + 1


def _block_tokens(env: Mapping[str, str], default: int) -> int:
    return parse_human(value_of(env, "BLOCK_SIZE")) or default


def _block_bytes(facts: ModelFacts, env: Mapping[str, str], default_tokens: int) -> int:
    kind = (value_of(env, "KV_CACHE_DTYPE") or "auto").lower()
    if kind.startswith("fp8"):
        size = 1
    elif (value_of(env, "DTYPE") or "auto").lower() in {"float", "float32"}:
        size = 4
    else:
        size = 2
    return facts.kv_values_per_token * size * _block_tokens(env, default_tokens)
