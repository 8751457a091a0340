"""Speculative decoding: one JSON object from many variables (`vllm-worker.md` §4.7). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pilotlight.engines.flags.values import choices_problem, is_integer, is_zero, parse_boolean

PARTS: Final[Mapping[str, str]] = {
    "SPECULATIVE_METHOD": "method",
    "SPECULATIVE_MODEL": "model",
    "NUM_SPECULATIVE_TOKENS": "num_speculative_tokens",
    "NGRAM_PROMPT_LOOKUP_MAX": "prompt_lookup_max",
    "NGRAM_PROMPT_LOOKUP_MIN": "prompt_lookup_min",
    "SPECULATIVE_DRAFT_TENSOR_PARALLEL_SIZE": "draft_tensor_parallel_size",
    "SPECULATIVE_MAX_MODEL_LEN": "max_model_len",
    "SPECULATIVE_QUANTIZATION": "quantization",
    "SPECULATIVE_MODEL_REVISION": "revision",
    "SPECULATIVE_ENFORCE_EAGER": "enforce_eager",
}
"""Variables that make up the object when `SPECULATIVE_CONFIG` is not set, and their keys."""

SHORT_OPTIONS: Final = ("SPEC_METHOD", "SPEC_MODEL", "SPEC_TOKENS")
"""vLLM's own options for three of the keys; the generic rule covers them."""

_NUMBERS: Final = frozenset(
    {
        "num_speculative_tokens",
        "prompt_lookup_max",
        "prompt_lookup_min",
        "draft_tensor_parallel_size",
        "max_model_len",
    }
)
_WITH_DRAFT_MODEL: Final = frozenset({"draft_model", "eagle", "eagle3", "medusa", "mlp_speculator"})
METHODS_AS_MODELS: Final[Mapping[str, str]] = {
    "[ngram]": "ngram",
    **{name: name for name in ("ngram", "ngram_gpu", "suffix", "custom_class", "extract_hidden_states")},
}
"""Values of a draft model that name a way to guess and no weights (vLLM 0.32, config/speculative.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """What the parts say together.

    Attributes:
        config: The object; None where they ask for nothing.
        used: The variables that are in it.
        errors: Variable and problem.
        notes: Variable and what to say, for those that have no effect.
    """

    config: Mapping[str, Any] | None = None
    used: tuple[str, ...] = ()
    errors: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def speculative_parts(env: Mapping[str, str], methods: tuple[str, ...] = ()) -> Speculation:
    """The object that the parts of an environment make; 0 and empty mean that a part is unset.

    Args:
        env: Cleaned variables.
        methods: What vLLM can do; empty if unknown.
    """
    texts = {name: env[name] for name in PARTS if name in env and not is_zero(env[name])}
    errors: dict[str, str] = {}
    config: dict[str, Any] = {}
    for name, text in texts.items():
        key = PARTS[name]
        if key in _NUMBERS:
            if is_integer(text) and int(text) > 0:
                config[key] = int(text)
            else:
                errors[name] = "must be a whole number above 0"
        elif key == "enforce_eager":
            truth = parse_boolean(text)
            if truth is None:
                errors[name] = "must be true or false"
            elif truth:
                config[key] = True
        else:
            config[key] = text
    guess = METHODS_AS_MODELS.get(str(config.get("model", "")).lower())
    if guess is not None:
        del config["model"]
        config.setdefault("method", guess)
    method = _method(config)
    if errors:
        return Speculation(used=tuple(texts), errors=errors)
    if method is None:
        note = "has no effect without SPECULATIVE_MODEL, SPECULATIVE_METHOD or NGRAM_PROMPT_LOOKUP_MAX"
        return Speculation(notes=dict.fromkeys(texts, note))
    problem = _problem(method, config, methods)
    if problem is not None:
        return Speculation(used=tuple(texts), errors=dict([problem]))
    return Speculation(
        config={"method": method, **{key: config[key] for key in sorted(config) if key != "method"}},
        used=tuple(texts),
    )


def _method(config: Mapping[str, Any]) -> str | None:
    """The method that is named, or that the other parts imply."""
    if "method" in config:
        return str(config["method"]).lower()
    model = str(config.get("model", "")).lower()
    if not model:
        return "ngram" if "prompt_lookup_max" in config else None
    return next((name for name in ("eagle3", "eagle", "medusa") if name in model), "draft_model")


def _problem(method: str, config: Mapping[str, Any], methods: tuple[str, ...]) -> tuple[str, str] | None:
    if methods and method not in methods:
        return "SPECULATIVE_METHOD", choices_problem(method, methods)
    if method in _WITH_DRAFT_MODEL and "model" not in config:
        return "SPECULATIVE_METHOD", "needs a draft model: set SPECULATIVE_MODEL"
    if method == "ngram" and "num_speculative_tokens" not in config:
        return "NUM_SPECULATIVE_TOKENS", "must be set for the method ngram"
    return None
