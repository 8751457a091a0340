"""Quantised copies of a Llama model, by formulas: round to the nearest step, nothing learned.

Every function takes one weight matrix (outputs x inputs, float32) and returns the tensors that the method
stores in its place, in the layout of the library that made the format known. Needs the engine's
environment. ``tools/make_variants.py`` calls ``write_quantized``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BITS = 4
LEVELS = 2**BITS - 1
PER_WORD = 32 // BITS
"""Values of four bits in a 32-bit word."""

GROUP = 64
"""Inputs that share a scale."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs lies in the n-th four bits of a word (AutoAWQ's GEMM layout)."""


@dataclass(frozen=True)
class Method:
    """One way to store the weights.

    Attributes:
        name: Name of the copy.
        dtype: What is not quantised, and scales; float16 in the older two formats.
        config: The ``quantization_config`` that the engine reads.
        pack: The tensors that replace one weight, by the end of their names.
    """

    name: str
    dtype: torch.dtype
    config: Mapping[str, object]
    pack: Callable[[torch.Tensor], dict[str, torch.Tensor]]


def pack_words(values: torch.Tensor, order: tuple[int, ...] = tuple(range(PER_WORD))) -> torch.Tensor:
    """Returns the values (0 to 15, rows x columns) as 32-bit words, eight columns in each."""
    rows, columns = values.shape
    cells = values.to(torch.int64).reshape(rows, columns // PER_WORD, PER_WORD)[:, :, list(order)]
    words = (cells << (torch.arange(PER_WORD) * BITS)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def symmetric(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises around zero, which is the level 8.

    Returns:
        Levels from 0 to 15 (outputs x inputs) and scales (outputs x groups).
    """
    grouped = _grouped(weight)
    scale = _stored(grouped.abs().amax(-1, keepdim=True) / 7.5)
    levels = (grouped / scale).round().clamp(-8, 7) + 8
    return levels.reshape(weight.shape), scale.squeeze(-1)


def asymmetric(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantises between the least and the greatest value of each group.

    Returns:
        Levels from 0 to 15 (outputs x inputs), scales and levels of zero (outputs x groups both).
    """
    grouped = _grouped(weight)
    low = grouped.amin(-1, keepdim=True).clamp(max=0)
    high = grouped.amax(-1, keepdim=True).clamp(min=0)
    scale = _stored((high - low) / LEVELS)
    zero = (-low / scale).round().clamp(0, LEVELS)
    levels = ((grouped / scale).round() + zero).clamp(0, LEVELS)
    return levels.reshape(weight.shape), scale.squeeze(-1), zero.squeeze(-1)


def pack_awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """AutoAWQ, version GEMM: inputs in rows, eight outputs in a word in an order of its own."""
    levels, scales, zeros = asymmetric(weight)
    return {
        "qweight": pack_words(levels.T, _AWQ_ORDER),
        "qzeros": pack_words(zeros.T, _AWQ_ORDER),
        "scales": scales.T,
    }


def pack_gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """AutoGPTQ: eight inputs in a word, zeros stored one less than they are."""
    levels, scales = symmetric(weight)
    inputs = weight.shape[1]
    zeros = torch.full((inputs // GROUP, weight.shape[0]), 7)
    return {
        "qweight": pack_words(levels).T,
        "qzeros": pack_words(zeros),
        "scales": scales.T,
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }


def pack_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """compressed-tensors, int-quantized: one byte per weight, one scale per output."""
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
    return {
        "weight": (weight / scale).round().clamp(-128, 127).to(torch.int8),
        "weight_scale": scale,
    }


_EIGHT_BITS = {"type": "int", "num_bits": 8, "symmetric": True}

METHODS = {
    method.name: method
    for method in (
        Method(
            "awq",
            torch.float16,
            {
                "quant_method": "awq", "bits": BITS, "group_size": GROUP, "zero_point": True,
                "version": "gemm", "modules_to_not_convert": None,
            },
            pack_awq,
        ),
        Method(
            "gptq",
            torch.float16,
            {
                "quant_method": "gptq", "bits": BITS, "group_size": GROUP, "sym": True, "desc_act": False,
                "checkpoint_format": "gptq", "lm_head": False,
            },
            pack_gptq,
        ),
        Method(
            "int8",
            torch.bfloat16,
            {
                "quant_method": "compressed-tensors", "format": "int-quantized",
                "quantization_status": "compressed", "ignore": ["lm_head"], "kv_cache_scheme": None,
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"dynamic": False, "strategy": "channel"} | _EIGHT_BITS,
                        "input_activations": {"dynamic": True, "strategy": "token"} | _EIGHT_BITS,
                        "output_activations": None,
                    }
                },
            },
            pack_int8,
        ),
    )
}  # fmt: skip


def write_quantized(source: Path, target: Path, method: Method) -> None:
    """Writes the weights and the configuration of a copy; the other files are the caller's.

    Args:
        source: Folder of the model.
        target: Folder of the copy; exists.
        method: How to store the weights of the linear layers. Embeddings and norms stay as they are.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored = {"weight": tensor}
        if name.endswith("_proj.weight"):
            stored = method.pack(tensor.to(torch.float32))
        for ending, value in stored.items():
            exact = value.to(method.dtype) if value.is_floating_point() else value
            tensors[name.removesuffix("weight") + ending] = exact.contiguous()
    save_file(tensors, str(target / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = str(method.dtype).removeprefix("torch.")
    config["quantization_config"] = dict(method.config)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _grouped(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(weight.shape[0], -1, GROUP)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """Returns the scale as it will be read again, so that rounding is towards what the engine sees."""
    return scale.clamp(min=1e-6).to(torch.float16).to(torch.float32)
