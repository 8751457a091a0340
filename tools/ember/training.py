"""Training and checking of the built-in model; ``tools/train_ember.py`` calls these functions in order.

Needs the engine's environment. Everything is seeded and runs with a fixed number of threads and with
deterministic kernels only, so the same machine writes the same file again.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from . import network
from .corpus import Conversation
from .exchange import Exchange
from .tokenization import ASSISTANT, BOS, CONTEXT, END, PAD, USER, VOCABULARY, render

THREADS = 1
ROPE_THETA = 10000.0

# What the words of a question and of a plain text count in the loss, beside 1 for a short answer: enough to
# continue a sentence on the completion routes, too little to cost right answers.
_PROMPT_WEIGHT = 0.02
_PLAIN_WEIGHT = 0.1


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Attributes:
        steps: Optimizer steps.
        batch_tokens: Tokens per step, padding included.
        rate_max: Highest learning rate of the schedule.
        warmup: Steps until that rate is reached; after it the rate falls along a cosine.
        seed: Seed of weights and order of the examples.
    """

    steps: int
    batch_tokens: int = 2048
    rate_max: float = 2e-3
    warmup: int = 200
    seed: int = 11


@dataclass(frozen=True)
class Example:
    """One conversation as token ids, with the weight of each token in the loss (same length)."""

    ids: list[int]
    weights: list[float]


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """Returns the shape of the model: 4.2 million parameters, embeddings shared with the output."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_theta=ROPE_THETA,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        initializer_range=0.02,
        attn_implementation="sdpa",
    )


def prepare_torch(seed: int) -> None:
    """Fixes threads, kernels and seed; to be called before anything else touches torch."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before writing it; filling every new tensor would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(seed)


