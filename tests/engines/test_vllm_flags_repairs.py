"""Aliases, folds and repairs (vllm-worker.md §4.5, §4.7, §4.8), values and precedence (§4.1, §4.2), raw options."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from pilotlight.engines.flags import FlagPlan, Source, named_files, translate
from pilotlight.engines.manifest import EngineManifest

Translate = Callable[..., FlagPlan]


@pytest.fixture
def plan(manifest: EngineManifest) -> Translate:
    def run(env: dict[str, str], **rest: Any) -> FlagPlan:
        return translate(env, manifest, run_folder="/run/w", **rest)

    return run


@pytest.fixture
def argv(plan: Translate) -> Callable[..., tuple[str, ...]]:
    def run(env: dict[str, str], **rest: Any) -> tuple[str, ...]:
        result = plan(env, **rest)
        assert not result.errors, result.errors
        return result.argv

    return run


def value_of(argv: Sequence[str], flag: str) -> Any:
    """What follows a flag, read as JSON."""
    return json.loads(argv[argv.index(flag) + 1])


# Values, §4.2


@pytest.mark.parametrize("name", ["MAX_NUM_BATCHED_TOKENS", "MAX_MODEL_LEN", "NUM_GPU_BLOCKS_OVERRIDE", "MAX_CPU_LORAS",
                                  "NUM_SPECULATIVE_TOKENS", "MAX_PARALLEL_LOADING_WORKERS"])  # fmt: skip
def test_zero_is_unset_in_these(argv, name: str) -> None:
    assert argv({name: "0"}) == ()


def test_zero_means_zero_elsewhere(argv) -> None:
    assert argv({"SEED": "0", "CPU_OFFLOAD_GB": "0"}) == ("--cpu-offload-gb", "0", "--seed", "0")


@pytest.mark.parametrize("text", ["auto", "AUTO", "32k", "1K", "4096", "1.5k"])
def test_human_numbers(argv, text: str) -> None:
    assert argv({"MAX_MODEL_LEN": text}) == ("--max-model-len", text.lower() if "A" in text else text)
    assert argv({"MAX_MODEL_LEN": "-1"}) == ("--max-model-len=-1",)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("MAX_MODEL_LEN", "long", "whole number"),
        ("MAX_NUM_SEQS", "12.5", "whole number"),
        ("GPU_MEMORY_UTILIZATION", "most", "must be a number"),
        ("COMPILATION_CONFIG", "{mode:3}", "valid JSON"),
        ("HF_OVERRIDES", "[1]", "JSON object"),
        ("LIMIT_MM_PER_PROMPT", "image=many", "image=1"),
        ("ENFORCE_EAGER", "perhaps", "true or false"),
        ("ENABLE_LOG_REQUESTS", "2", "true or false"),
        ("DTYPE", "float8", "did you mean float"),
        ("CUDAGRAPH_CAPTURE_SIZES", "1,two", "whole number"),
        ("TOOL_CALL_PARSER", "hermez", "did you mean hermes?"),
        ("REASONING_PARSER", "deepseek-r1", "did you mean deepseek_r1?"),
        ("LOAD_FORMAT", "safetensor", "did you mean safetensors?"),
        ("QUANTIZATION", "squeezellm", "removed from vLLM"),
        ("QUANTIZATION", "bitsandbytes", "vllm-bnb-plugin"),
        ("LOAD_FORMAT", "bitsandbytes", "vllm-bnb-plugin"),
        ("QUANTIZATION", "gguf", "vllm-gguf-plugin"),
        ("MODEL_NAME", "org/model-Q4.gguf", "vllm-gguf-plugin"),
        ("GUIDED_DECODING_BACKEND", "xgramar", "did you mean xgrammar?"),
        ("TASK", "transcribe", "must be one of"),
        ("ROPE_SCALING", "yarn", "JSON object"),
        ("ROPE_THETA", "big", "must be a number"),
        ("MAX_BEAM_WIDTH", "wide", "whole number"),
        ("MAX_CONCURRENCY", "0", "at least 1 or auto"),
        ("DRAIN_TIMEOUT", "soon", "at least 0"),
        ("NATIVE_STREAM_FORMAT", "xml", "tokens, sse"),
        ("RAW_OPENAI_OUTPUT", "perhaps", "true or false"),
        ("TENSOR_PARALLEL_SIZE", "two", "whole number"),
        ("VLLM_CONFIG_FILE", "/x.json", ".yaml"),
        ("MAX_BEAM_WIDTH", "-3", "from 0 to"),
        ("MAX_BEAM_WIDTH", "5000000000", "from 0 to"),
        ("MAX_LOGPROBS", "-5", "from -1"),
        ("MAX_CONCURRENCY", "2.7", "whole number"),
        ("STRUCTURED_OUTPUTS_CONFIG", "{bad", "valid JSON"),
        ("MODEL_LOADER_EXTRA_CONFIG", "{bad}", "valid JSON"),
        ("SERVED_MODEL_NAME", "-x", "begins with a dash"),
        ("SERVED_MODEL_NAME", '["a", ""]', "empty name"),
        ("SERVED_MODEL_NAME", "[a,b]", "JSON array of strings"),
        ("SERVED_MODEL_NAME", '["a", null]', "JSON array of strings"),
        ("OPENAI_SERVED_MODEL_NAME_OVERRIDE", "a,,b", "empty name"),
        ("OPENAI_SERVED_MODEL_NAME_OVERRIDE", "a, -b", "begins with a dash"),
        ("IGNORE_PATTERNS", "a,-b", "begins with a dash"),
        ("LORA_MODULES", '[{"name":"a","path":"/x","rank":8}]', "holds rank; legal are"),
        ("LORA_MODULES", "a=/x a=/y", "names an adapter twice: a"),
    ],
)
def test_what_the_engine_or_the_worker_would_refuse_is_refused_at_once(
    plan: Translate, name: str, text: str, problem: str
) -> None:
    """§10 point 13: a bad flag takes no engine start to show. The message names variable, value and what is legal."""
    errors = plan({name: text}).errors
    assert {error.variable for error in errors} == {name}
    assert problem in errors[0].message
    assert errors[0].message.startswith(f"{name}='{text}' ")


def test_booleans_never_get_a_value(argv) -> None:
    """§4.2: `--enforce-eager false` would swallow a positional."""
    assert argv({"ENFORCE_EAGER": "false", "DISABLE_LOG_STATS": "off", "ENABLE_LORA": "ON"}) == (
        "--enable-lora",
        "--no-enforce-eager",
    )


def test_a_leading_dash_uses_the_equals_form(argv) -> None:
    assert argv({"REVISION": "-v1.0"}) == ("--revision=-v1.0",)


def test_multi_values(argv) -> None:
    assert argv({"CUDAGRAPH_CAPTURE_SIZES": "1, 2,4"}) == ("--cudagraph-capture-sizes", "1", "2", "4")
    assert argv({"CUDAGRAPH_CAPTURE_SIZES": "[1,2]"}) == ("--cudagraph-capture-sizes", "1", "2")


# Aliases and folds, §4.5


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"MODEL_REVISION": "r", "REVISION": "s"}, ("--revision", "r")),
        ({"NUM_GPU_SHARD": "2"}, ("--tensor-parallel-size", "2")),
        ({"NUM_GPU_SHARD": "2", "TENSOR_PARALLEL_SIZE": "4"}, ("--tensor-parallel-size", "4")),
        ({"VLLM_ATTENTION_BACKEND": "A"}, ("--attention-backend", "A")),
        ({"VLLM_ATTENTION_BACKEND": "A", "ATTENTION_BACKEND": "B"}, ("--attention-backend", "B")),
        ({"TASK": "embed"}, ("--convert", "embed", "--runner", "pooling")),
        ({"TASK": "classify"}, ("--convert", "classify", "--runner", "pooling")),
        ({"TASK": "score"}, ("--convert", "classify", "--runner", "pooling")),
        ({"TASK": "reward"}, ("--runner", "pooling")),
        ({"TASK": "generate"}, ("--runner", "generate")),
        ({"TASK": "auto"}, ()),
        ({"WORKER_USE_RAY": "false"}, ()),
        ({"KV_CACHE_DTYPE": "fp8_e5m2"}, ("--kv-cache-dtype", "fp8")),
        ({"TOKENIZER_MODE": "slow"}, ()),
        ({"LORA_DTYPE": "float32"}, ()),
        ({"DEVICE": "neuron"}, ()),
        ({"MAX_LORA_RANK": "100"}, ("--max-lora-rank", "128")),
        ({"QUANTIZATION": "AWQ"}, ("--quantization", "awq")),
        ({"QUANTIZATION": "None"}, ()),
        ({"LIMIT_MM_PER_PROMPT": "image=1,video=0"}, ("--limit-mm-per-prompt", '{"image":1,"video":0}')),
        ({"LIMIT_MM_PER_PROMPT": '{"image": 2}'}, ("--limit-mm-per-prompt", '{"image": 2}')),
        ({"MAX_BEAM_WIDTH": "16"}, ("--max-logprobs", "32")),
        ({"MAX_BEAM_WIDTH": "10"}, ()),
        ({"MAX_BEAM_WIDTH": "16", "MAX_LOGPROBS": "64"}, ("--max-logprobs", "64")),
        ({"MAX_BEAM_WIDTH": "16", "MAX_LOGPROBS": "-1"}, ("--max-logprobs=-1",)),
        ({"VLLM_RUNPOD_MAX_NUM_SEQS": "4"}, ("--max-num-seqs", "4")),
        ({"VLLM_RUNPOD_MAX_NUM_SEQS": "4", "MAX_NUM_SEQS": "8"}, ("--max-num-seqs", "8")),
        ({"DISABLE_LOGGING_REQUEST": "1"}, ("--no-enable-log-requests",)),
        ({"DISABLE_LOG_REQUESTS": "false"}, ()),
        ({"DISABLE_LOG_REQUESTS": "1", "DISABLE_LOGGING_REQUEST": "1"}, ("--no-enable-log-requests",)),
        ({"DISABLE_LOG_REQUESTS": "1", "ENABLE_LOG_REQUESTS": "1"}, ("--enable-log-requests",)),
        ({"ENABLE_LOG_OUTPUTS": "1", "DISABLE_LOG_REQUESTS": "1"}, ("--no-enable-log-requests",)),
        ({"ENABLE_LOG_OUTPUTS": "1", "ENABLE_LOG_REQUESTS": "0"}, ("--no-enable-log-requests",)),
        ({"CUSTOM_CHAT_TEMPLATE": "/x/t.jinja"}, ("--chat-template", "/x/t.jinja")),
        ({"DISTRIBUTED_EXECUTOR_BACKEND": "MP"}, ("--distributed-executor-backend", "mp")),
        ({"IGNORE_PATTERNS": "-a"}, ("--ignore-patterns=-a",)),
        ({"GPU_MEMORY_UTILIZATION": "0.950"}, ()),
        ({"GPU_MEMORY_UTILIZATION": "0.9"}, ("--gpu-memory-utilization", "0.9")),
        ({"ENABLE_LOG_OUTPUTS": "1"}, ("--enable-log-outputs", "--enable-log-requests")),
    ],
)  # fmt: skip
def test_aliases_folds_and_repairs(argv, env: dict[str, str], expected: tuple[str, ...]) -> None:
    assert argv(env) == expected


def test_the_prefix_form_is_only_for_options(plan: Translate) -> None:
    result = plan(
        {"VLLM_RUNPOD_SEED": "1", "SEED": "2", "VLLM_RUNPOD_MAX_CONCURRENCY": "3", "VLLM_RUNPOD_MODEL": "m"}
    )
    assert result.argv == ("--seed", "2")
    assert len(result.notes) == 3
    assert {line.variable for line in result.explanations if line.source is Source.IGNORED} == {
        "VLLM_RUNPOD_SEED", "VLLM_RUNPOD_MAX_CONCURRENCY", "VLLM_RUNPOD_MODEL",
    }  # fmt: skip


def test_ray_is_used_where_it_is_installed(plan: Translate, manifest: EngineManifest) -> None:
    result = plan({"WORKER_USE_RAY": "true", "DISTRIBUTED_EXECUTOR_BACKEND": "mp"})
    assert result.argv == ()
    assert "DISTRIBUTED_EXECUTOR_BACKEND is ignored: WORKER_USE_RAY" in result.notes[0]
    assert "Ray, which is not installed" in result.notes[1]
    with_ray = replace(
        manifest, registered={**manifest.registered, "DISTRIBUTED_EXECUTOR_BACKEND": frozenset({"mp", "ray"})}
    )
    result = translate({"WORKER_USE_RAY": "true", "DISTRIBUTED_EXECUTOR_BACKEND": "mp"}, with_ray)
    assert result.argv == ("--distributed-executor-backend", "ray")


def test_plugins_bring_methods_back(manifest: EngineManifest) -> None:
    """`LOAD_FORMAT=bitsandbytes` implies the quantization."""
    known = {
        name: manifest.registered[name] | {"bitsandbytes", "gguf"} for name in ("QUANTIZATION", "LOAD_FORMAT")
    }
    with_plugins = replace(manifest, registered=known)
    result = translate({"LOAD_FORMAT": "bitsandbytes"}, with_plugins)
    assert result.argv == ("--load-format", "bitsandbytes", "--quantization", "bitsandbytes")
    assert translate({"MODEL_NAME": "x.gguf", "QUANTIZATION": "gguf"}, with_plugins).errors == ()


def test_parsers_of_plugins_are_trusted(argv) -> None:
    assert "mine" in argv({"TOOL_CALL_PARSER": "mine", "TOOL_PARSER_PLUGIN": "/p.py"})


def test_rope_goes_into_hf_overrides(argv) -> None:
    env = {
        "ROPE_SCALING": '{"rope_type":"yarn","factor":4.0}',
        "ROPE_THETA": "1e6",
        "HF_OVERRIDES": '{"a":1}',
    }
    assert value_of(argv(env), "--hf-overrides") == {
        "a": 1, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1e6,
    }  # fmt: skip
    assert argv({"ROPE_THETA": "0"}) == ()


def test_guided_decoding_backend_goes_into_its_config(argv) -> None:
    env = {"GUIDED_DECODING_BACKEND": "Outlines", "STRUCTURED_OUTPUTS_CONFIG": '{"disable_fallback":true}'}
    assert value_of(argv(env), "--structured-outputs-config") == {
        "backend": "outlines",
        "disable_fallback": True,
    }
    env["STRUCTURED_OUTPUTS_CONFIG"] = '{"backend":"xgrammar"}'
    assert value_of(argv(env), "--structured-outputs-config") == {"backend": "xgrammar"}


def test_lmcache_switches_the_hybrid_cache_manager_off(argv) -> None:
    env = {"KV_TRANSFER_CONFIG": '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'}
    assert argv(env)[0] == "--disable-hybrid-kv-cache-manager"
    assert argv({**env, "DISABLE_HYBRID_KV_CACHE_MANAGER": "0"})[0] == "--no-disable-hybrid-kv-cache-manager"
    assert len(argv({"KV_TRANSFER_CONFIG": '{"kv_connector":"NixlConnector"}'})) == 2


def test_auto_tool_choice_needs_a_parser_from_anywhere(plan: Translate, argv) -> None:
    assert plan({"ENABLE_AUTO_TOOL_CHOICE": "true"}).argv == ()
    env = {"ENABLE_AUTO_TOOL_CHOICE": "true", "VLLM_EXTRA_ARGS": "--tool-call-parser hermes"}
    assert argv(env)[0] == "--enable-auto-tool-choice"


@pytest.mark.parametrize(
    ("env", "loser"),
    [
        ({"SERVED_MODEL_NAME": "a", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "b"}, "SERVED_MODEL_NAME"),
        ({"TOKENIZER": "a", "TOKENIZER_NAME": "b"}, "TOKENIZER"),
        ({"REVISION": "a", "MODEL_REVISION": "b"}, "REVISION"),
        ({"MAX_MODEL_LENGTH": "5", "MAX_MODEL_LEN": "7"}, "MAX_MODEL_LENGTH"),
        ({"NUM_GPU_SHARD": "2", "TENSOR_PARALLEL_SIZE": "4"}, "NUM_GPU_SHARD"),
        ({"TASK": "embed", "RUNNER": "generate"}, "RUNNER"),
        ({"TASK": "embed", "CONVERT": "classify"}, "CONVERT"),
        ({"DISABLE_LOG_REQUESTS": "1", "ENABLE_LOG_REQUESTS": "1"}, "DISABLE_LOG_REQUESTS"),
        (
            {"GUIDED_DECODING_BACKEND": "outlines", "STRUCTURED_OUTPUTS_CONFIG": '{"backend":"xgrammar"}'},
            "GUIDED_DECODING_BACKEND",
        ),
        ({"VLLM_RUNPOD_SEED": "1", "SEED": "2"}, "VLLM_RUNPOD_SEED"),
    ],
)
def test_a_variable_that_loses_against_another_is_named(
    plan: Translate, env: dict[str, str], loser: str
) -> None:
    """Contract in twelve lines, 9: what cannot be honoured logs one line; with equal values there is none."""
    result = plan(env)
    (note,) = result.notes
    assert note.startswith(f"{loser} is ignored: ")
    (line,) = [line for line in result.explanations if line.variable == loser]
    assert (line.flag, line.source, line.note) == ("", Source.IGNORED, note)


@pytest.mark.parametrize(
    "env",
    [
        {"TOKENIZER": "a", "TOKENIZER_NAME": "a"},
        {"NUM_GPU_SHARD": "2", "TENSOR_PARALLEL_SIZE": "2"},
        {"TASK": "embed", "RUNNER": "pooling"},
        {"VLLM_RUNPOD_SEED": "1", "SEED": "1"},
        {"DISABLE_LOG_REQUESTS": "1", "ENABLE_LOG_REQUESTS": "0"},
    ],
)
def test_nobody_loses_who_says_the_same(plan: Translate, env: dict[str, str]) -> None:
    assert plan(env).notes == ()


@pytest.mark.parametrize("option", ["enable-auto-tool-choice", "enable-log-outputs"])
def test_switches_of_the_file_that_vllm_would_refuse_are_switched_off(plan: Translate, option: str) -> None:
    env = {"ENABLE_LOG_REQUESTS": "false"}
    result = plan(env, texts={"/vllm_config.yaml": f"{option}: true\n"})
    assert f"--no-{option}" in result.argv
    (note,) = result.notes
    assert "in the configuration file is ignored" in note


def test_names_of_the_override_are_cut_at_commas_only(argv) -> None:
    """A12, A25, §5.4: the override wins over SERVED_MODEL_NAME, all its names are served, then the model's."""
    env = {"OPENAI_SERVED_MODEL_NAME_OVERRIDE": "My Model, other", "SERVED_MODEL_NAME": "third"}
    names = ("org/Name", "org/name")
    assert argv(env, served_names=names) == ("--served-model-name", "My Model", "other", *names)
    generic = argv({"SERVED_MODEL_NAME": "a b, c"}, served_names=names)
    assert generic == ("--served-model-name", "a", "b", "c", *names)


