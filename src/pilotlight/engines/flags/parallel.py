"""How many GPUs a model is spread over (`vllm-worker.md` §4.6). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pilotlight.engines.flags.values import clean_value, is_integer, parse_boolean

RANKS_MAX: Final = 4096
"""GPUs that a worker may ask for; more is a slip of the pen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What an environment says of parallelism.

    Attributes:
        variable: The name that says the tensor parallel size.
        tensor: The tensor parallel size as it is written; None if it is unset.
        pipeline: Pipeline stages.
        data: Copies of the model within this worker.
        automatic: A size of 1 means "not decided" (`TENSOR_PARALLEL_AUTO`).
        several_nodes: Ray may bring GPUs of other machines.
    """

    variable: str = "TENSOR_PARALLEL_SIZE"
    tensor: str | None = None
    pipeline: int = 1
    data: int = 1
    automatic: bool = True
    several_nodes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallel:
    """The answer.

    Attributes:
        size: What to tell vLLM; None to tell it nothing.
        note: What a person should know.
        error: Why the environment cannot be used.
        option: The option that `error` is about.
    """

    size: int | None = None
    note: str = ""
    error: str = ""
    option: str = "TENSOR_PARALLEL_SIZE"


def read_ranks(env: Mapping[str, str]) -> Ranks:
    """What an environment says of parallelism; numbers that cannot be read count as 1."""
    shard = clean_value(env.get("TENSOR_PARALLEL_SIZE")) is None and clean_value(env.get("NUM_GPU_SHARD"))
    variable = "NUM_GPU_SHARD" if shard else "TENSOR_PARALLEL_SIZE"
    local = (
        "DATA_PARALLEL_SIZE_LOCAL"
        if clean_value(env.get("DATA_PARALLEL_SIZE_LOCAL"))
        else "DATA_PARALLEL_SIZE"
    )
    ray = (clean_value(env.get("DISTRIBUTED_EXECUTOR_BACKEND")) or "").lower() == "ray"
    return Ranks(
        variable=variable,
        tensor=clean_value(env.get(variable)),
        pipeline=_count(env.get("PIPELINE_PARALLEL_SIZE")),
        data=_count(env.get(local)),
        automatic=parse_boolean(clean_value(env.get("TENSOR_PARALLEL_AUTO")) or "1") is not False,
        several_nodes=ray or parse_boolean(env.get("WORKER_USE_RAY", "")) is True,
    )


def decide_tensor_parallel(
    ranks: Ranks, *, gpus: int | None, heads: int | None, kv_heads: int | None = None
) -> TensorParallel:
    """The tensor parallel size.

    1. A size above 1 is used as it is, unless there are fewer GPUs or the heads cannot be divided by it.
    2. Unset, `auto`, 0, and 1 where that is not meant literally: all GPUs that pipeline stages and copies
       leave, lowered to a number that divides the attention heads.

    Args:
        ranks: What the environment says.
        gpus: GPUs that the worker sees; None if unknown, then nothing is decided by itself.
        heads: Attention heads of the model; None or 0 if unknown.
        kv_heads: Its key-value heads: vLLM wants one of the two numbers to divide the other.
    """
    asked, error = _asked(ranks)
    others = ranks.pipeline * ranks.data
    if error:
        return TensorParallel(error=error)
    if others > RANKS_MAX or (gpus is not None and others > max(1, gpus) and not ranks.several_nodes):
        option = "PIPELINE_PARALLEL_SIZE" if ranks.pipeline >= ranks.data else "DATA_PARALLEL_SIZE"
        seen = f"this worker sees {gpus}" if gpus is not None else f"{RANKS_MAX} is the most"
        return TensorParallel(error=f"needs {others} GPUs, but {seen}", option=option)
    if asked > RANKS_MAX:
        return TensorParallel(error=f"must be at most {RANKS_MAX}")
    if asked > 1:
        if heads and heads % asked:
            return TensorParallel(error=f"must divide the {heads} attention heads of the model")
        if not _divides(asked, heads, kv_heads):
            return TensorParallel(
                error=f"must divide the {kv_heads} key-value heads of the model, or be a multiple of them"
            )
        if gpus is not None and asked * others > gpus and not ranks.several_nodes:
            wanted = f"{asked} GPUs" if others == 1 else f"{asked * others} GPUs, {others} times {asked}"
            return TensorParallel(error=f"needs {wanted}, but this worker sees {gpus}")
        return TensorParallel(size=asked)
    literal = asked == 1 and not ranks.automatic
    if literal or gpus is None or gpus < 2 or (asked == 0 and not ranks.automatic):
        return TensorParallel(size=1 if asked == 1 else None)
    share = max(1, gpus // others)
    size = next(size for size in range(share, 0, -1) if _divides(size, heads, kv_heads))
    wasted = gpus - size * others
    note = f"tensor parallel size {size}, because this worker sees {gpus} GPUs"
    if wasted > 0:
        reason = "the rest is no whole share"
        if size < share and heads and heads % share:
            reason = f"{heads} attention heads cannot be divided by {share}"
        elif size < share:
            reason = f"{kv_heads} key-value heads and {share} do not divide each other"
        note += f"; {wasted} of them {'is' if wasted == 1 else 'are'} left unused: {reason}"
    return TensorParallel(size=size, note=note if size > 1 or wasted else "")


def _asked(ranks: Ranks) -> tuple[int, str]:
    """The size as a number, 0 for "not said", and what is wrong with it."""
    text = (ranks.tensor or "auto").lower()
    if text == "auto":
        return 0, ""
    if not is_integer(text) or int(text) < 0:
        return 0, "must be a whole number of GPUs, or auto"
    return int(text), ""


def _divides(size: int, heads: int | None, kv_heads: int | None) -> bool:
    if heads and heads % size:
        return False
    return not kv_heads or kv_heads % size == 0 or size % kv_heads == 0


def _count(text: str | None) -> int:
    cleaned = clean_value(text) or "1"
    return max(1, int(cleaned)) if is_integer(cleaned) else 1
