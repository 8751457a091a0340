"""What a deployment says of its environment (vllm-worker.md §4.2, §4.6, §4.9)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pilotlight.engines.manifest import EngineManifest, read_manifest
from pilotlight.errors import InvalidInputError
from pilotlight.management.checks import (
    check_architecture,
    check_flags,
    configured_options,
    decide_gpu_count,
    hub_token,
    plan_flags,
)
from pilotlight.models.catalog import ModelFacts

MANIFEST = Path(__file__).parents[1] / "engines" / "data" / "manifest-0.32.0.json"
MODEL = ModelFacts(
    name="org/m", kind="hub", path=None, architectures=("LlamaForCausalLM",), num_attention_heads=32, num_kv_heads=8
)  # fmt: skip


@pytest.fixture(scope="module")
def cuda() -> EngineManifest:
    return replace(read_manifest(MANIFEST), platform="cuda")


@pytest.mark.parametrize(
    ("env", "count"),
    [
        ({}, 1),
        ({"TENSOR_PARALLEL_SIZE": "4"}, 4),
        ({"VLLM_RUNPOD_TENSOR_PARALLEL_SIZE": "4"}, 4),
        ({"VLLM_EXTRA_ARGS": "-tp 4"}, 4),
        ({"VLLM_EXTRA_ARGS": "--tensor-parallel-size=2 --pipeline-parallel-size 2"}, 4),
        ({"VLLM_EXTRA_ARGS": "-tp 4", "TENSOR_PARALLEL_SIZE": "2"}, 4),
        ({"DATA_PARALLEL_SIZE": "2", "NUM_GPU_SHARD": "2"}, 4),
    ],
)
def test_a_worker_gets_a_gpu_for_each_rank(cuda: EngineManifest, env: dict[str, str], count: int) -> None:
    """Wherever the ranks are said."""
    assert decide_gpu_count(MODEL, plan_flags(env, cuda, MODEL.name).ranks, cuda, None) == count


def test_ranks_that_the_model_cannot_have_are_refused(cuda: EngineManifest) -> None:
    for env, name in (
        ({"TENSOR_PARALLEL_SIZE": "3"}, "TENSOR_"),
        ({"VLLM_EXTRA_ARGS": "-tp 3"}, "VLLM_EXTRA"),
    ):
        ranks = plan_flags(env, cuda, MODEL.name).ranks
        with pytest.raises(InvalidInputError, match="divide the 32 attention heads") as caught:
            decide_gpu_count(MODEL, ranks, cuda, None)
        assert str(caught.value.field).startswith(f"env.{name}")
    with pytest.raises(InvalidInputError, match="4096"):
        check_flags({"PIPELINE_PARALLEL_SIZE": "1" + "0" * 30}, cuda, MODEL.name)


def test_a_file_of_the_workers_is_not_looked_for_here(cuda: EngineManifest) -> None:
    """§4.7: `SPECULATIVE_CONFIG` may be a path, which means something on the worker's machine only."""
    assert check_flags({"SPECULATIVE_CONFIG": "/s.json"}, cuda, MODEL.name) == ()


@pytest.mark.parametrize("text", ["[" * 5000, '{"a":' * 5000, "{'architectures': ['X']}"])
def test_overrides_that_are_no_object_override_nothing(cuda: EngineManifest, text: str) -> None:
    check_architecture(MODEL, {"HF_OVERRIDES": text}, cuda)
    with pytest.raises(InvalidInputError):
        check_architecture(replace(MODEL, architectures=("Nope",)), {"HF_OVERRIDES": text}, cuda)


@pytest.mark.parametrize("unset", ["", " ", "None", "null"])
def test_tokens(monkeypatch: pytest.MonkeyPatch, unset: str) -> None:
    """The endpoint's own goes before the gateway's, by either name, without blanks; `None` is none (§4.2)."""
    monkeypatch.setenv("HF_TOKEN", unset)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert hub_token({"HF_TOKEN": unset}) is None
    assert hub_token({"HF_TOKEN": unset, "HUGGING_FACE_HUB_TOKEN": " hf_x\n"}) == "hf_x"
    monkeypatch.setenv("HF_TOKEN", "hf_gateway")
    assert hub_token({"HF_TOKEN": unset}) == "hf_gateway"


def test_what_a_configuration_file_sets(tmp_path: Path) -> None:
    """None where only the worker can read it."""
    assert configured_options({}) == frozenset()
    file = tmp_path / "c.yaml"
    assert configured_options({"VLLM_CONFIG_FILE": str(file)}) is None
    file.write_text("- a")
    assert configured_options({"VLLM_CONFIG_FILE": str(file)}) is None
    file.write_text("enforce-eager: false\nkv_cache_memory_bytes: 5\n")
    assert configured_options({"VLLM_CONFIG_FILE": str(file)}) == {"ENFORCE_EAGER", "KV_CACHE_MEMORY_BYTES"}