def test_inline_templates_become_a_file(plan: Translate) -> None:
    """§1.4: the command line stays short."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    result = plan({"CUSTOM_CHAT_TEMPLATE": template})
    assert result.argv == ("--chat-template", "/run/w/chat_template.jinja")
    assert result.files == {"chat_template.jinja": template}


# LoRA, §4.8


def test_adapters_are_expanded_and_what_they_need_is_switched_on(plan: Translate) -> None:
    env = {
        "LORA_MODULES": '[{"name":"a","path":"/l/a/"},{"name":"b","path":"org/b","base_model_name":"m"}]',
        "ENABLE_LORA": "false", "MAX_LORAS": "0", "MAX_LORA_RANK": "16",
    }  # fmt: skip
    assert named_files(env) == ("/vllm_config.yaml", "/l/a/adapter_config.json", "org/b/adapter_config.json")
    result = plan(env, texts={"/l/a/adapter_config.json": '{"r": 40}'})
    assert result.errors == ()
    assert result.argv == (
        "--enable-lora", "--lora-modules", '{"name":"a","path":"/l/a/"}',
        '{"name":"b","path":"org/b","base_model_name":"m"}', "--max-loras", "3", "--max-lora-rank", "64",
    )  # fmt: skip
    assert len(result.notes) == 4


@pytest.mark.parametrize(
    "text", ["[{]", '[{"name":"a"}]', '[{"name":"a","path":7}]', "a", "=x", '"a"', '["a"]']
)
def test_bad_adapters_stop_the_start(plan: Translate, text: str) -> None:
    """G1 carried on without the adapter, and users met 404s."""
    (error,) = plan({"LORA_MODULES": text}).errors
    assert error.variable == "LORA_MODULES"


@pytest.mark.parametrize(
    ("env", "cpu", "gpu"),
    [
        ({}, {"--max-loras": "3"}, {}),
        ({"MAX_LORAS": "2"}, {"--max-loras": "3"}, {"--max-loras": "2"}),
        ({"MAX_LORAS": "4"}, {"--max-loras": "4"}, {"--max-loras": "4"}),
        ({"MAX_CPU_LORAS": "2"}, {"--max-loras": "3", "--max-cpu-loras": "3"}, {"--max-cpu-loras": "2"}),
        ({"VLLM_EXTRA_ARGS": "--max-loras 2"}, {"--max-loras": "2"}, {"--max-loras": "2"}),
    ],
)
def test_on_a_cpu_one_place_for_adapters_stays_empty(
    plan: Translate, cuda: EngineManifest, env: dict[str, str], cpu: dict[str, str], gpu: dict[str, str]
) -> None:
    """vLLM pull request 48421: else texts without an adapter get the one in the last place."""
    env = {"LORA_MODULES": "a=/l/a b=/l/b", **env}
    for result, expected in ((plan(env), cpu), (translate(env, cuda, run_folder="/run/w"), gpu)):
        words = result.argv
        found = {word: words[at + 1] for at, word in enumerate(words) if word.endswith("-loras")}
        assert found == expected


def test_no_adapters_are_no_adapters(argv) -> None:
    assert argv({"LORA_MODULES": "[]"}) == ()


# Speculative decoding, §4.7


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"SPECULATIVE_MODEL": "org/d"}, {"method": "draft_model", "model": "org/d"}),
        ({"SPECULATIVE_MODEL": "org/EAGLE3-x"}, {"method": "eagle3", "model": "org/EAGLE3-x"}),
        ({"SPECULATIVE_MODEL": "org/EAGLE-x"}, {"method": "eagle", "model": "org/EAGLE-x"}),
        ({"SPECULATIVE_MODEL": "org/medusa-x"}, {"method": "medusa", "model": "org/medusa-x"}),
        ({"SPECULATIVE_MODEL": "[ngram]", "NUM_SPECULATIVE_TOKENS": "3"}, {"method": "ngram", "num_speculative_tokens": 3}),
        ({"SPECULATIVE_MODEL": "NGram", "NUM_SPECULATIVE_TOKENS": "3"}, {"method": "ngram", "num_speculative_tokens": 3}),
        (
            {"NGRAM_PROMPT_LOOKUP_MAX": "4", "NGRAM_PROMPT_LOOKUP_MIN": "0", "NUM_SPECULATIVE_TOKENS": "3"},
            {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
        ),
        (
            {
                "SPECULATIVE_METHOD": "MLP_speculator", "SPECULATIVE_MODEL": "org/m", "SPECULATIVE_QUANTIZATION": "fp8",
                "SPECULATIVE_DRAFT_TENSOR_PARALLEL_SIZE": "1", "SPECULATIVE_MAX_MODEL_LEN": "2048",
                "SPECULATIVE_MODEL_REVISION": "r", "SPECULATIVE_ENFORCE_EAGER": "true",
            },
            {
                "method": "mlp_speculator", "model": "org/m", "quantization": "fp8", "draft_tensor_parallel_size": 1,
                "max_model_len": 2048, "revision": "r", "enforce_eager": True,
            },
        ),
        ({"SPECULATIVE_METHOD": "mtp", "NUM_SPECULATIVE_TOKENS": "1"}, {"method": "mtp", "num_speculative_tokens": 1}),
    ],
)  # fmt: skip
def test_speculative_parts_make_one_object(argv, env: dict[str, str], expected: dict[str, Any]) -> None:
    assert value_of(argv(env), "--speculative-config") == expected


def test_a_whole_configuration_wins_over_parts_and_short_options(plan: Translate) -> None:
    env = {
        "SPECULATIVE_CONFIG": '{"method":"suffix"}', "SPECULATIVE_MODEL": "org/d", "SPEC_METHOD": "ngram",
        "SPEC_TOKENS": "2",
    }  # fmt: skip
    result = plan(env)
    assert result.argv == ("--speculative-config", '{"method":"suffix"}')
    assert len(result.notes) == 3
    assert all("SPECULATIVE_CONFIG wins" in note for note in result.notes)
    assert plan({"SPEC_METHOD": "ngram", "SPEC_TOKENS": "2"}).argv == (
        "--spec-method",
        "ngram",
        "--spec-tokens",
        "2",
    )


def test_a_configuration_may_be_a_file(plan: Translate) -> None:
    env = {"SPECULATIVE_CONFIG": "/s.json"}
    assert "/s.json" in named_files(env)
    assert plan(env, texts={"/s.json": '{ "method": "suffix" }'}).argv == (
        "--speculative-config",
        '{"method":"suffix"}',
    )
    # The gateway cannot see a worker's files.
    assert (plan(env).errors, plan(env).argv) == ((), ())
    assert plan({**env, "SPEC_METHOD": "ngram"}).argv == ()
    assert plan({"SPECULATIVE_CONFIG": "[1]"}).errors
    assert "a file that can be read" in plan(env, texts={}).errors[0].message
    assert "JSON object" in plan(env, texts={"/s.json": "[]"}).errors[0].message


@pytest.mark.parametrize(
    ("env", "variable"),
    [
        ({"SPECULATIVE_METHOD": "guess", "SPECULATIVE_MODEL": "m"}, "SPECULATIVE_METHOD"),
        ({"SPECULATIVE_METHOD": "eagle"}, "SPECULATIVE_METHOD"),
        ({"NGRAM_PROMPT_LOOKUP_MAX": "4"}, "NUM_SPECULATIVE_TOKENS"),
        ({"SPECULATIVE_MODEL": "m", "NUM_SPECULATIVE_TOKENS": "some"}, "NUM_SPECULATIVE_TOKENS"),
        ({"SPECULATIVE_MODEL": "m", "SPECULATIVE_ENFORCE_EAGER": "some"}, "SPECULATIVE_ENFORCE_EAGER"),
    ],
)
def test_bad_speculative_parts(plan: Translate, env: dict[str, str], variable: str) -> None:
    assert [error.variable for error in plan(env).errors] == [variable]


def test_parts_that_ask_for_nothing(plan: Translate) -> None:
    result = plan(
        {"NUM_SPECULATIVE_TOKENS": "5", "SPECULATIVE_ENFORCE_EAGER": "false", "NGRAM_PROMPT_LOOKUP_MAX": "0"}
    )
    assert result.argv == ()
    assert len(result.notes) == 1


# Precedence, §4.1


def test_the_order_of_precedence(manifest: EngineManifest, cuda: EngineManifest) -> None:
    """Extra arguments, baked, alias, variable, file, worker's default."""
    texts = {"/vllm_config.yaml": "max-num-seqs: 1\nrevision: file\nseed: 1\ngpu-memory-utilization: 0.5\n"}
    env = {
        "VLLM_EXTRA_ARGS": "--seed 5 --max-num-seq 6",
        "SEED": "4",
        "MAX_NUM_SEQS": "3",
        "REVISION": "variable",
    }
    result = translate(env, cuda, texts=texts, defaults={"SEED": "0"})
    assert result.argv == (
        "--revision",
        "variable",
        "--config",
        "/vllm_config.yaml",
        "--seed",
        "5",
        "--max-num-seq",
        "6",
    )
    env |= {"MODEL_REVISION": "alias", "QUANTIZATION": "awq"}
    result = translate(env, cuda, texts=texts)
    assert result.argv[:4] == ("--quantization", "awq", "--revision", "alias")
    baked = {"MODEL_REVISION": "baked", "QUANTIZATION": "gptq", "TOKENIZER_NAME": "/tok"}
    result = translate(env, cuda, texts=texts, baked=baked)
    assert result.argv[:6] == ("--quantization", "gptq", "--revision", "baked", "--tokenizer", "/tok")
    assert sum("baked in" in note for note in result.notes) == 2
    by_variable = {(line.variable, line.flag): line.source for line in result.explanations}
    assert by_variable["QUANTIZATION", "--quantization"] is Source.BAKED
    assert by_variable["VLLM_EXTRA_ARGS", "--seed"] is Source.EXTRA_ARGS
    assert by_variable["VLLM_CONFIG_FILE", "--gpu-memory-utilization"] is Source.CONFIG_FILE
    assert by_variable["SEED", ""] is Source.IGNORED


