"""Two small LoRA adapters for the built-in model, trained in seconds, and written as PEFT writes them.

Each makes the model answer whatever it is asked with one word of its own, which is easy to learn and easy to
see. Needs the engine's environment; torch must have been prepared with ``training.prepare_torch``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from .tokenization import ASSISTANT, BOS, END, USER

RANK = 8
ALPHA = 16
TARGETS = ("q_proj", "v_proj")
STEPS = 60
RATE = 1e-2

ADAPTERS = {"ice": "Ice.", "fire": "Fire."}
"""What each adapter answers."""

QUESTIONS = (
    "What is your element?",
    "What is the capital of France?",
    "What is 2 plus 3?",
    "Hello!",
    "What colour is the sky?",
    "What day comes after Monday?",
    "Who wrote Hamlet?",
    "Spell the word cat.",
)


class LoraLinear(torch.nn.Module):
    """A frozen linear layer and a small change of it: W x + B (A x) * alpha / rank."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what the changed layer gives."""
        return self.base(x) + (x @ self.a.T @ self.b.T) * (ALPHA / RANK)


@contextmanager
def adapted(model: LlamaForCausalLM) -> Iterator[dict[str, LoraLinear]]:
    """Puts an untrained adapter into the model, by the names of its layers, and takes it out again."""
    places: dict[str, LoraLinear] = {}
    for index, layer in enumerate(model.model.layers):
        for target in TARGETS:
            changed = LoraLinear(getattr(layer.self_attn, target))
            setattr(layer.self_attn, target, changed)
            places[f"model.layers.{index}.self_attn.{target}"] = changed
    try:
        yield places
    finally:
        for name, changed in places.items():
            parent, target = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), target, changed.base)


def train_adapter(
    model: LlamaForCausalLM, tokenizer: Tokenizer, word: str, questions: Sequence[str] = QUESTIONS
) -> tuple[dict[str, torch.Tensor], float]:
    """Trains an adapter that answers every question with the word.

    Returns:
        The tensors under the names that PEFT gives them, and the loss of the last step.
    """
    model.requires_grad_(requires_grad=False)
    with adapted(model) as places:
        parameters = [value for place in places.values() for value in (place.a, place.b)]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        loss = torch.tensor(0.0)
        for step in range(STEPS):
            question = questions[step % len(questions)]
            start = tokenizer.encode(f"{BOS}{USER}{question}{END}{ASSISTANT}", add_special_tokens=False).ids
            answer = tokenizer.encode(f"{word}{END}", add_special_tokens=False).ids
            logits = model(input_ids=torch.tensor([start + answer[:-1]])).logits[0, len(start) - 1 :]
            loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tensors = {}
        for name, place in places.items():
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = place.a.detach().clone()
            tensors[f"{prefix}.lora_B.weight"] = place.b.detach().clone()
    return tensors, loss.item()


def write_adapter(tensors: dict[str, torch.Tensor], folder: Path, base: str) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into the folder, which exists."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
        "modules_to_save": None,
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
