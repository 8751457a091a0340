"""Which repositories an environment asks for, and folders in their place (vllm-worker.md §4.7 to §4.9, §5.3)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pilotlight.domain.repository import WEIGHT_PATTERNS, Repository, RepositoryKind
from pilotlight.engines.repositories import (
    may_ask_hub,
    object_store_problem,
    repositories_needed,
    with_folders,
)


def found(env: dict[str, str]) -> list[tuple[str, str, str | None, str]]:
    return [(one.variable, one.name, one.revision, str(one.kind)) for one in repositories_needed(env)]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, []),
        ({"MODEL_NAME": "None"}, []),
        ({"MODEL_NAME": "org/m"}, [("MODEL_NAME", "org/m", None, "model")]),
        ({"MODEL_NAME": "org/m", "REVISION": "v1"}, [("MODEL_NAME", "org/m", "v1", "model")]),
        (
            {"MODEL_NAME": "org/m", "MODEL_REVISION": "v2", "REVISION": "v1"},
            [("MODEL_NAME", "org/m", "v2", "model")],
        ),
        ({"MODEL_NAME": "org/m", "LOAD_FORMAT": "dummy"}, [("MODEL_NAME", "org/m", None, "config")]),
        ({"MODEL_NAME": "/m"}, []),
        ({"MODEL_NAME": "./m", "TOKENIZER": "~/t"}, []),
        ({"MODEL_NAME": "S3://bucket/m"}, []),
        (
            {"MODEL_NAME": "/m", "TOKENIZER_NAME": "org/t", "TOKENIZER_REVISION": "v1"},
            [("TOKENIZER_NAME", "org/t", "v1", "config")],
        ),
        ({"TOKENIZER": "org/t"}, [("TOKENIZER", "org/t", None, "config")]),
        ({"HF_CONFIG_PATH": "org/c"}, [("HF_CONFIG_PATH", "org/c", None, "config")]),
        ({"SPECULATIVE_MODEL": "[ngram]"}, []),
        ({"SPECULATIVE_MODEL": "NGram"}, []),
        ({"LORA_MODULES": "[" * 5000}, []),
        ({"SPECULATIVE_CONFIG": '{"method": "ngram", "num_speculative_tokens": 3}'}, []),
        (
            {"SPECULATIVE_MODEL": "org/d", "SPECULATIVE_MODEL_REVISION": "v3"},
            [("SPECULATIVE_MODEL", "org/d", "v3", "model")],
        ),
        (
            {"SPECULATIVE_CONFIG": '{"model": "org/e", "revision": "r"}', "SPECULATIVE_MODEL": "org/d"},
            [("SPECULATIVE_CONFIG", "org/e", "r", "model")],
        ),
        ({"SPECULATIVE_CONFIG": "/config.json"}, []),
        (
            {"LORA_MODULES": '[{"name": "a", "path": "org/a"}, {"name": "b", "path": "/b"}]'},
            [("LORA_MODULES", "org/a", None, "adapter")],
        ),
        ({"LORA_MODULES": "a=org/a, b=org/a"}, [("LORA_MODULES", "org/a", None, "adapter")]),
        ({"LORA_MODULES": "nonsense"}, []),
        ({"DEFAULT_MM_LORAS": '{"audio": "org/x"}'}, [("DEFAULT_MM_LORAS", "org/x", None, "adapter")]),
        (
            {"EXTRA_REPOS": "org/x, org/y@v2"},
            [("EXTRA_REPOS", "org/x", None, "extra"), ("EXTRA_REPOS", "org/y", "v2", "extra")],
        ),
        ({"EXTRA_REPOS": '["org/x"]'}, [("EXTRA_REPOS", "org/x", None, "extra")]),
    ],
)
def test_what_is_needed(env, expected):
    assert found(env) == expected


def test_a_tokenizer_of_the_models_own_repository_is_not_fetched_twice():
    env = {"MODEL_NAME": "org/m", "MODEL_REVISION": "v1", "TOKENIZER_NAME": "org/m"}
    assert len(repositories_needed(env)) == 1
    assert len(repositories_needed(env | {"TOKENIZER_REVISION": "v1"})) == 1
    assert len(repositories_needed(env | {"TOKENIZER_REVISION": "v2"})) == 2


def test_load_format_and_ignore_patterns_decide_what_is_fetched():
    """§4.9 LOAD_FORMAT, IGNORE_PATTERNS."""
    (plain,) = repositories_needed({"MODEL_NAME": "org/m"})
    assert (plain.patterns, plain.ignore) == (WEIGHT_PATTERNS, ())
    (picky,) = repositories_needed(
        {"MODEL_NAME": "org/m", "LOAD_FORMAT": "PT", "IGNORE_PATTERNS": "a/*, *.md"}
    )
    assert (picky.patterns, picky.ignore) == (("*.pt",), ("a/*", "*.md"))


def test_folders_take_the_place_of_repositories():
    env = {
        "MODEL_NAME": "org/m",
        "MODEL_REVISION": "v1",
        "TOKENIZER_NAME": "org/t",
        "TOKENIZER_REVISION": "v2",
        "SPECULATIVE_CONFIG": '{"model": "org/d", "num_speculative_tokens": 3, "max_model_len": 4000}',
        "LORA_MODULES": '[{"name": "a", "path": "org/a", "base_model_name": "m"}, {"name": "b", "path": "/b"}]',
        "DEFAULT_MM_LORAS": '{"audio": "org/x"}',
        "HF_CONFIG_PATH": "org/c",
        "SEED": "7",
    }
    folders = {one: f"/cache/{one.name[-1]}" for one in repositories_needed(env)}
    placed = with_folders(env, folders)
    assert json.loads(placed.pop("LORA_MODULES")) == [
        {"name": "a", "path": "/cache/a", "base_model_name": "m"},
        {"name": "b", "path": "/b"},
    ]
    assert placed == {
        "MODEL_NAME": "/cache/m",
        "TOKENIZER": "/cache/t",
        "SPECULATIVE_CONFIG": '{"model":"/cache/d","num_speculative_tokens":3,"max_model_len":4000}',
        "DEFAULT_MM_LORAS": '{"audio":"/cache/x"}',
        "HF_CONFIG_PATH": "/cache/c",
        "SEED": "7",
    }


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"LORA_MODULES": "a=org/a"}, {"LORA_MODULES": '[{"name":"a","path":"/here"}]'}),
        ({"LORA_MODULES": '{"name": "a"}'}, {"LORA_MODULES": '{"name": "a"}'}),
        (
            {"SPECULATIVE_MODEL": "org/d", "SPECULATIVE_MODEL_REVISION": "v"},
            {"SPECULATIVE_MODEL": "/here", "SPECULATIVE_MODEL_REVISION": ""},
        ),
        ({"MODEL_NAME": "org/m", "TOKENIZER": "org/m"}, {"MODEL_NAME": "/here", "TOKENIZER": "/here"}),
        ({"MODEL_NAME": "s3://b/m", "REVISION": "x"}, {"MODEL_NAME": "s3://b/m", "REVISION": "x"}),
        ({"EXTRA_REPOS": "org/x"}, {"EXTRA_REPOS": "org/x"}),
    ],
)
def test_one_folder(env, expected):
    assert with_folders(env, dict.fromkeys(repositories_needed(env), "/here")) == expected


def test_what_has_no_folder_stays():
    env = {"MODEL_NAME": "org/m", "MODEL_REVISION": "v1", "LORA_MODULES": '[{"name":"a","path":"org/a"}]'}
    assert with_folders(env, {}) == env


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"MODEL_NAME": "org/m"}, False),
        ({"VLLM_EXTRA_ARGS": "--seed 7"}, False),
        ({"VLLM_EXTRA_ARGS": "--tokenizer org/t"}, True),
        ({"VLLM_EXTRA_ARGS": "--tokenizer=org/t"}, True),
        ({"VLLM_EXTRA_ARGS": "--tokeni org/t"}, True),
        ({"VLLM_EXTRA_ARGS": "--tokenizer-mode mistral"}, False),
        ({"VLLM_EXTRA_ARGS": "--spec-model org/d"}, True),
        ({"VLLM_EXTRA_ARGS": "--speculative-config.model org/d"}, True),
        ({"VLLM_EXTRA_ARGS": "-sc.model org/d"}, True),
        ({"VLLM_EXTRA_ARGS": "--lora_modules a=org/a"}, True),
        ({"VLLM_EXTRA_ARGS": "--default-mm-loras {}"}, True),
        ({"VLLM_EXTRA_ARGS": "'unbalanced"}, True),
        ({"VLLM_CONFIG_FILE": "/x.yaml"}, True),
        ({"SPECULATIVE_CONFIG": "/x.json"}, True),
        ({"SPECULATIVE_CONFIG": "{}"}, False),
    ],
)
def test_the_engine_may_ask_the_hub_only_for_what_nobody_sees_here(env, expected):
    assert may_ask_hub(env, root=Path("/nowhere")) is expected


def test_a_configuration_file_that_is_there_may_name_something(tmp_path: Path):
    (tmp_path / "vllm_config.yaml").write_text("tokenizer: org/t\n")
    assert may_ask_hub({"MODEL_NAME": "org/m"}, root=tmp_path)


def test_which_load_formats_read_object_stores(tmp_path: Path):
    """vLLM 0.32, config/vllm.py: Run:ai's streamer, which `auto` becomes by itself."""
    for text in ("", "auto", "runai_streamer", "RUNAI_STREAMER_SHARDED"):
        assert object_store_problem({"LOAD_FORMAT": text}, None) is None
    assert "LOAD_FORMAT=tensorizer cannot read" in str(
        object_store_problem({"LOAD_FORMAT": "tensorizer"}, None)
    )
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    assert object_store_problem({}, tmp_path) is None, "an engine that is not known may have it"
    (packages / "vllm").mkdir(parents=True)
    assert "has no runai_model_streamer" in str(object_store_problem({}, tmp_path))
    (packages / "runai_model_streamer").mkdir()
    assert object_store_problem({}, tmp_path) is None


def test_a_repository_says_its_name():
    assert str(Repository(name="org/m")) == "org/m"
    assert str(Repository(name="org/m", revision="v1", kind=RepositoryKind.EXTRA)) == "org/m at v1"