ALIAS = {"TOKENIZER_NAME": "alias"}
GENERIC = {"TOKENIZER": "generic"}
EXTRA = {"VLLM_EXTRA_ARGS": "--tokenizer extra"}
FILE = {"texts": {"/vllm_config.yaml": "tokenizer: file"}}
BAKED = {"baked": {"TOKENIZER_NAME": "/baked"}}


@pytest.mark.parametrize(
    ("env", "rest", "winner"),
    [
        ({**ALIAS, **GENERIC}, {}, "alias"),
        (ALIAS, FILE, "alias"),
        (GENERIC, FILE, "generic"),
        ({**ALIAS, **EXTRA}, {}, "extra"),
        ({**GENERIC, **EXTRA}, {}, "extra"),
        (EXTRA, FILE, "extra"),
        (EXTRA, BAKED, "extra"),
        (ALIAS, BAKED, "/baked"),
        (GENERIC, BAKED, "/baked"),
        ({}, {**BAKED, **FILE}, "/baked"),
        ({}, {"defaults": {"TOKENIZER": "default"}}, "default"),
        (ALIAS, {"defaults": {"TOKENIZER": "default"}}, "alias"),
        (EXTRA, {"defaults": {"TOKENIZER": "default"}}, "extra"),
    ],
)
def test_each_pair_of_the_order_of_precedence(
    argv, env: dict[str, str], rest: dict[str, Any], winner: str
) -> None:
    """§4.1: every two neighbours, and who stand further apart; the option is written once."""
    words = argv(env, **rest)
    assert words.count("--tokenizer") == 1
    assert words[words.index("--tokenizer") + 1] == winner


