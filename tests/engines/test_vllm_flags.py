"""Environment to command line: vllm-worker.md §4.1, §4.2, §4.4, §4.5."""

from __future__ import annotations

import pytest

from pilotlight.engines.manifest import EngineFlag, EngineManifest
from pilotlight.engines.vllm_flags import FlagPlan, mask_secrets, translate


def flag(name: str, kind: str = "value", *, multi: bool = False, choices: tuple[str, ...] | None = None):
    return EngineFlag(flag=f"--{name}", kind=kind, multi=multi, choices=choices)  # type: ignore[arg-type]


FLAGS = [
    flag("max-model-len"),
    flag("seed"),
    flag("revision"),
    flag("tokenizer"),
    flag("tokenizer-mode", choices=("auto", "mistral")),
    flag("dtype", choices=("auto", "bfloat16", "float16")),
    flag("enforce-eager", "pair"),
    flag("enable-lora", "pair"),
    flag("enable-log-requests", "pair"),
    flag("enable-log-outputs", "pair"),
    flag("enable-auto-tool-choice", "pair"),
    flag("tool-call-parser"),
    flag("disable-log-stats", "switch"),
    flag("served-model-name", multi=True),
    flag("ignore-patterns", multi=True),
    flag("lora-modules", multi=True),
    flag("max-lora-rank", choices=("1", "8", "16", "32", "64")),
    flag("chat-template"),
    flag("response-role"),
    flag("hf-overrides"),
    flag("num-gpu-blocks-override"),
    flag("tensor-parallel-size"),
    flag("gpu-memory-utilization"),
    flag("max-parallel-loading-workers"),
    flag("attention-backend"),
    flag("model"),
    flag("host"),
    flag("port"),
    flag("uds"),
    flag("api-key"),
    flag("hf-token"),
    flag("master-addr"),
    flag("ssl-keyfile"),
    flag("root-path"),
    flag("config"),
]
MANIFEST = EngineManifest(
    version="0.32.0",
    torch_version="2.13.0+cpu",
    platform="cpu",
    flags={item.flag[2:].replace("-", "_").upper(): item for item in FLAGS},
    architectures=frozenset({"LlamaForCausalLM"}),
)


def plan(**env: str) -> FlagPlan:
    return translate(env, MANIFEST, run_folder="/run/w")


def argv(**env: str) -> list[str]:
    result = plan(**env)
    assert not result.errors, result.errors
    return list(result.argv)


def test_every_option_can_be_set_by_its_name_in_capitals() -> None:
    assert argv(MAX_MODEL_LEN="32k", SEED="0") == ["--max-model-len", "32k", "--seed", "0"]


@pytest.mark.parametrize("value", ["", "  ", "None", "none", "null", "NULL", "~"])
def test_template_spellings_of_unset(value: str) -> None:
    """§4.2: console templates send empty strings and `None`."""
    assert argv(SEED=value, MAX_MODEL_LEN=value) == []


@pytest.mark.parametrize("value", ["true", "1", "Yes", "on", "y", "T"])
def test_truthy_pair(value: str) -> None:
    assert argv(ENFORCE_EAGER=value, DISABLE_LOG_STATS=value) == ["--disable-log-stats", "--enforce-eager"]


@pytest.mark.parametrize("value", ["false", "0", "No", "off", "n", "F"])
def test_falsy_pair_and_switch(value: str) -> None:
    assert argv(ENFORCE_EAGER=value, DISABLE_LOG_STATS=value) == ["--no-enforce-eager"]


def test_a_bad_boolean_names_variable_value_and_what_is_legal() -> None:
    (error,) = plan(ENFORCE_EAGER="maybe").errors
    assert (error.variable, error.value, error.legal) == ("ENFORCE_EAGER", "maybe", ("true", "false"))
    assert "ENFORCE_EAGER='maybe'" in error.message


def test_a_bad_choice_lists_the_legal_values() -> None:
    (error,) = plan(DTYPE="float17").errors
    assert error.legal == ("auto", "bfloat16", "float16")


def test_choices_match_without_case() -> None:
    assert argv(DTYPE="BFloat16") == ["--dtype", "bfloat16"]


