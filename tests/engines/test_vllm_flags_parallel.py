"""Tensor parallel size from the GPUs there are (vllm-worker.md §4.6, §10 point 9)."""

from __future__ import annotations

import itertools

import pytest

from pilotlight.engines.flags import Source, decide_tensor_parallel, read_ranks, translate
from pilotlight.engines.manifest import EngineManifest

# GPUs → the size for 12, 32, 40 and 64 attention heads where the environment leaves it to the worker.
AUTOMATIC = {
    0: (None, None, None, None),
    1: (None, None, None, None),
    2: (2, 2, 2, 2),
    3: (3, 2, 2, 2),
    4: (4, 4, 4, 4),
    8: (6, 8, 8, 8),
}
HEADS = (12, 32, 40, 64)


@pytest.mark.parametrize(("gpus", "heads"), list(itertools.product(AUTOMATIC, HEADS)))
@pytest.mark.parametrize("text", [None, "", "auto", "AUTO", "0", "1"])
def test_the_worker_decides(gpus: int, heads: int, text: str | None) -> None:
    """Unset, empty, `auto`, 0, and the console's 1."""
    env = {} if text is None else {"TENSOR_PARALLEL_SIZE": text}
    answer = decide_tensor_parallel(read_ranks(env), gpus=gpus, heads=heads)
    expected = AUTOMATIC[gpus][HEADS.index(heads)]
    assert (answer.size, answer.error) == (1 if expected is None and text == "1" else expected, "")
    wasted = gpus - (expected or gpus)
    assert (f"{wasted} of them" in answer.note and f"{heads} attention heads" in answer.note) == (wasted > 0)


@pytest.mark.parametrize(("gpus", "heads"), list(itertools.product(AUTOMATIC, HEADS)))
def test_the_opt_out_takes_one_literally(gpus: int, heads: int) -> None:
    ranks = read_ranks({"TENSOR_PARALLEL_SIZE": "1", "TENSOR_PARALLEL_AUTO": "0"})
    assert decide_tensor_parallel(ranks, gpus=gpus, heads=heads).size == 1
    unset = decide_tensor_parallel(read_ranks({"TENSOR_PARALLEL_AUTO": "false"}), gpus=gpus, heads=heads)
    assert (unset.size, unset.note) == (None, "")


@pytest.mark.parametrize(("gpus", "heads"), list(itertools.product(AUTOMATIC, HEADS)))
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_an_explicit_size_is_used_or_refused(gpus: int, heads: int, size: int) -> None:
    answer = decide_tensor_parallel(read_ranks({"TENSOR_PARALLEL_SIZE": str(size)}), gpus=gpus, heads=heads)
    if heads % size:
        assert f"{heads} attention heads" in answer.error
    elif size > gpus:
        assert answer.error == f"needs {size} GPUs, but this worker sees {gpus}"
    else:
        assert (answer.size, answer.error, answer.note) == (size, "", "")


@pytest.mark.parametrize(
    ("env", "gpus", "size", "note"),
    [
        ({"PIPELINE_PARALLEL_SIZE": "2"}, 8, 4, ""),
        ({"PIPELINE_PARALLEL_SIZE": "2", "DATA_PARALLEL_SIZE": "2"}, 8, 2, ""),
        ({"DATA_PARALLEL_SIZE": "4", "DATA_PARALLEL_SIZE_LOCAL": "2"}, 8, 4, ""),
        ({"PIPELINE_PARALLEL_SIZE": "2"}, 3, 1, "1 of them is left unused"),
    ],
)
def test_pipeline_stages_and_copies_share_the_gpus(
    env: dict[str, str], gpus: int, size: int, note: str
) -> None:
    answer = decide_tensor_parallel(read_ranks(env), gpus=gpus, heads=32)
    assert answer.size == size
    assert note in answer.note


def test_explicit_ranks_of_several_kinds_need_as_many_gpus() -> None:
    ranks = read_ranks({"TENSOR_PARALLEL_SIZE": "2", "PIPELINE_PARALLEL_SIZE": "2"})
    assert decide_tensor_parallel(ranks, gpus=4, heads=32).size == 2
    assert "needs 4 GPUs" in decide_tensor_parallel(ranks, gpus=2, heads=32).error
    several = read_ranks({"TENSOR_PARALLEL_SIZE": "16", "DISTRIBUTED_EXECUTOR_BACKEND": "ray"})
    assert decide_tensor_parallel(several, gpus=8, heads=32).size == 16


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({"PIPELINE_PARALLEL_SIZE": "4"}, "PIPELINE_PARALLEL_SIZE='4' needs 4 GPUs, but this worker sees 2"),
        (
            {"PIPELINE_PARALLEL_SIZE": "4", "TENSOR_PARALLEL_SIZE": "1"},
            "PIPELINE_PARALLEL_SIZE='4' needs 4 GPUs, but this worker sees 2",
        ),
        ({"DATA_PARALLEL_SIZE": "3"}, "DATA_PARALLEL_SIZE='3' needs 3 GPUs, but this worker sees 2"),
        ({"VLLM_EXTRA_ARGS": "-tp 4"}, "--tensor-parallel-size 4' needs 4 GPUs, but this worker sees 2"),
        ({"VLLM_EXTRA_ARGS": "-tp 3"}, "must divide the 32 attention heads"),
        ({"VLLM_EXTRA_ARGS": "--pipeline-parallel-size 4"}, "needs 4 GPUs, but this worker sees 2"),
        ({"PIPELINE_PARALLEL_SIZE": "1" + "0" * 30}, "GPUs, but this worker sees 2"),
    ],
)
def test_more_ranks_than_gpus_are_refused_wherever_they_are_said(
    cuda: EngineManifest, env: dict[str, str], problem: str
) -> None:
    (error,) = translate(env, cuda, gpus=2, heads=32).errors
    assert problem in error.message


