"""What a worker takes, and whether a host has it."""

from __future__ import annotations

import pytest

from pilotlight.core.placement import Gpu, HostResources
from pilotlight.errors import InvalidInputError
from pilotlight.models import fit
from pilotlight.models.catalog import ModelFacts

GIB = 1 << 30
VALUES = 4 * 2 * 2 * 64
BLOCK = VALUES * 2 * 128


def model(**changes) -> ModelFacts:
    known = {
        "name": "m",
        "kind": "folder",
        "path": None,
        "max_context": 2048,
        "weight_bytes": 10_000_000,
        "kv_values_per_token": VALUES,
        "full_attention": True,
    }
    return ModelFacts(**(known | changes))


def host(total: int, available: int = 0, *gpu_bytes: int) -> HostResources:
    gpus = tuple(Gpu(index=index, name="g", memory_bytes=size) for index, size in enumerate(gpu_bytes))
    return HostResources(memory_bytes_total=total, memory_bytes_available=available, gpus=gpus)


def test_a_small_model_gets_256_blocks():
    assert fit.cpu_defaults(model(), {}) == {
        "ENFORCE_EAGER": "true",
        "KV_CACHE_MEMORY_BYTES": str(256 * BLOCK),
    }


def test_a_larger_model_gets_room_for_one_full_request():
    """Qwen3-0.6B: 40,960 tokens of 114,688 bytes need 320 blocks and the engine's own one."""
    qwen = model(max_context=40_960, kv_values_per_token=28 * 2 * 8 * 128)
    block = 28 * 2 * 8 * 128 * 2 * 128
    assert fit.cpu_defaults(qwen, {})["KV_CACHE_MEMORY_BYTES"] == str(321 * block)
    shorter = fit.cpu_defaults(qwen, {"MAX_MODEL_LEN": "4k"})["KV_CACHE_MEMORY_BYTES"]
    assert int(shorter) == (GIB // block) * block
    assert int(shorter) > 33 * block


def test_the_forms_share_of_the_memory_is_no_wish_on_a_cpu():
    """§5.5, §8 A4: consoles send 0.95 to every endpoint; it would be 95 % of the host's memory."""
    defaults = fit.cpu_defaults(model(), {})
    assert fit.cpu_defaults(model(), {"GPU_MEMORY_UTILIZATION": "0.95"}) == defaults
    assert fit.cpu_defaults(model(), {"GPU_MEMORY_UTILIZATION": "0.8"}) == {"ENFORCE_EAGER": "true"}


def test_defaults_yield_to_the_configuration_file():
    """§4.1: the file goes before defaults, but variables, which these become, before the file."""
    assert fit.cpu_defaults(model(), {}, None) == {}
    assert fit.cpu_defaults(model(), {}, {"ENFORCE_EAGER", "KV_CACHE_MEMORY_BYTES"}) == {}
    assert fit.cpu_defaults(model(), {}, {"GPU_MEMORY_UTILIZATION"}) == {"ENFORCE_EAGER": "true"}
    assert fit.cpu_defaults(model(), {}, {"SEED"}) == fit.cpu_defaults(model(), {})


def test_an_unknown_geometry_gets_one_gibibyte():
    assert fit.cpu_defaults(model(kv_values_per_token=0), {})["KV_CACHE_MEMORY_BYTES"] == str(GIB)


@pytest.mark.parametrize(
    ("env", "kv_cache"),
    [
        ({"NUM_GPU_BLOCKS_OVERRIDE": "10"}, 10 * BLOCK),
        ({"NUM_GPU_BLOCKS_OVERRIDE": "10", "BLOCK_SIZE": "64"}, 10 * BLOCK // 2),
        ({"NUM_GPU_BLOCKS_OVERRIDE": "10", "KV_CACHE_DTYPE": "fp8"}, 10 * BLOCK // 2),
        ({"NUM_GPU_BLOCKS_OVERRIDE": "10", "DTYPE": "float32"}, 20 * BLOCK),
        ({"VLLM_CPU_KVCACHE_SPACE": "2", "KV_CACHE_MEMORY_BYTES": "5"}, 2 * GIB),
        ({"KV_CACHE_MEMORY_BYTES": "1G"}, GIB),
        ({"KV_CACHE_MEMORY_BYTES": "None", "GPU_MEMORY_UTILIZATION": "0.5"}, 8 * GIB - 2_210_000_000),
        ({"GPU_MEMORY_UTILIZATION": "0.95"}, int(0.92 * 16 * GIB) - 2_210_000_000),
    ],
)
def test_the_kv_cache_is_what_the_engine_would_take(env, kv_cache):
    need = fit.estimate_memory(model(), env, "cpu", host_memory_bytes=16 * GIB)
    assert need.kv_cache == kv_cache
    assert need.total == 10_000_000 + kv_cache + fit.CPU_OVERHEAD_BYTES


def test_a_gpu_worker_keeps_weights_and_cache_on_the_device():
    need = fit.estimate_memory(model(weight_bytes=16 * GIB), {"CPU_OFFLOAD_GB": "2.5"}, "cuda")
    assert need.total == int(2.5 * GIB) + fit.CUDA_OVERHEAD_BYTES


@pytest.mark.parametrize("length", ["2049", "3k", "2.1K"])
def test_a_longer_context_than_the_models_is_refused(length):
    with pytest.raises(InvalidInputError, match="2048") as caught:
        fit.check_context(model(), {"MAX_MODEL_LEN": length})
    assert caught.value.field == "env.MAX_MODEL_LEN"


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"MAX_MODEL_LEN": "2048"},
        {"MAX_MODEL_LEN": "2K"},
        {"MAX_MODEL_LEN": "auto"},
        {"MAX_MODEL_LEN": "-1"},
        {"MAX_MODEL_LEN": "0"},
        {"MAX_MODEL_LEN": "9999", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"},
        {"MAX_MODEL_LEN": "9999", "HF_OVERRIDES": "{}"},
    ],
)
def test_contexts_that_may_be_legal_pass(env):
    fit.check_context(model(), env)


def test_a_cache_too_small_for_one_request_is_refused():
    with pytest.raises(InvalidInputError, match="NUM_GPU_BLOCKS_OVERRIDE=16") as caught:
        fit.check_cache(model(), {"NUM_GPU_BLOCKS_OVERRIDE": "16"})
    assert str(17 * BLOCK) in str(caught.value)
    fit.check_cache(model(), {"NUM_GPU_BLOCKS_OVERRIDE": "17"})
    fit.check_cache(model(), {"NUM_GPU_BLOCKS_OVERRIDE": "16", "MAX_MODEL_LEN": "1k"})
    fit.check_cache(model(), {"NUM_GPU_BLOCKS_OVERRIDE": "16", "MAX_MODEL_LEN": "auto"})
    fit.check_cache(model(full_attention=False), {"NUM_GPU_BLOCKS_OVERRIDE": "1"})
    fit.check_cache(model(), {"GPU_MEMORY_UTILIZATION": "0.5"})


def test_the_defaults_pass_their_own_check():
    for context in (128, 2048, 131_072):
        for values in (VALUES, 28 * 2 * 8 * 128):
            facts = model(max_context=context, kv_values_per_token=values)
            fit.check_cache(facts, fit.cpu_defaults(facts, {}))


def test_fit_is_judged_by_all_memory_and_says_what_is_available():
    need = fit.MemoryNeed(weights=1, kv_cache=2, overhead=7)
    assert fit.check_fit(need, host(20, 5), reserve_bytes=10) is None
    reason = fit.check_fit(need, host(20, 5), reserve_bytes=11)
    assert reason is not None
    assert "needs 10 bytes" in reason
    assert "20 bytes" in reason
    assert "5 available now" in reason


def test_weights_must_fit_on_the_gpus():
    large = model(weight_bytes=20 * GIB)
    assert fit.check_gpu_fit(large, {}, host(0, 0, 24 * GIB).gpus, 1) is None
    assert "needs 2 GPUs, but this host has 1" in str(fit.check_gpu_fit(large, {}, host(0, 0, GIB).gpus, 2))
    reason = fit.check_gpu_fit(large, {}, host(0, 0, 16 * GIB, 8 * GIB).gpus, 1)
    assert str(20 * GIB) in str(reason)
    assert str(int(16 * GIB * 0.95)) in str(reason)
    assert fit.check_gpu_fit(large, {}, host(0, 0, 16 * GIB, 16 * GIB).gpus, 2) is None
    assert fit.check_gpu_fit(large, {"QUANTIZATION": "fp8"}, host(0, 0, 16 * GIB).gpus, 1) is None
    assert fit.check_gpu_fit(large, {"CPU_OFFLOAD_GB": "8"}, host(0, 0, 16 * GIB).gpus, 1) is None
    assert fit.check_gpu_fit(large, {}, host(0, 0, 0).gpus, 1) is None, "unknown memory is trusted"


@pytest.mark.parametrize(
    ("text", "number"),
    [("32k", 32_000), ("1K", 1024), ("1.5G", 3 << 29), ("7", 7), ("auto", None), ("-1", None), (None, None)],
)
def test_human_numbers(text, number):
    assert fit.parse_human(text) == number
