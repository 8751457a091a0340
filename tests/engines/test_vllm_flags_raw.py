"""`VLLM_EXTRA_ARGS` with the eyes of vLLM's parser (vllm-worker.md §4.1, §4.4, §4.10, §10 points 7 and 8)."""

from __future__ import annotations

import pytest

from pilotlight.engines.flags import translate
from pilotlight.engines.manifest import EngineManifest


@pytest.mark.parametrize(
    "option",
    [
        "--uds /x", "--ud /x", "--api-key=k", "--api-k k", "--api_k k", "--host h", "--hos h", "--hos=h", "--model m",
        "--confi /x", "--headless", "--headl", "--no-headless", "--hf-token t", "--hf-tok t", "--hf_tok=t", "--help",
        "-h", "--por 1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("known", [True, False])
def test_what_the_worker_owns_cannot_be_given_not_even_abbreviated(
    manifest: EngineManifest, option: str, *, known: bool
) -> None:
    (error,) = translate({"VLLM_EXTRA_ARGS": option}, manifest if known else None).errors
    assert error.variable == "VLLM_EXTRA_ARGS"
    assert error.value == option.partition(" ")[0].partition("=")[0]
    if option not in {"--model m", "--help", "--confi /x"}:
        assert "must not be given" in error.message


@pytest.mark.parametrize("text", ["hos: 0.0.0.0", "api_k: x", "headl: true"])
def test_neither_can_it_in_the_configuration_file(manifest: EngineManifest, text: str) -> None:
    result = translate({}, manifest, texts={"/vllm_config.yaml": text})
    assert result.errors or "has no effect" in result.notes[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("--seed", "needs a value"),
        ("--max-num-seqs 3 --seed", "needs a value"),
        ("--served-model-name", "needs a value"),
        ("--seed 1 2", "takes one value, but '2' follows too"),
        ("--seed=1 2", "takes one value"),
        ("--enforce-eager false", "takes no value, but 'false' follows"),
        ("--no-enforce-eager=1", "takes no value"),
        ("org/other", "belongs to no option"),
        ("--", "ends the options"),
        ("--seed 1 --", "ends the options"),
        ("--enable-auto-tool-choice", "needs TOOL_CALL_PARSER"),
        ("--enable-log-outputs --no-enable-log-requests", "vLLM logs no outputs without them"),
        ("--no-such-option 1", "does not know"),
        ("--max-model-lenght 1", "did you mean --max-model-len?"),
        ("--seed 'x", "cannot be split"),
    ],
)
def test_what_the_parser_would_refuse_or_misread(manifest: EngineManifest, text: str, problem: str) -> None:
    (error,) = translate({"VLLM_EXTRA_ARGS": text}, manifest).errors
    assert error.variable == "VLLM_EXTRA_ARGS"
    assert problem in error.message


def test_a_beginning_of_many_options_lists_some(manifest: EngineManifest) -> None:
    (error,) = translate({"VLLM_EXTRA_ARGS": "--e 1"}, manifest).errors
    assert " more" in error.message
    assert len(error.message) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "--seed -1", "--seed=-1", "-tp 2", "-cc.mode 3", "--compilation-config.mode 3", "--gpu-mem 0.5",
        "--served-model-name a b", "--enforce-eager --seed 3", "--no-enable-prefix-caching",
        """--hf-overrides '{"a": 1}'""", "--enable-auto-tool-choice --tool-call-parser hermes",
    ],
)  # fmt: skip
def test_what_the_parser_takes_passes_as_it_is(manifest: EngineManifest, text: str) -> None:
    import shlex

    result = translate({"VLLM_EXTRA_ARGS": text}, manifest)
    assert (result.errors, result.argv) == ((), tuple(shlex.split(text)))


@pytest.mark.parametrize("text", ["--gpu-mem 0.5", "--gpu_memory_utilization=0.5"])
def test_a_share_of_the_memory_in_any_spelling_is_somebodys_wish(cuda: EngineManifest, text: str) -> None:
    """§8 A4: only the worker's own default may be made smaller after a failure."""
    option = "--gpu-memory-utilization"
    assert translate({}, cuda).is_default(option)
    assert translate({"GPU_MEMORY_UTILIZATION": "None"}, cuda).is_default(option)
    assert translate({}, cuda, texts={"/vllm_config.yaml": "seed: 1"}).is_default(option)
    assert not translate({"VLLM_EXTRA_ARGS": text}, cuda).is_default(option)
    for name in ("GPU_MEMORY_UTILIZATION", "VLLM_RUNPOD_GPU_MEMORY_UTILIZATION"):
        assert not translate({name: "0.95"}, cuda).is_default(option)
    configured = {"/vllm_config.yaml": "gpu-memory-utilization: 0.5"}
    assert not translate({}, cuda, texts=configured).is_default(option)