def test_ranks_are_bounded_where_nobody_counted(cuda: EngineManifest) -> None:
    for name in ("PIPELINE_PARALLEL_SIZE", "TENSOR_PARALLEL_SIZE", "DATA_PARALLEL_SIZE"):
        (error,) = translate({name: "1" + "0" * 30}, cuda).errors
        assert (error.variable, "4096" in error.message) == (name, True)


def test_the_file_says_more_than_the_forms_one(cuda: EngineManifest) -> None:
    """§5.5: the console sends 1, which is no wish (A13); with the opt-out it is one."""
    texts = {"/vllm_config.yaml": "tensor-parallel-size: 2"}
    form = {"TENSOR_PARALLEL_SIZE": "1"}
    assert "--tensor-parallel-size" not in translate(form, cuda, gpus=4, heads=32, texts=texts).argv
    literal = translate({**form, "TENSOR_PARALLEL_AUTO": "0"}, cuda, gpus=4, heads=32, texts=texts)
    assert literal.argv[2:4] == ("--tensor-parallel-size", "1")


def test_the_opt_out_within_a_translation(cuda: EngineManifest) -> None:
    """A13: a literal 1, and nothing decided where nothing is said."""
    env = {"TENSOR_PARALLEL_SIZE": "1", "TENSOR_PARALLEL_AUTO": "0"}
    result = translate(env, cuda, gpus=4, heads=32)
    assert result.argv[2:] == ("--tensor-parallel-size", "1")
    (line,) = [line for line in result.explanations if line.variable == "TENSOR_PARALLEL_AUTO"]
    assert "meant literally" in line.note
    assert translate({"TENSOR_PARALLEL_AUTO": "0"}, cuda, gpus=4, heads=32).argv[2:] == ()


@pytest.mark.parametrize(
    ("env", "tensor", "pipeline"),
    [
        ({"TENSOR_PARALLEL_SIZE": "4"}, "4", 1),
        ({"VLLM_RUNPOD_TENSOR_PARALLEL_SIZE": "4"}, "4", 1),
        ({"NUM_GPU_SHARD": "4"}, "4", 1),
        ({"VLLM_EXTRA_ARGS": "-tp 4"}, "4", 1),
        (
            {"VLLM_EXTRA_ARGS": "--tensor-par 4 --pipeline-parallel-size=2", "TENSOR_PARALLEL_SIZE": "2"},
            "4",
            2,
        ),
    ],
)
def test_a_plan_says_how_many_ranks_are_asked_for(
    cuda: EngineManifest, env: dict[str, str], tensor: str, pipeline: int
) -> None:
    ranks = translate(env, cuda).ranks
    assert (ranks.tensor, ranks.pipeline, ranks.data) == (tensor, pipeline, 1)


def test_key_value_heads_are_divided_too() -> None:
    """28 heads with 4 key-value heads on 8 GPUs: 7 divides the heads, but vLLM refuses 4 by 7."""
    assert decide_tensor_parallel(read_ranks({}), gpus=8, heads=28, kv_heads=4).size == 4
    assert decide_tensor_parallel(read_ranks({}), gpus=8, heads=32, kv_heads=2).size == 8
    asked = decide_tensor_parallel(read_ranks({"TENSOR_PARALLEL_SIZE": "7"}), gpus=8, heads=28, kv_heads=4)
    assert "must divide the 4 key-value heads" in asked.error
    left = decide_tensor_parallel(read_ranks({}), gpus=8, heads=24, kv_heads=3)
    assert (left.size, "3 key-value heads and 8 do not divide" in left.note) == (6, True)


def test_nothing_is_decided_about_gpus_that_nobody_counted() -> None:
    assert decide_tensor_parallel(read_ranks({}), gpus=None, heads=32).size is None
    assert decide_tensor_parallel(read_ranks({"NUM_GPU_SHARD": "4"}), gpus=None, heads=None).size == 4


def test_within_a_translation(manifest: EngineManifest, cuda: EngineManifest) -> None:
    """The variable's line, the worker's own, extra arguments and the file; CPU builds spread nothing."""
    form = {"TENSOR_PARALLEL_SIZE": "1"}
    result = translate(form, cuda, gpus=3, heads=32)
    assert result.argv == ("--gpu-memory-utilization", "0.95", "--tensor-parallel-size", "2")
    assert "1 of them is left unused" in result.notes[0]
    own = translate({}, cuda, gpus=2, heads=32)
    (line,) = [line for line in own.explanations if line.flag == "--tensor-parallel-size"]
    assert (line.variable, line.value, line.source) == ("", "2", Source.DEFAULT)
    (error,) = translate({"NUM_GPU_SHARD": "4"}, cuda, gpus=2, heads=32).errors
    assert error.message == "NUM_GPU_SHARD='4' needs 4 GPUs, but this worker sees 2"
    assert (
        "--tensor-parallel-size" not in translate({"VLLM_EXTRA_ARGS": "-tp 2"}, cuda, gpus=4, heads=32).argv
    )
    file = {"/vllm_config.yaml": "tensor-parallel-size: 2"}
    assert "--tensor-parallel-size" not in translate({}, cuda, gpus=4, heads=32, texts=file).argv
    staged = {"/vllm_config.yaml": "pipeline-parallel-size: 2"}
    assert "2" in translate({}, cuda, gpus=4, heads=32, texts=staged).argv
    assert translate(form, manifest, gpus=4, heads=32).argv == ("--tensor-parallel-size", "1")
    (error,) = translate({"TENSOR_PARALLEL_SIZE": "-2"}, cuda).errors
    assert "or auto" in error.message
