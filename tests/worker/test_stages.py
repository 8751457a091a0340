"""Stages and start failures from lines that vLLM 0.32 really printed: vllm-worker.md §7."""

from __future__ import annotations

import pytest

from pilotlight.domain.worker import Stage
from pilotlight.worker.stages import (
    LogTail,
    StageTracker,
    classify_failure,
    is_fatal_error,
    timeout_failure,
)

START = """\
(APIServer pid=7789) INFO 11-21 20:23:34 [model.py:733] Resolved architecture: LlamaForCausalLM
(EngineCore pid=7888) INFO 11-21 20:23:41 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: x
(Worker pid=7928) INFO 11-21 20:23:50 [cpu_model_runner.py:68] Starting to load model /m...
Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]
(Worker pid=7928) INFO 11-21 20:23:50 [default_loader.py:501] Loading weights took 0.00 seconds
(EngineCore pid=7888) INFO 11-21 20:23:51 [core.py:402] init engine (profile, create kv cache, warmup model) took 0.06 s
(APIServer pid=7789) INFO 11-21 20:23:51 [entry.py:140] Starting vLLM server on unix:/e.sock
INFO:     Application startup complete.
""".splitlines()


def test_stages_of_a_real_start_come_once_and_in_order() -> None:
    tracker = StageTracker()
    tracker.advance(Stage.IMPORTING)
    assert [stage for line in START if (stage := tracker.read(line))] == [
        Stage.LOADING_WEIGHTS,
        Stage.WARMING_UP,
    ]


def test_stages_never_move_backwards() -> None:
    tracker = StageTracker()
    assert tracker.advance(Stage.READY)
    assert not tracker.advance(Stage.IMPORTING)
    assert tracker.read("Starting to load model x...") is None


PREFIX = "(Worker pid=8768) ERROR 11-21 20:26:01 [multiproc_executor.py:953] "
GENERIC = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"


@pytest.mark.parametrize(
    ("kind", "line", "cause"),
    [
        ("bad_flag", "api_server.py: error: unrecognized arguments: --no-such-flag", None),
        ("bad_flag", "api_server.py: error: argument --dtype: invalid choice: 'float17' (choose from 'auto')", None),
        ("bad_flag", "api_server.py: error: argument --max-model-len: invalid human_readable_int_or_auto value: 'abc'", None),
        (
            "unknown_architecture",
            "  Value error, Model architectures ['FooForCausalLM'] are not supported for now. Supported architectures: x",
            "Model architectures ['FooForCausalLM'] are not supported for now. Supported architectures: x",
        ),
        (
            "unknown_architecture",
            "  Value error, The checkpoint you are trying to load has model type `foo` but Transformers does not recognize this architecture.",
            None,
        ),
        ("model_not_found", "  Value error, Invalid repository ID or local directory specified: '/m'.", None),
        ("model_not_found", PREFIX + "RuntimeError: Cannot find any model weights with `/m`", None),
        ("model_not_found", "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name': '/m'.", None),
        (
            "model_not_found",
            "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the specified revision",
            None,
        ),
        ("unauthorized", "OSError: You are trying to access a gated repo.", None),
        ("unauthorized", "huggingface_hub.errors.GatedRepoError: 401 Client Error.", None),
        (
            "context_too_large",
            "  Value error, User-specified max_model_len (999999) is greater than the derived max_model_len (1024)",
            None,
        ),
        (
            "context_too_large",
            PREFIX + "ValueError: To serve at least one request with the model's max seq len (1024), (1.0 GiB KV cache is needed, which is larger than the available KV cache memory (0.5 GiB).",
            None,
        ),
        (
            "out_of_memory",
            PREFIX + "ValueError: Available memory on node 0 (12.96/18.21 GiB) on startup is less than desired CPU memory utilization (0.92, 16.76 GiB).",
            None,
        ),
        ("out_of_memory", PREFIX + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.", None),
        ("disk_full", "OSError: [Errno 28] No space left on device", None),
        ("address_in_use", "OSError: [Errno 98] Address already in use", None),
        ("missing_module", "ModuleNotFoundError: No module named 'vllm'", None),
    ],
)  # fmt: skip
def test_failures_are_recognised_and_quoted(kind: str, line: str, cause: str | None) -> None:
    noise = [
        *START[:2],
        "(APIServer pid=1) WARNING 11-21 20:25:37 [system_utils.py:255] OSError: [Errno 24] x",
    ]
    failure = classify_failure(
        [*noise, PREFIX + "    raise RuntimeError(", line, "Traceback (most recent call last):", GENERIC], 1
    )
    assert failure.kind == kind
    assert failure.cause == (cause or failure.cause)
    assert failure.cause in line
    assert not failure.cause.startswith("(")
    assert failure.advice


def test_unknown_failures_quote_the_last_speaking_line() -> None:
    failure = classify_failure(["hello", "RuntimeError: something odd", GENERIC, "bye"], 3)
    assert (failure.kind, failure.cause) == ("engine_exited", "RuntimeError: something odd")
    assert "exit code 3" in failure.advice


def test_a_silent_death_is_said_as_such() -> None:
    assert classify_failure([], 1).cause == "the engine printed nothing"
    assert classify_failure(["x"], -9).kind == "killed"
    assert timeout_failure(["still loading"], 5).kind == "start_timeout"


def test_the_root_cause_survives_a_long_traceback() -> None:
    tail = LogTail()
    tail.add(PREFIX + "RuntimeError: Cannot find any model weights with `/m`")
    for number in range(500):
        tail.add(f'  File "x.py", line {number}')
    tail.add(GENERIC)
    assert classify_failure(tail.lines(), 1).kind == "model_not_found"


def test_fatal_texts() -> None:
    assert is_fatal_error(b'{"error": {"message": "EngineCore encountered an issue. EngineDeadError"}}')
    assert is_fatal_error(b"CUDA error: an illegal memory access was encountered")
    assert not is_fatal_error(b'{"error": {"message": "tool parser failed"}}')
