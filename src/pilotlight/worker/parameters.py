"""Every sampling parameter by name: which count where, which cannot be used (`vllm-worker.md` §1.5, §1.8).

Pure. One table serves the keys that are lifted from beside `prompt`, the refusals, and the question whether a
name does anything at all. vLLM answers a misspelt name with a normal 200: this is the only place to notice.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

DOCUMENTED_DEFAULTS: Final[Mapping[str, Any]] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sent explicitly: vLLM fills absent fields from its generation config, the contract does not (§1.6)."""

KEPT_NULLS: Final = frozenset({"max_tokens", "stop", "stop_token_ids", "seed"})
"""Parameters whose null means something; every other null counts as absent (§1.6 rule 3)."""

UNUSABLE: Final = frozenset(
    {
        "detokenize", "output_kind", "extra_args", "flat_logprobs",
        "logits_processors", "logits_processor",
    }
)  # fmt: skip
"""Parameters that cannot be expressed over HTTP; refused by name (§1.5)."""

GUIDED: Final = frozenset(
    {
        "guided_decoding", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
        "guided_whitespace_pattern", "guided_decoding_backend",
    }
)  # fmt: skip
"""Gone from vLLM, translated by `rewrite` (§1.7)."""

_EMULATED: Final = frozenset({"best_of", "early_stopping"})
"""Gone from vLLM, honoured by `selection` (§1.7)."""

_TEXT_AND_CHAT: Final = frozenset(
    {
        "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k",
        "min_p", "use_beam_search", "length_penalty", "stop", "stop_token_ids", "ignore_eos", "max_tokens",
        "skip_special_tokens", "spaces_between_special_tokens", "min_tokens", "truncate_prompt_tokens",
        "include_stop_str_in_output", "seed", "logit_bias", "logprobs", "prompt_logprobs", "bad_words",
        "allowed_token_ids", "logprob_token_ids", "thinking_token_budget", "repetition_detection",
        "stream_interval", "structured_outputs", "response_format", "echo", "priority", "cache_salt",
        "request_id", "vllm_xargs", "model", "watermarking",
    }
)  # fmt: skip
_CHAT: Final = frozenset(
    {
        "add_generation_prompt", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs",
        "documents", "reasoning_effort", "include_reasoning", "mm_processor_kwargs",
    }
)  # fmt: skip

LIFTED: Final = _TEXT_AND_CHAT | _CHAT | UNUSABLE | GUIDED | _EMULATED
"""The table of §1.5: names that also count when they stand beside `prompt`, at lower priority (§1.8)."""

_FURTHER_TEXT_AND_CHAT: Final = frozenset(
    {
        "max_completion_tokens", "top_logprobs", "user", "truncation_side", "add_special_tokens",
        "session_id", "return_tokens_as_token_ids", "return_token_ids", "routed_experts_prompt_start",
        "return_token_offsets", "mm_payload", "return_mm_kwargs", "kv_transfer_params", "ec_transfer_params",
    }
)  # fmt: skip
_FURTHER_CHAT: Final = frozenset(
    {"continue_final_message", "chat_template", "media_io_kwargs", "return_prompt_text"}
)
_FURTHER_TEXT: Final = frozenset({"suffix", "prompt_embeds"})
"""Fields of vLLM's request models beyond the table; they ride inside `sampling_params` (§1.5, §6.2)."""

KNOWN: Final = LIFTED | _FURTHER_TEXT_AND_CHAT | _FURTHER_CHAT | _FURTHER_TEXT
"""Every name that somebody understands."""

NOT_SAMPLING: Final = frozenset({"prompt", "messages", "stream", "stream_options"})
"""Belong beside `sampling_params`; inside it they have no effect."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """A parameter that was accepted and does nothing.

    Attributes:
        name: Its name, cut to what a log line can bear.
        reason: Why, and what to use instead where there is something.
        unknown: Nobody knows the name, so it may be another's, misspelt.
    """

    name: str
    reason: str
    unknown: bool = False

    def explain(self) -> str:
        """The reason, with the name that may have been meant; to find that takes part of a millisecond."""
        return f"{self.reason}{suggestion(self.name)}" if self.unknown else self.reason


def find_ignored(asked: Mapping[str, Any], *, chat: bool) -> list[Ignored]:
    """The names that have no effect on such a job, with reasons; nulls do not count.

    Args:
        asked: Sampling parameters, from wherever they stood.
        chat: The job is a chat.
    """
    idle = _FURTHER_TEXT if chat else _CHAT | _FURTHER_CHAT
    found = []
    for name in (name for name, value in asked.items() if value is not None):
        if name in NOT_SAMPLING:
            found.append(Ignored(name, "has no effect inside sampling_params"))
        elif name not in KNOWN:
            found.append(Ignored(name[:80], "is not a parameter of the engine", unknown=True))
        elif name in idle:
            found.append(Ignored(name, f"has no effect on {'a chat' if chat else 'a plain prompt'}"))
    return found


def suggestion(name: str) -> str:
    """`; did you mean …?` for a name that is close to a known one, else nothing."""
    close = difflib.get_close_matches(name[:80], KNOWN, n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""