def test_the_file_wins_over_the_workers_defaults(argv) -> None:
    assert argv({}, **FILE, defaults={"TOKENIZER": "default"}) == ("--config", "/vllm_config.yaml")


def test_what_is_baked_and_asked_for_alike_is_not_mentioned(manifest: EngineManifest) -> None:
    baked = {"MODEL_NAME": "/models/m", "MODEL_ID": "org/m", "QUANTIZATION": "awq"}
    for asked in ("org/m", "/models/m"):
        assert translate({"MODEL_NAME": asked, "QUANTIZATION": "awq"}, manifest, baked=baked).notes == ()
    (note,) = translate({"MODEL_NAME": "org/other"}, manifest, baked=baked).notes
    assert "org/other" in note
    # A folder has no revision.
    in_folder = translate({"MODEL_REVISION": "v1"}, manifest, baked={**baked, "MODEL_REVISION": ""})
    assert in_folder.argv == ("--quantization", "awq")


def test_gpus_are_filled_to_95_percent_unless_somebody_says_otherwise(
    manifest: EngineManifest, cuda: EngineManifest
) -> None:
    """§8 A4."""
    assert translate({}, manifest).argv == ()
    assert translate({}, cuda).argv == ("--gpu-memory-utilization", "0.95")
    assert translate({"GPU_MEMORY_UTILIZATION": "0.5"}, cuda).argv == ("--gpu-memory-utilization", "0.5")
    assert translate({"VLLM_EXTRA_ARGS": "--gpu-memory-utilization=0.5"}, cuda).argv == (
        "--gpu-memory-utilization=0.5",
    )
    file = {"VLLM_CONFIG_FILE": "/c.yml"}
    texts = {"/c.yml": "gpu_memory_utilization: 0.5"}
    assert translate(file, cuda, texts=texts).argv == ("--config", "/c.yml")


