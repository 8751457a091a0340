"""Variables of the worker about inputs: vllm-worker.md §4.2, §4.9 (streaming and native behaviour)."""

from __future__ import annotations

from typing import Any

import pytest

from pilotlight.engines.flags import translate
from pilotlight.worker.batching import BatchSizes
from pilotlight.worker.errors import ConfigError
from pilotlight.worker.input_settings import ChatMode, InputSettings, StreamFormat, max_logprobs


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("STREAM_FLUSH_INTERVAL_MS", "250", "flush_seconds", 0.25),
        ("DEFAULT_MAX_TOKENS", "100", "max_tokens", 100),
        ("DEFAULT_MAX_TOKENS", " Auto ", "max_tokens", None),
        ("NATIVE_STREAM_FORMAT", "SSE", "native_stream_format", StreamFormat.SSE),
        ("NATIVE_CHAT_MODE", "raw", "native_chat_mode", ChatMode.RAW),
        ("RAW_OPENAI_OUTPUT", "0", "raw_openai_output", False),
        ("NATIVE_SAMPLING_DEFAULTS", "model", "documented_defaults", False),
        ("STRICT_PARAMS", "1", "strict_parameters", True),
        ("OPENAI_STRICT_PASSTHROUGH", "true", "strict_passthrough", True),
        ("ALLOW_ADMIN_ROUTES", "yes", "allow_admin_routes", True),
        ("MAX_LOGPROBS", "30", "max_logprobs", 30),
        ("MAX_LOGPROBS", "-1", "max_logprobs", None),
        ("MAX_BEAM_WIDTH", "16", "max_logprobs", 32),
    ],
)
def test_each_variable_sets_its_field_alone(name: str, text: str, field: str, value: Any) -> None:
    settings = InputSettings.from_environment({name: text})
    assert getattr(settings, field) == value
    changed = {
        one for one in InputSettings.__slots__ if getattr(settings, one) != getattr(InputSettings(), one)
    }
    assert changed == {field}


def test_unset_and_templates_words_for_unset_mean_the_defaults() -> None:
    names = (
        "STREAM_FLUSH_INTERVAL_MS", "DEFAULT_MAX_TOKENS", "NATIVE_STREAM_FORMAT", "NATIVE_CHAT_MODE",
        "RAW_OPENAI_OUTPUT", "NATIVE_SAMPLING_DEFAULTS", "STRICT_PARAMS", "OPENAI_STRICT_PASSTHROUGH",
        "ALLOW_ADMIN_ROUTES", "MAX_LOGPROBS", "MAX_BEAM_WIDTH", "DEFAULT_BATCH_SIZE", "DEFAULT_MIN_BATCH_SIZE",
        "DEFAULT_BATCH_SIZE_GROWTH_FACTOR", "MIN_BATCH_SIZE", "BATCH_SIZE_GROWTH_FACTOR",
    )  # fmt: skip
    for text in ("", " ", "None", "null", "~"):
        assert InputSettings.from_environment(dict.fromkeys(names, text)) == InputSettings()
    assert InputSettings().batch == BatchSizes(50, 1, 3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("STREAM_FLUSH_INTERVAL_MS", "-1"),
        ("DEFAULT_MAX_TOKENS", "0"),
        ("DEFAULT_MAX_TOKENS", "many"),
        ("NATIVE_STREAM_FORMAT", "xml"),
        ("NATIVE_CHAT_MODE", "cooked"),
        ("RAW_OPENAI_OUTPUT", "perhaps"),
        ("NATIVE_SAMPLING_DEFAULTS", "mine"),
        ("DEFAULT_BATCH_SIZE", "0"),
        ("DEFAULT_BATCH_SIZE", "nan"),
        ("DEFAULT_MIN_BATCH_SIZE", "-3"),
        ("BATCH_SIZE_GROWTH_FACTOR", "inf"),
        ("MAX_LOGPROBS", "-2"),
    ],
)
def test_malformed_values_are_refused_by_name(name: str, text: str) -> None:
    """§0.3 point 9: a value that is itself malformed stops the start."""
    with pytest.raises(ConfigError, match=name) as caught:
        InputSettings.from_environment({name: text})
    assert text in str(caught.value)


CONFIG = {"VLLM_CONFIG_FILE": "/c.yaml"}


@pytest.mark.parametrize(
    ("env", "limit"),
    [
        ({}, 20),
        ({"VLLM_EXTRA_ARGS": "--max-logprobs 50"}, 50),
        ({"VLLM_EXTRA_ARGS": "--max_logprobs=50 --max-logprobs 60"}, 60),
        ({"VLLM_EXTRA_ARGS": "--max-logprobs -1"}, None),
        ({"MAX_BEAM_WIDTH": "16"}, 32),
        ({"MAX_BEAM_WIDTH": "16", "VLLM_EXTRA_ARGS": "--max-logprobs=8"}, 8),
        (CONFIG, 44),
        ({**CONFIG, "MAX_BEAM_WIDTH": "30"}, 60),
        ({**CONFIG, "VLLM_EXTRA_ARGS": "--max-logprobs=8"}, 8),
    ],
)
def test_the_engines_limit_of_logprobs_is_what_its_command_line_says(
    env: dict[str, str], limit: int | None
) -> None:
    """§1.7: wherever it was said, the widest beam is half of it."""
    plan = translate(env, None, texts={"/c.yaml": "max-logprobs: 44\n"})
    assert max_logprobs(plan) == limit
