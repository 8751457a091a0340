"""The forward pass used in training: the same Llama as in transformers, written out for short rows on a CPU.

It reads the parameters of a ``LlamaForCausalLM`` and gives the same logits up to rounding. Two things make
it about twice as fast for rows of a few dozen tokens: attention is plain matrix products instead of the
blocked kernel, and activations stay in the working precision throughout, as they do in vLLM.
"""

from __future__ import annotations

import torch
from torch.nn.functional import embedding, linear, rms_norm, silu
from transformers import LlamaForCausalLM


def working_precision() -> torch.dtype:
    """Returns bfloat16 where the processor multiplies it fast, else float32."""
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32  # noqa: SLF001 - no public name


def rotation(
    width: int, head_size: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosine and sine of the rotary embedding, each positions by head size."""
    frequency = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(width, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def logits(model: LlamaForCausalLM, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the logits after each token.

    Args:
        model: Whose parameters to use; gradients reach them.
        ids: Token ids, rows by tokens, padded on the right.
        dtype: Precision of products and activations.

    Returns:
        Logits, rows by tokens by vocabulary.
    """
    config = model.config
    rows, width = ids.shape
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    eps = config.rms_norm_eps
    cosine, sine = rotation(width, size, config.rope_parameters["rope_theta"], dtype)
    mask = torch.full((width, width), float("-inf"), dtype=dtype).triu(1)
    table = model.model.embed_tokens.weight.to(dtype)
    x = embedding(ids, table)
    for layer in model.model.layers:
        attention, feed = layer.self_attn, layer.mlp
        h = rms_norm(x, x.shape[-1:], layer.input_layernorm.weight.to(dtype), eps)
        joined = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)).to(
            dtype
        )
        mixed = linear(h, joined).view(rows, width, heads + 2 * groups, size).transpose(1, 2)
        turned = _rotate(mixed[:, : heads + groups], cosine, sine)
        # Each key and value head serves heads / groups query heads: the queries of one group are one longer
        # matrix.
        query = turned[:, :heads].reshape(rows * groups, -1, size)
        key = turned[:, heads:].reshape(rows * groups, width, size)
        value = mixed[:, heads + groups :].reshape(rows * groups, width, size)
        weight = torch.bmm(query * size**-0.5, key.transpose(1, 2))
        weight = (weight.view(-1, width, width) + mask).softmax(-1).view(rows * groups, -1, width)
        heard = (
            torch.bmm(weight, value).view(rows, heads, width, size).transpose(1, 2).reshape(rows, width, -1)
        )
        x = x + linear(heard, attention.o_proj.weight.to(dtype))
        h = rms_norm(x, x.shape[-1:], layer.post_attention_layernorm.weight.to(dtype), eps)
        gate, up = linear(h, torch.cat((feed.gate_proj.weight, feed.up_proj.weight)).to(dtype)).chunk(
            2, dim=-1
        )
        x = x + linear(silu(gate) * up, feed.down_proj.weight.to(dtype))
    return linear(rms_norm(x, x.shape[-1:], model.model.norm.weight.to(dtype), eps), table)