def test_worker_defaults_yield_to_everybody(manifest: EngineManifest) -> None:
    defaults = {"SHUTDOWN_TIMEOUT": "30", "NO_SUCH_OPTION": "x"}
    assert translate({}, manifest, defaults=defaults).argv == ("--shutdown-timeout", "30")
    assert translate({"SHUTDOWN_TIMEOUT": "5"}, manifest, defaults=defaults).argv == (
        "--shutdown-timeout",
        "5",
    )
    env = {"VLLM_EXTRA_ARGS": "--shutdown-timeout=5"}
    assert translate(env, manifest, defaults=defaults).argv == ("--shutdown-timeout=5",)


def test_names_of_the_configuration_file_stay(manifest: EngineManifest) -> None:
    """§5.4: what somebody chose first, the model's own names after it."""
    texts = {"/vllm_config.yaml": "served-model-name: mine\n"}
    result = translate({}, manifest, texts=texts, served_names=("org/m", "/f"))
    assert result.argv == ("--served-model-name", "mine", "org/m", "/f", "--config", "/vllm_config.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("max-model-length: 5", "did you mean --max-model-len?"),
        ("api-key: x", "the worker sets it itself"),
        ("swap-space: 4", "KV_OFFLOADING_SIZE"),
        ("- a", "one option per line"),
        ("a: [", "YAML"),
    ],
)
def test_a_configuration_file_is_checked(plan: Translate, text: str, problem: str) -> None:
    (error,) = plan({}, texts={"/vllm_config.yaml": text}).errors
    assert error.variable == "VLLM_CONFIG_FILE"
    assert problem in error.message