def test_a_template_default_that_vllm_lost_is_dropped_with_a_note() -> None:
    result = plan(TOKENIZER_MODE="slow")
    assert (result.argv, result.errors) == ((), ())
    assert "TOKENIZER_MODE=slow" in result.notes[0]


def test_multi_values_are_split() -> None:
    expected = ["--ignore-patterns", "a/*", "b"]
    assert argv(IGNORE_PATTERNS='["a/*", "b"]') == expected
    assert argv(IGNORE_PATTERNS="a/*, b") == expected


def test_values_with_a_leading_dash_use_the_equals_form() -> None:
    assert argv(MAX_MODEL_LEN="-1") == ["--max-model-len=-1"]


def test_zero_is_unset_only_where_the_console_sends_it() -> None:
    assert argv(MAX_MODEL_LEN="0", NUM_GPU_BLOCKS_OVERRIDE="0", SEED="0") == ["--seed", "0"]


@pytest.mark.parametrize(
    "name",
    [
        "HOST",
        "PORT",
        "UDS",
        "API_KEY",
        "MODEL",
        "HF_TOKEN",
        "MASTER_ADDR",
        "SSL_KEYFILE",
        "ROOT_PATH",
        "CONFIG",
    ],
)
def test_owned_and_colliding_names_are_not_mapped(name: str) -> None:
    """§4.4."""
    assert argv(**{name: "x"}) == []


def test_aliases_beat_the_generic_name() -> None:
    """§4.1 step 2."""
    env = {"TOKENIZER_NAME": "a", "TOKENIZER": "b", "MODEL_REVISION": "r", "OPENAI_RESPONSE_ROLE": "bot"}
    assert argv(**env) == ["--response-role", "bot", "--revision", "r", "--tokenizer", "a"] or set(argv(**env)) == {
        "--tokenizer", "a", "--revision", "r", "--response-role", "bot",
    }  # fmt: skip
    assert argv(MAX_MODEL_LENGTH="5", MAX_MODEL_LEN="7") == ["--max-model-len", "7"]
    assert argv(MAX_MODEL_LENGTH="5") == ["--max-model-len", "5"]


def test_served_names_override_first_then_repository() -> None:
    """§5.4 and A12: the override wins over SERVED_MODEL_NAME; the repository id stays an alias."""
    result = translate(
        {"OPENAI_SERVED_MODEL_NAME_OVERRIDE": "gpt, mine", "SERVED_MODEL_NAME": "other"},
        MANIFEST,
        served_names=("org/Name", "org/name"),
    )
    assert result.argv == ("--served-model-name", "gpt", "mine", "org/Name", "org/name")
    result = translate({"SERVED_MODEL_NAME": "other"}, MANIFEST, served_names=("org/name",))
    assert result.argv == ("--served-model-name", "other", "org/name")


def test_inline_chat_template_becomes_a_file() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    result = plan(CUSTOM_CHAT_TEMPLATE=template)
    assert result.argv == ("--chat-template", "/run/w/chat_template.jinja")
    assert result.files == {"chat_template.jinja": template}
    assert plan(CUSTOM_CHAT_TEMPLATE="/x/t.jinja").argv == ("--chat-template", "/x/t.jinja")


def test_request_logging_is_never_switched_on_implicitly() -> None:
    """A18."""
    assert argv(DISABLE_LOG_REQUESTS="false") == []
    assert argv(DISABLE_LOG_REQUESTS="true") == ["--no-enable-log-requests"]
    assert set(argv(ENABLE_LOG_OUTPUTS="true")) == {"--enable-log-outputs", "--enable-log-requests"}


def test_auto_tool_choice_needs_a_parser() -> None:
    result = plan(ENABLE_AUTO_TOOL_CHOICE="true")
    assert result.argv == ()
    assert "TOOL_CALL_PARSER" in result.notes[0]
    assert "--enable-auto-tool-choice" in argv(ENABLE_AUTO_TOOL_CHOICE="true", TOOL_CALL_PARSER="hermes")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name":"a","path":"org/a"}', ['{"name":"a","path":"org/a"}']),
        (
            '[{"name":"a","path":"x"},{"name":"b","path":"y"}]',
            ['{"name":"a","path":"x"}', '{"name":"b","path":"y"}'],
        ),
        ("a=org/a b=org/b", ["a=org/a", "b=org/b"]),
    ],
)
def test_lora_modules_become_one_argument_each(text: str, expected: list[str]) -> None:
    """§4.8, and ENABLE_LORA is implied."""
    result = argv(LORA_MODULES=text)
    assert result[result.index("--lora-modules") + 1 :] == expected
    assert "--enable-lora" in result


