"""Values of variables (vllm-worker.md §4.2), and a vLLM that nobody has asked for its options (§4.3)."""

from __future__ import annotations

import pytest

from pilotlight.engines.flags import translate
from pilotlight.engines.flags.values import parse_config, parse_json
from pilotlight.engines.manifest import EngineManifest


@pytest.mark.parametrize("value", ["", "  ", "None", "none", "null", "NULL", "~"])
def test_template_spellings_of_unset(manifest: EngineManifest, value: str) -> None:
    """§4.2: console templates send empty strings and `None`."""
    assert translate({"SEED": value, "MAX_MODEL_LEN": value}, manifest).argv == ()


@pytest.mark.parametrize("value", ["true", "1", "Yes", "on", "y", "T"])
def test_truthy_pair_and_switch(manifest: EngineManifest, value: str) -> None:
    env = {"ENFORCE_EAGER": value, "DISABLE_LOG_STATS": value}
    assert translate(env, manifest).argv == ("--disable-log-stats", "--enforce-eager")


@pytest.mark.parametrize("value", ["false", "0", "No", "off", "n", "F"])
def test_falsy_pair_and_switch(manifest: EngineManifest, value: str) -> None:
    env = {"ENFORCE_EAGER": value, "DISABLE_LOG_STATS": value}
    assert translate(env, manifest).argv == ("--no-enforce-eager",)


@pytest.mark.parametrize("value", ["0", "00", "0.0"])
def test_every_spelling_of_zero_is_unset_where_consoles_send_it(manifest: EngineManifest, value: str) -> None:
    """§4.2; also where an older name holds the wish."""
    assert translate({"MAX_MODEL_LEN": value, "MAX_CPU_LORAS": value}, manifest).argv == ()
    older = translate({"MAX_MODEL_LEN": value, "MAX_MODEL_LENGTH": "7"}, manifest)
    assert older.argv == ("--max-model-len", "7")
    parts = {"SPECULATIVE_MODEL": "org/d", "NUM_SPECULATIVE_TOKENS": value}
    assert translate(parts, manifest).argv == (
        "--speculative-config",
        '{"method":"draft_model","model":"org/d"}',
    )


@pytest.mark.parametrize("text", ["2048.0", "1.5K", "1.5M", "٣k", "1.k", "k", "12kk"])
def test_sizes_that_the_real_parser_refuses(manifest: EngineManifest, text: str) -> None:
    (error,) = translate({"MAX_MODEL_LEN": text}, manifest).errors
    assert "whole number" in error.message


def test_sizes_within_json_where_vllm_takes_them(manifest: EngineManifest) -> None:
    """Options for whole configurations do; plain `json.loads` does not (vLLM 0.32, engine/arg_utils.py)."""
    assert parse_config('{"a": 80m, "b": [1K, 1.5k], "c": "9k \\"1k"}') == {
        "a": 80_000_000, "b": [1024, 1500], "c": '9k "1k',
    }  # fmt: skip
    assert parse_config('{"a": 1.5K}') is None
    kept = translate({"KV_TRANSFER_CONFIG": '{"buffer": 80m}'}, manifest)
    assert kept.argv == ("--kv-transfer-config", '{"buffer": 80m}')
    for name in ("HF_OVERRIDES", "SPECULATIVE_CONFIG", "LIMIT_MM_PER_PROMPT", "MODEL_LOADER_EXTRA_CONFIG"):
        env = {name: '{"max_position_embeddings": 32k}', "ROPE_THETA": "1e6"}
        assert [error.variable for error in translate(env, manifest).errors] == [name]
    merged = translate(
        {"STRUCTURED_OUTPUTS_CONFIG": '{"x": 2k}', "GUIDED_DECODING_BACKEND": "xgrammar"}, manifest
    )
    assert merged.argv == ("--structured-outputs-config", '{"x":2000,"backend":"xgrammar"}')


DEEP = "[" * 2000 + "]" * 2000


@pytest.mark.parametrize(
    "text", ["²", "9" * 5000, "[" * 2000, "{" * 2000, DEEP, '{"a":' * 200 + "1" + "}" * 200]
)
@pytest.mark.parametrize(
    "name",
    [
        "MAX_LORA_RANK", "HF_OVERRIDES", "LORA_MODULES", "SPECULATIVE_CONFIG", "COMPILATION_CONFIG",
        "LIMIT_MM_PER_PROMPT", "STRUCTURED_OUTPUTS_CONFIG", "NUM_SPECULATIVE_TOKENS", "ROPE_SCALING",
    ],
)  # fmt: skip
def test_no_value_is_too_strange_to_be_refused(manifest: EngineManifest, name: str, text: str) -> None:
    env = {name: text, "SPECULATIVE_MODEL": "org/d", "GUIDED_DECODING_BACKEND": "xgrammar"}
    (error,) = translate(env, manifest, texts={}).errors
    assert error.variable == name
    assert len(error.message) < 400


def test_json_that_is_nested_too_deeply_is_none() -> None:
    assert parse_json(DEEP) is None
    assert parse_json('{"a":' * 99 + "1" + "}" * 99) is not None


@pytest.mark.parametrize("text", ["seed: 2020-01-01\n", "hf-overrides: {when: 2020-01-01}\n"])
def test_a_date_in_the_configuration_file_can_be_shown(manifest: EngineManifest, text: str) -> None:
    lines = translate({}, manifest, texts={"/vllm_config.yaml": text}).explanations
    assert "2020-01-01" in lines[0].value


def test_a_configuration_file_that_is_nested_too_deeply(manifest: EngineManifest) -> None:
    (error,) = translate({}, manifest, texts={"/vllm_config.yaml": f"seed: {DEEP}"}).errors
    assert error.variable == "VLLM_CONFIG_FILE"


def test_without_a_manifest_only_aliases_adapters_and_extra_arguments_pass() -> None:
    """§4.3, fallback; a weak alias does not beat the option's own name there either (§4.5)."""
    result = translate({"MAX_MODEL_LENGTH": "5", "SEED": "1", "VLLM_EXTRA_ARGS": "--any 1"}, None)
    assert result.argv == ("--max-model-len", "5", "--any", "1")
    assert "no manifest" in result.notes[0]
    both = translate({"NUM_GPU_SHARD": "2", "TENSOR_PARALLEL_SIZE": "4"}, None)
    assert both.argv == ("--tensor-parallel-size", "4")
    adapters = translate({"LORA_MODULES": "a=org/a b=org/b"}, None)
    assert adapters.argv == ("--enable-lora", "--lora-modules", "a=org/a", "b=org/b")