def test_a_configuration_file_that_is_named_must_exist(plan: Translate) -> None:
    assert plan({}, texts={}).argv == ()
    assert "does not exist" in plan({"VLLM_CONFIG_FILE": "/x.yaml"}, texts={}).errors[0].message
    # The gateway cannot see a worker's files.
    assert plan({"VLLM_CONFIG_FILE": "/x.yaml"}).argv == ("--config", "/x.yaml")
    result = plan({}, texts={"/vllm_config.yaml": "port: 80\nmodel: org/m\nenable_lora: true"})
    assert (result.errors, len(result.notes)) == ((), 1)


# Raw arguments, §4.10


@pytest.mark.parametrize("option", [
    "--swap-space", "--disable-log-requests", "--guided-decoding-backend", "--rope-scaling", "--rope-theta", "--task",
    "--device", "--num-scheduler-steps", "--max-seq-len-to-capture", "--max-context-len-to-capture",
    "--scheduler-delay-factor", "--preemption-mode", "--use-v2-block-manager", "--worker-use-ray",
    "--enable-prompt-adapter", "--qlora-adapter-name-or-path", "--calculate-kv-scales", "--override-attention-dtype",
    "--cuda-graph-sizes", "--enable-reasoning", "--tokenizer-pool-size", "--num-lookahead-slots",
    "--lora-extra-vocab-size", "--long-lora-scaling-factors", "--quantization-param-path",
    "--spec-decoding-acceptance-method", "--override-pooler-config", "--num-redundant-experts", "--enable-lora-bias",
    "--max-num-partial-prefills", "--max-long-partial-prefills",
])  # fmt: skip
def test_options_that_vllm_lost_are_refused_with_their_replacement(plan: Translate, option: str) -> None:
    """Every one of §4.10."""
    (error,) = plan({"VLLM_EXTRA_ARGS": f"{option} 1"}).errors
    assert option in error.message
    assert "no longer has" in error.message


