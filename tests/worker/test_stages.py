"""Stages and start failures from lines that vLLM 0.32 really printed: vllm-worker.md §7."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilotlight.domain.worker import Stage
from pilotlight.loops.engine_load import FEW
from pilotlight.worker.stages import (
    CAUSE_CHARS_MAX,
    LogTail,
    StageTracker,
    classify_death,
    classify_failure,
    is_fatal_error,
    logs_its_start,
    read_concurrency,
    read_plain_start,
    says_started,
    stuck_failure,
    tells_of_question,
    timeout_failure,
)

LOGS = Path(__file__).with_name("logs")
"""Of real starts of vLLM 0.32 that failed, shortened; folders renamed."""

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


def test_a_line_that_tells_of_the_gateways_question_is_known() -> None:
    line = 'INFO:      - "GET /metrics/?name%5B%5D=vllm:num_requests_running HTTP/1.1" 200 OK'
    assert tells_of_question(line)
    assert FEW.startswith("/metrics/?name")
    for other in (
        *START,
        'INFO:      - "GET /metrics HTTP/1.1" 200 OK',
        'INFO:      - "POST /v1/x HTTP/1.1" 200 OK',
    ):
        assert not tells_of_question(other)


def test_a_start_s_log_says_when_its_server_is_there_and_why_it_is_plain() -> None:
    assert [line for line in START if says_started(line)] == START[-1:]
    assert not any(read_plain_start(line) for line in START)
    line = "pilotlight_engine: vLLM is started as it is: CUDA is initialized"
    assert read_plain_start(line) == "CUDA is initialized"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, True),
        ({"VLLM_LOGGING_LEVEL": "debug"}, True),
        ({"VLLM_LOGGING_LEVEL": "WARNING"}, False),
        ({"VLLM_CONFIGURE_LOGGING": "0"}, False),
        ({"VLLM_LOGGING_CONFIG_PATH": "/c.json"}, False),
    ],
)
def test_an_engine_that_is_told_to_be_quiet_is_not_taken_for_stuck(
    env: dict[str, str], *, expected: bool
) -> None:
    assert logs_its_start(env) is expected


def test_what_a_stuck_engine_said_last_is_told() -> None:
    failure = stuck_failure(START[:1], 60)
    assert failure.kind == "engine_stuck"
    assert "within 60 s" in failure.cause
    assert failure.cause.endswith("Resolved architecture: LlamaForCausalLM")


def test_stages_never_move_backwards() -> None:
    tracker = StageTracker()
    assert tracker.reached(Stage.STARTING)
    assert not tracker.reached(Stage.IMPORTING)
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
        (
            "out_of_memory",
            PREFIX + "ValueError: Available memory on node 0 (8.16/11.34 GiB) on kv cache allocation is less than requested memory for kv (900.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.",
            None,
        ),
        ("out_of_memory", "terminate called after throwing an instance of 'std::bad_alloc'", None),
        ("disk_full", "OSError: [Errno 28] No space left on device", None),
        (
            "shared_memory",
            "RuntimeError: NCCL error: unhandled system error. Last error: Error while creating shared memory segment /dev/shm/nccl-fX2dNk (size 9637888), error: No space left on device (28)",
            None,
        ),
        (
            "driver_mismatch",
            "/opt/engine/torch/cuda/__init__.py:182: UserWarning: CUDA initialization: The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by downloading and installing a new version",
            None,
        ),
        (
            "driver_mismatch",
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that might have already set an error? Error 804: forward compatibility was attempted on non supported HW",
            None,
        ),
        ("driver_mismatch", "torch.AcceleratorError: CUDA error: the provided PTX was compiled with an unsupported toolchain.", None),
        ("gpu_unsupported", "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device", None),
        (
            "no_gpu",
            "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver",
            None,
        ),
        (
            "no_gpu",
            "RuntimeError: Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG` to turn on verbose logging to help debug the issue.",
            None,
        ),
        ("no_gpu", "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory", None),
        (
            "quantization_mismatch",
            "  Value error, The quantization method fp8 is not supported for the current GPU. Minimum capability: 75. Current capability: 70.",
            None,
        ),
        ("quantization_mismatch", "  Value error, gguf quantization is currently not supported in cpu.", None),
        (
            "quantization_mismatch",
            "ValueError: torch.bfloat16 is not supported for quantization method awq. Supported dtypes: [torch.float16]",
            None,
        ),
        ("quantization_mismatch", "  Value error, Unsupported quantization config: bits=4, sym=False", None),
        ("quantization_mismatch", "  Value error, GPTQ group activation ordering (desc_act=True) is no longer supported. Use a checkpoint with static activation ordering or desc_act=False.", None),
        ("quantization_mismatch", "ValueError: Marlin does not support weight_bits = uint8b128. Only types = [ScalarType.uint4b8] are supported (for group_size = 64, device_capability = -1, zp = False).", None),
        ("quantization_mismatch", "  Value error, Unsupported num_bits = 8. Supported: 4. For 8-bit AWQ, use Marlin backend", None),
        ("quantization_mismatch", "ValueError: Failed to find a kernel that can implement the WNA16 linear layer. Reasons:", None),
        ("quantization_mismatch", "RuntimeError: _C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4 argument(s).", None),
        ("quantization_mismatch", "ImportError: Please install torchao>=0.10.0 via `pip install torchao>=0.10.0` to use torchao quantization.", None),
        (
            "untrusted_code",
            "ValueError: The repository /m contains custom code which must be executed to correctly load the model. You can inspect the repository content at https://hf.co//m . Please pass the argument `trust_remote_code=True` to allow custom code to be run.",
            None,
        ),
        ("address_in_use", "OSError: [Errno 98] Address already in use", None),
        ("missing_module", "ModuleNotFoundError: No module named 'vllm'", None),
        (
            "address_in_use",
            "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
            None,
        ),
        ("shared_memory", PREFIX + "RuntimeError: Insufficient space in /dev/shm for x: 160 MiB required, 60 MiB free.", None),
        ("shared_memory", "RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)", None),
        (
            "context_too_large",
            PREFIX + "ValueError: Cannot auto-fit max_model_len: not enough GPU memory available to serve even a single token. Try increasing `gpu_memory_utilization`.",
            None,
        ),
        (
            "start_timeout",
            "(APIServer pid=1) TimeoutError: Timed out waiting for engine core processes to start. Waited 600s (configured by VLLM_ENGINE_READY_TIMEOUT_S).",
            None,
        ),
        ("bad_value", "  Value error, Cannot use foo with bar. [type=value_error, input_value=ArgsKwargs((), {'hf_token': 'x'}), input_type=ArgsKwargs]", "Cannot use foo with bar."),
        ("bad_value", "ValueError: The number of heads must be even", "The number of heads must be even"),
    ],
)  # fmt: skip
def test_failures_are_recognised_and_quoted(kind: str, line: str, cause: str | None) -> None:
    noise = [
        *START[:2],
        "(APIServer pid=1) WARNING 11-21 20:25:37 [system_utils.py:255] OSError: [Errno 24] x",
    ]
    count = "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig"
    raising = PREFIX + "    raise RuntimeError("
    failure = classify_failure(
        [*noise, raising, count, line, "Traceback (most recent call last):", GENERIC], 1
    )
    assert failure.kind == kind
    assert failure.cause == (cause or failure.cause)
    assert failure.cause in line
    assert not failure.cause.startswith("(")
    assert failure.advice


@pytest.mark.parametrize(
    ("log", "kind", "cause"),
    [
        ("bad_flag", "bad_flag", "argument --max-model-len: invalid human_readable_int_or_auto value: 'abc'"),
        ("broken_config", "model_damaged", "'/models/broken/config.json' is not a valid JSON file"),
        ("truncated_weights", "model_damaged", "incomplete metadata, file not fully covered"),
        ("cache_too_large", "out_of_memory", "less than requested memory for kv (900.0 GiB)"),
        ("unknown_architecture", "unknown_architecture", "Model architectures ['FooForCausalLM'] are not supported"),
        ("quantization_of_another_method", "quantization_mismatch", "(gptq) does not match the quantization method"),
        ("quantization_of_plain_weights", "quantization_mismatch", "no module or parameter named 'layers.0.mlp."),
        ("quantization_unknown_here", "quantization_mismatch", "Unknown quantization method: bitsandbytes."),
        ("quantization_without_config", "quantization_mismatch", "Cannot find the config file for awq"),
    ],
)  # fmt: skip
def test_real_logs_of_failed_starts_are_understood(log: str, kind: str, cause: str) -> None:
    """vllm-worker.md §7, §10 point 13: the class, and the line that a person would have looked for."""
    tail = LogTail()
    for line in (LOGS / f"{log}.log").read_text().splitlines():
        tail.add(line)
    failure = classify_failure(tail.lines(), 1)
    assert failure.kind == kind
    assert cause in failure.cause
    assert failure.advice
    assert len(failure.cause) <= CAUSE_CHARS_MAX
    # Neither time stamps nor the dump of the settings that pydantic appends.
    assert not failure.cause.startswith("(")
    assert "input_value" not in failure.cause


def test_a_driver_warning_survives_the_traceback_it_leads_to() -> None:
    """It comes first and as a warning; what fails a hundred lines later only says that there is no GPU."""
    tail = LogTail()
    tail.add(
        "x.py:1: UserWarning: CUDA initialization: The NVIDIA driver on your system is too old (found 12040)."
    )
    for number in range(500):
        tail.add(f'  File "x.py", line {number}')
    tail.add("RuntimeError: Failed to infer device type, please set")
    assert classify_failure(tail.lines(), 1).kind == "driver_mismatch"


def test_unknown_failures_quote_the_last_speaking_line() -> None:
    failure = classify_failure(["hello", "RuntimeError: something odd", GENERIC, "bye"], 3)
    assert (failure.kind, failure.cause) == ("engine_exited", "RuntimeError: something odd")
    assert "exit code 3" in failure.advice


def test_words_in_a_cause_are_not_taken_for_a_statement_of_the_traceback() -> None:
    line = PREFIX + "RuntimeError: odd thing. Please raise an issue on GitHub."
    assert classify_failure([line, "bye"], 1).cause.startswith("RuntimeError: odd thing.")


@pytest.mark.parametrize(
    ("kind", "lines", "exit_code"),
    [
        ("killed", [GENERIC.replace("': 1}", "': -9}")], 1),
        (
            "killed",
            [PREFIX + "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor."],
            1,
        ),
        ("killed", ["ModuleNotFoundError: No module named 'optional'", "  Value error, x"], -9),
        ("out_of_memory", ["torch.OutOfMemoryError: CUDA out of memory."], -9),
        ("shared_memory", ["Starting"], -7),
        ("shared_memory", [GENERIC.replace("': 1}", "': 1, 'EngineCore_DP1': -7}")], 1),
        ("engine_exited", [GENERIC], 1),
    ],
)
def test_a_process_that_was_killed_cannot_say_so_itself(kind: str, lines: list[str], exit_code: int) -> None:
    """§7: it shows in the exit code, or in what another process of the engine says about it."""
    assert classify_failure(lines, exit_code).kind == kind


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (
            "api_server.py: error: unrecognized arguments: --hf-tokn hf_abc --seeed=7",
            "api_server.py: error: unrecognized arguments: --hf-tokn --seeed",
        ),
        ("OSError: hf_abcdefsecret may not read it", "OSError: *** may not read it"),
        ("OSError: https://me:pass@hub/x not found", "OSError: https://***@hub/x not found"),
    ],
)
def test_a_cause_holds_no_secret(line: str, cause: str) -> None:
    assert classify_failure([line], 2).cause == cause


DEAD = "(APIServer pid=1) ERROR 11-21 20:26:01 [async_llm.py:704] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."
ILLEGAL = PREFIX + "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("kind", "lines", "exit_code", "cause"),
    [
        ("engine_died", [ILLEGAL, *[DEAD] * 300], 1, "an illegal memory access"),
        ("engine_died", ["ModuleNotFoundError: No module named 'x'", ILLEGAL], 1, "an illegal memory access"),
        ("out_of_memory", [PREFIX + "torch.OutOfMemoryError: CUDA out of memory.", DEAD], 1, "CUDA out of"),
        ("killed", [PREFIX + "Worker proc A died unexpectedly (exit code: -9), shutting down", DEAD], 1, "signal 9"),
        ("killed", [], -9, "signal 9"),
        ("engine_died", [DEAD], 7, "the engine ended with exit code 7"),
        ("engine_died", [], -11, "signal 11"),
        ("engine_died", [], None, "does not answer"),
    ],
)  # fmt: skip
def test_a_death_is_told_by_the_latest_words(
    kind: str, lines: list[str], exit_code: int | None, cause: str
) -> None:
    """§7: what a request of an hour ago failed of is not what the engine died of."""
    tail = LogTail()
    for number in range(100):
        tail.add(
            "(APIServer pid=1) ERROR 11-21 20:26:01 [x.py:1] torch.OutOfMemoryError: CUDA out of memory.",
            number,
        )
        tail.add("(APIServer pid=1) ERROR 11-21 20:26:01 [x.py:1] ValueError: 404 Client Error", number)
    for line in lines:
        tail.add(line, 3600.0)
    failure = classify_death(tail.recent(3601.0), exit_code, silent="the engine does not answer")
    assert failure.kind == kind
    assert cause in failure.cause


def test_a_silent_death_is_said_as_such() -> None:
    assert classify_failure([], 1).cause == "the engine printed nothing"
    assert classify_failure(["x"], -9).kind == "killed"
    failure = timeout_failure(["still loading"], 5)
    assert (failure.kind, failure.cause) == ("start_timeout", "still loading")


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
    assert is_fatal_error(b"RuntimeError: NCCL error: unhandled cuda error")
    assert not is_fatal_error(b'{"error": {"message": "tool parser failed"}}')
    assert not is_fatal_error(b'{"error": {"message": "no tool named NCCL_tests or CUDA error handbook"}}')


def test_the_engine_says_how_many_requests_it_has_memory_for() -> None:
    """§7 `MAX_CONCURRENCY=auto`."""
    line = (
        "(EngineCore pid=1) INFO 11-29 18:12:53 [kv_cache_utils.py:2327] GPU KV cache size: 415,568 tokens, "
        "Maximum concurrency for 131,072 tokens per request: 3.17x"
    )
    assert read_concurrency(line) == 3.17
    assert read_concurrency("Maximum concurrency is unknown") is None