@pytest.mark.parametrize("text", ["[{]", '[{"name":"a"}]', "a", '"a"'])
def test_bad_lora_modules_stop_the_start(text: str) -> None:
    (error,) = plan(LORA_MODULES=text).errors
    assert error.variable == "LORA_MODULES"


def test_lora_rank_is_raised_to_the_next_legal_one() -> None:
    assert argv(MAX_LORA_RANK="20") == ["--max-lora-rank", "32"]


def test_extra_arguments_are_checked_before_the_slow_import() -> None:
    """§4.10."""
    assert argv(VLLM_EXTRA_ARGS="--seed 3 --no-enforce-eager --hf-overrides '{\"a\": 1}'") == [
        "--seed", "3", "--no-enforce-eager", "--hf-overrides", '{"a": 1}',
    ]  # fmt: skip
    assert argv(VLLM_EXTRA_ARGS="--gpu-mem 0.5") == ["--gpu-mem", "0.5"]
    (error,) = plan(VLLM_EXTRA_ARGS="--max-model-length 5 --sed 1"[:21]).errors
    assert "--max-model-len" in error.message
    (error,) = plan(VLLM_EXTRA_ARGS="--uds /x").errors
    assert "the worker sets it itself" in error.message
    (error,) = plan(VLLM_EXTRA_ARGS="--seed 'x").errors
    assert error.variable == "VLLM_EXTRA_ARGS"


def test_obsolete_variables_say_why_once_and_harmless_values_say_nothing() -> None:
    result = plan(SWAP_SPACE="4", DEVICE="auto", MAX_PARALLEL_LOADING_WORKERS="1")
    assert result.argv == ()
    assert len(result.notes) == 1
    assert "SWAP_SPACE" in result.notes[0]


def test_a_near_miss_is_suggested_and_strangers_are_ignored() -> None:
    result = plan(MAX_MODEL_LENGHT="5", PATH="/bin", KUBERNETES_SERVICE_HOST="x", MAX_CONCURRENCY="3")
    assert result.argv == ()
    assert result.notes == ("MAX_MODEL_LENGHT is unknown and was ignored; did you mean MAX_MODEL_LENGTH?",)


def test_without_a_manifest_only_aliases_and_extra_arguments_pass() -> None:
    """§4.3, fallback."""
    result = translate({"MAX_MODEL_LENGTH": "5", "SEED": "1", "VLLM_EXTRA_ARGS": "--any 1"}, None)
    assert result.argv == ("--max-model-len", "5", "--any", "1")
    assert "no manifest" in result.notes[0]


def test_the_console_form_with_all_its_defaults_has_no_errors() -> None:
    """§5.5: the form sends its defaults, so presence is not intent."""
    form = {
        "TENSOR_PARALLEL_SIZE": "1", "MAX_MODEL_LEN": "auto", "MAX_PARALLEL_LOADING_WORKERS": "1", "DEVICE": "auto",
        "SCHEDULER_DELAY_FACTOR": "0", "DTYPE": "auto", "TOKENIZER_MODE": "auto", "SEED": "0", "ENFORCE_EAGER": "false",
        "LORA_MODULES": "[]", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "", "CUSTOM_CHAT_TEMPLATE": "", "MODEL_REVISION": "",
    }  # fmt: skip
    result = plan(**form)
    assert (result.errors, result.notes) == ((), ())


def test_secrets_are_masked_for_logs() -> None:
    """§4.1 step 7."""
    argv = ["--hf-token", "hf_x", "--tokenizer", "t", "--api-key", "a", "b", "--seed", "1", "--x-token=y"]
    assert mask_secrets(argv) == [
        "--hf-token", "***", "--tokenizer", "t", "--api-key", "***", "***", "--seed", "1", "--x-token=***",
    ]  # fmt: skip