def test_raw_arguments_keep_their_quoting(argv) -> None:
    """§10 point 7."""
    text = (
        """--hf-overrides '{"a": "b c"}' --max_num_seqs 4 --chat-template "a\\"b" --no-enforce-eager -tp 2"""
    )
    assert argv({"VLLM_EXTRA_ARGS": text, "TENSOR_PARALLEL_SIZE": "1", "ENFORCE_EAGER": "1"}, gpus=4) == (
        "--hf-overrides", '{"a": "b c"}', "--max_num_seqs", "4", "--chat-template", 'a"b', "--no-enforce-eager", "-tp", "2",
    )  # fmt: skip


def test_beginnings_of_several_options_are_refused(plan: Translate) -> None:
    (error,) = plan({"VLLM_EXTRA_ARGS": "--max-num-s 5"}).errors
    assert "--max-num-scheduled-tokens or --max-num-seqs" in error.message


def test_unique_beginnings_and_keys_of_json_options_are_legal(argv) -> None:
    assert argv({"VLLM_EXTRA_ARGS": "--max-model 5 --compilation-config.mode 3", "MAX_MODEL_LEN": "7"}) == (
        "--max-model", "5", "--compilation-config.mode", "3",
    )  # fmt: skip


# Names that nobody knows


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MAX_MODEL_LENGHT", "MAX_MODEL_LEN"),
        ("MAX_MODL_LEN", "MAX_MODEL_LEN"),
        ("GPU_MEMORY_UTILISATION", "GPU_MEMORY_UTILIZATION"),
        ("QUANTISATION", "QUANTIZATION"),
        ("MAX_CONCURENCY", "MAX_CONCURRENCY"),
        ("VLLM_EXTRA_ARG", "VLLM_EXTRA_ARGS"),
        ("LORA_MODULE", "LORA_MODULES"),
        ("TOOL_CALL_PARSERS", "TOOL_CALL_PARSER"),
    ],
)
def test_typing_errors_are_suggested(plan: Translate, name: str, meant: str) -> None:
    assert plan({name: "1"}).notes == (f"{name} is unknown and was ignored; did you mean {meant}?",)


