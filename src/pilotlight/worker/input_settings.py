"""What the worker's environment says about inputs: defaults, formats and switches (`vllm-worker.md` §4.9).

Pure. `config` reads it at the start; `inputs`, `jobs` and the listener are given it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pilotlight.engines.flags import FlagPlan, Source, clean_value
from pilotlight.engines.flags.values import is_integer
from pilotlight.worker.batching import BatchSizes
from pilotlight.worker.variables import read_boolean, read_choice, read_number

VLLM_MAX_LOGPROBS: Final = 20
"""vLLM's own `--max-logprobs`; half of it is the widest beam (§1.7)."""


class StreamFormat(StrEnum):
    """How the items of a streamed job look."""

    TOKENS = "tokens"
    SSE = "sse"
    CHUNKS = "chunks"


class ChatMode(StrEnum):
    """How a native chat reaches the engine (§1.4)."""

    CHAT = "chat"
    RAW = "raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSettings:
    """What the worker's environment says about inputs.

    Attributes:
        batch: Sizes of streamed items where the request names none (§2.3).
        flush_seconds: How long a streamed item that is not empty waits for the next piece; 0 = for ever,
            which is the exact schedule (`STREAM_FLUSH_INTERVAL_MS`, milliseconds there; §2.4).
        max_tokens: Native default; None = the rest of the context (`DEFAULT_MAX_TOKENS=auto`).
        native_stream_format: `tokens` or `sse` (§3.5).
        native_chat_mode: The engine's chat route, or its template alone and then a completion (§1.4).
        raw_openai_output: Streamed OpenAI items are strings of events, not lists of parsed chunks (§3.6).
        documented_defaults: Send the documented sampling defaults, not the model's (§1.6).
        strict_parameters: Names in `sampling_params` that nobody knows are a 400 instead of a warning
            (`STRICT_PARAMS`).
        strict_passthrough: Send OpenAI bodies as they are, without translating what vLLM dropped
            (`OPENAI_STRICT_PASSTHROUGH`).
        allow_admin_routes: Let jobs reach routes that change engine state (§1.10).
        max_logprobs: The engine's `--max-logprobs`, which bounds the width of a beam search; None = no bound.
            What variables say, until `max_logprobs` knows better.
    """

    batch: BatchSizes = field(default_factory=BatchSizes)
    flush_seconds: float = 0.0
    max_tokens: int | None = 16
    native_stream_format: StreamFormat = StreamFormat.TOKENS
    native_chat_mode: ChatMode = ChatMode.CHAT
    raw_openai_output: bool = True
    documented_defaults: bool = True
    strict_parameters: bool = False
    strict_passthrough: bool = False
    allow_admin_routes: bool = False
    max_logprobs: int | None = VLLM_MAX_LOGPROBS

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> InputSettings:
        """The settings, or ConfigError naming the variable, its value and what is legal."""
        automatic = (clean_value(env.get("DEFAULT_MAX_TOKENS")) or "").lower() == "auto"
        documented = read_choice(env, "NATIVE_SAMPLING_DEFAULTS", ("documented", "model")) == "documented"
        return cls(
            batch=_batch_sizes(env),
            flush_seconds=read_number(env, "STREAM_FLUSH_INTERVAL_MS", 0, minimum=0) / 1000,
            max_tokens=None if automatic else int(read_number(env, "DEFAULT_MAX_TOKENS", 16, minimum=1)),
            native_stream_format=StreamFormat(read_choice(env, "NATIVE_STREAM_FORMAT", ("tokens", "sse"))),
            native_chat_mode=ChatMode(read_choice(env, "NATIVE_CHAT_MODE", ("chat", "raw"))),
            raw_openai_output=read_boolean(env, "RAW_OPENAI_OUTPUT", default=True),
            documented_defaults=documented,
            strict_parameters=read_boolean(env, "STRICT_PARAMS", default=False),
            strict_passthrough=read_boolean(env, "OPENAI_STRICT_PASSTHROUGH", default=False),
            allow_admin_routes=read_boolean(env, "ALLOW_ADMIN_ROUTES", default=False),
            max_logprobs=_max_logprobs(env),
        )


def _batch_sizes(env: Mapping[str, str]) -> BatchSizes:
    """The documented names win over those that the older worker really read (§2.3)."""
    minimum = read_number(env, "MIN_BATCH_SIZE", 1, minimum=0)
    growth = read_number(env, "BATCH_SIZE_GROWTH_FACTOR", 3, minimum=0)
    return BatchSizes(
        int(read_number(env, "DEFAULT_BATCH_SIZE", 50, minimum=1)),
        int(read_number(env, "DEFAULT_MIN_BATCH_SIZE", minimum, minimum=0)),
        read_number(env, "DEFAULT_BATCH_SIZE_GROWTH_FACTOR", growth, minimum=0),
    )


def _max_logprobs(env: Mapping[str, str]) -> int | None:
    limit = int(read_number(env, "MAX_LOGPROBS", VLLM_MAX_LOGPROBS, minimum=-1))
    width = int(read_number(env, "MAX_BEAM_WIDTH", 0, minimum=0))
    return None if limit < 0 else max(limit, 2 * width)


def max_logprobs(plan: FlagPlan) -> int | None:
    """The `--max-logprobs` that an engine is started with, wherever it was said; None = no bound (§1.7)."""
    lines = [line for line in plan.explanations if line.flag.replace("_", "-") == "--max-logprobs"]
    # Every other place overrules the configuration file.
    said = [line.value for line in lines if line.source is not Source.CONFIG_FILE] or [
        line.value for line in lines
    ]
    limit = int(said[-1]) if said and is_integer(said[-1]) else VLLM_MAX_LOGPROBS
    return None if limit < 0 else limit