def encode(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> list[Example]:
    """Returns the conversations as examples, those that do not fit into the context left out.

    An answer of n tokens counts n / sqrt(n) altogether: long answers would else drown the one-digit sums.
    """
    assistant, end = tokenizer.token_to_id(ASSISTANT), tokenizer.token_to_id(END)
    examples: list[Example] = []
    for encoding in tokenizer.encode_batch(
        [render(item) for item in conversations], add_special_tokens=False
    ):
        ids = encoding.ids
        if len(ids) > CONTEXT:
            continue
        weights = [_PROMPT_WEIGHT if assistant in ids else _PLAIN_WEIGHT] * len(ids)
        start = 0
        for place, token in enumerate(ids):
            if token == assistant:
                start = place + 1
            elif token == end and start:
                weight = 1.0 / math.sqrt(place + 1 - start)
                weights[start : place + 1] = [weight] * (place + 1 - start)
                start = 0
        examples.append(Example(ids, weights))
    return examples


def batches(examples: Sequence[Example], plan: Plan) -> Iterator[list[Example]]:
    """Yields batches without end: examples of like length together, in an order that the seed decides."""
    rng = Random(plan.seed)
    pool_size = 4096
    while True:
        order = list(range(len(examples)))
        rng.shuffle(order)
        for begin in range(0, len(order), pool_size):
            pool = sorted(order[begin : begin + pool_size], key=lambda index: len(examples[index].ids))
            ready: list[list[Example]] = []
            batch: list[Example] = []
            for index in pool:
                if batch and (len(batch) + 1) * _width(examples[index]) > plan.batch_tokens:
                    ready.append(batch)
                    batch = []
                batch.append(examples[index])
            ready.append(batch)
            rng.shuffle(ready)
            yield from ready


def _width(example: Example) -> int:
    """Returns the length of an example, rounded up: fewer shapes, so fewer kernels to prepare and to keep."""
    return -(-len(example.ids) // 8) * 8


def _tensors(batch: Sequence[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and weights of a batch, both examples by tokens, padded on the right.

    No attention mask is needed: padding comes last, and no token looks to its right.
    """
    width = max(map(_width, batch))
    ids = torch.tensor([example.ids + [pad] * (width - len(example.ids)) for example in batch])
    weights = torch.tensor([example.weights + [0.0] * (width - len(example.weights)) for example in batch])
    return ids, weights


def train(
    model: LlamaForCausalLM, examples: Sequence[Example], plan: Plan, report: Callable[[str], None]
) -> float:
    """Trains the model in place.

    Args:
        model: The model, in float32.
        examples: The training text.
        plan: Length and rates.
        report: Takes one line of progress now and then.

    Returns:
        The mean loss of the last hundred steps, in nats per answer token.
    """
    matrices = [item for item in model.parameters() if item.dim() == 2]
    vectors = [item for item in model.parameters() if item.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.rate_max, betas=(0.9, 0.98), eps=1e-8, fused=True)
    pad = int(model.config.pad_token_id)
    precision = network.working_precision()
    recent: list[float] = []
    tokens, began = 0, time.monotonic()
    model.train()
    for step, batch in enumerate(batches(examples, plan), start=1):
        rate = plan.rate_max * _rate(step, plan)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, weights = _tensors(batch, pad)
        logits = network.logits(model, ids[:, :-1], precision)
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-99:], loss.item()]
        tokens += ids.numel()
        if step % 100 == 0 or step == plan.steps:
            seconds = time.monotonic() - began
            mean = sum(recent) / len(recent)
            left = seconds / step * (plan.steps - step)
            report(
                f"step {step}/{plan.steps}  loss {mean:.4f}  rate {rate:.1e}  "
                f"{tokens / seconds:,.0f} tokens/s  {seconds:.0f} s gone, {left:.0f} s left"
            )
        if step == plan.steps:
            break
    return sum(recent) / len(recent)


def _rate(step: int, plan: Plan) -> float:
    if step < plan.warmup:
        return step / plan.warmup
    progress = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


@torch.inference_mode()
def answer(model: LlamaForCausalLM, tokenizer: Tokenizer, questions: Sequence[str]) -> list[str]:
    """Returns what the model answers to each question, taking the likeliest token each time.

    Questions of the same length go together, so no padding is needed.
    """
    end = tokenizer.token_to_id(END)
    prompts = [f"{BOS}{USER}{question.strip()}{END}{ASSISTANT}" for question in questions]
    encoded = [item.ids for item in tokenizer.encode_batch(prompts, add_special_tokens=False)]
    answers = [""] * len(questions)
    model.eval()
    for length in sorted({len(ids) for ids in encoded}):
        places = [place for place, ids in enumerate(encoded) if len(ids) == length]
        produced = _greedy(model, torch.tensor([encoded[place] for place in places]), end)
        for place, ids in zip(places, produced, strict=True):
            answers[place] = tokenizer.decode(ids, skip_special_tokens=True)
    return answers


def _greedy(model: LlamaForCausalLM, ids: torch.Tensor, end: int, tokens_max: int = 320) -> list[list[int]]:
    """Returns the tokens after each row up to ``end`` or ``tokens_max`` of them."""
    rows: list[list[int]] = [[] for _ in range(len(ids))]
    done = [False] * len(ids)
    cache = None
    for _ in range(tokens_max):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        for row, token in enumerate(ids[:, 0].tolist()):
            done[row] = done[row] or token == end
            if not done[row]:
                rows[row].append(token)
        if all(done):
            break
    return rows


def score(
    model: LlamaForCausalLM, tokenizer: Tokenizer, exchanges: Sequence[Exchange]
) -> tuple[dict[str, float], list[tuple[Exchange, str]]]:
    """Returns the share of exact answers of each kind, from 0 to 1, and the exchanges answered otherwise."""
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    wrong: list[tuple[Exchange, str]] = []
    for exchange, said in zip(
        exchanges, answer(model, tokenizer, [item.question for item in exchanges]), strict=True
    ):
        total[exchange.kind] += 1
        if said == exchange.answer:
            right[exchange.kind] += 1
        else:
            wrong.append((exchange, said))
    return {kind: right[kind] / total[kind] for kind in total}, wrong


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes ``config.json``, ``generation_config.json`` and ``model.safetensors`` (bfloat16).

    The configuration is written key by key rather than by the library, so that it reads the same for every
    version of it; the output layer is left out because it is the embedding.
    """
    config = model.config
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "attention_bias", "mlp_bias",
        "attention_dropout", "initializer_range",
    )  # fmt: skip
    written: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "use_cache": True,
    }
    written |= {key: getattr(config, key) for key in keys}
    _write_json(folder / "config.json", written)
    generation = {key: written[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {"do_sample": False, **generation})
    tensors = {
        name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