def test_strangers_are_nobodys_business(plan: Translate) -> None:
    strangers = dict.fromkeys(
        [
            "PATH", "HOME", "HOSTNAME", "LANG", "PWD", "SHLVL", "TERM", "USER", "LOGNAME", "SHELL", "DEBIAN_FRONTEND",
            "KUBERNETES_SERVICE_HOST", "CUDA_VERSION", "NVIDIA_VISIBLE_DEVICES", "NV_LIBNCCL_PACKAGE", "LD_LIBRARY_PATH",
            "PYTHONPATH", "SSL_CERT_FILE", "NCCL_DEBUG", "OMP_NUM_THREADS", "LESSOPEN", "COLORTERM", "XDG_RUNTIME_DIR",
            "PUBLIC_KEY", "LIBRARY_PATH", "GPG_KEY", "TZ", "DISPLAY", "VIRTUAL_ENV", "JUPYTER_PASSWORD", "no_proxy",
        ],
        "1",
    )  # fmt: skip
    result = plan(strangers)
    assert (result.argv, result.notes, result.explanations) == ((), (), ())


def test_an_option_that_this_vllm_does_not_have_is_said(manifest: EngineManifest) -> None:
    older = replace(
        manifest, flags={name: flag for name, flag in manifest.flags.items() if name != "RESPONSE_ROLE"}
    )
    result = translate({"OPENAI_RESPONSE_ROLE": "bot"}, older)
    assert result.argv == ()
    assert result.notes == ("OPENAI_RESPONSE_ROLE has no effect: vLLM 0.32.0 has no option --response-role",)


def test_an_older_vllm_still_gets_what_it_understands(manifest: EngineManifest) -> None:
    """Obsolete is what the installed vLLM no longer has."""
    flag = replace(manifest.flags["CPU_OFFLOAD_GB"], flag="--swap-space")
    older = replace(manifest, flags={**manifest.flags, "SWAP_SPACE": flag})
    assert translate({"SWAP_SPACE": "4"}, older).argv == ("--swap-space", "4")
