"""Reads the engine's log: which stage of its start it has reached, and why it failed.

Pure. The markers were read off real starts of vLLM 0.32 on CPU and compared with its sources for GPU. An
engine that prints none of them still becomes ready: its health is what counts, the stages are information.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pilotlight.domain.worker import Failure, Stage
from pilotlight.engines.flags import clean_value, mask_value

STAGE_ORDER: Final = (
    Stage.STARTING, Stage.DOWNLOADING, Stage.IMPORTING, Stage.LOADING_WEIGHTS, Stage.WARMING_UP, Stage.READY,
)  # fmt: skip
"""Stages of a start; reports only ever move to the right."""

_MARKERS: Final = (
    (
        Stage.WARMING_UP,
        re.compile(
            r"Loading weights took|Model loading took|init engine \(profile|KV cache size"
            r"|Starting vLLM server|Capturing CUDA graph|Application startup complete"
        ),
    ),
    (
        Stage.LOADING_WEIGHTS,
        re.compile(
            r"Starting to load model|Loading model from scratch|Loading \w+ checkpoint shards"
            r"|Time spent downloading weights"
        ),
    ),
)

_PREFIX: Final = re.compile(
    r"^(\([\w-]+ pid=\d+\) )?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] )?"
)
_PYDANTIC: Final = re.compile(r" \[type=\w+, input_value=.*\]$")
_QUIET: Final = re.compile(r"^(\([\w-]+ pid=\d+\) )?(DEBUG|INFO|WARNING) ")
_SPEAKING: Final = re.compile(
    r"Error\b|\berror:|[Ee]xception:|Killed|out of memory|No space left|CUDA initialization:|std::bad_alloc"
    r"|died unexpectedly"
)
_GENERIC: Final = re.compile(
    r"See root cause above|EngineDeadError|See stack trace|Executor failed|^raise \w|^Traceback "
    r"|\d+ validation errors? for "
)
"""Lines that say that something went wrong, and not what."""

_SIGNALLED: Final = re.compile(r"(?:Failed core proc\(s\):.*?|died unexpectedly \(exit code): (-9|-7)\b")
_UNKNOWN_ARGUMENTS: Final = re.compile(r"(?<=unrecognized arguments:).*")
_HUB_TOKEN: Final = re.compile(r"\bhf_\w+")
CAUSE_CHARS_MAX: Final = 500
TAIL_LINES: Final = 200
"""Log lines kept for a failure report; `vllm-worker.md` §7."""

RECENT_SECONDS: Final = 30.0
"""What was said so long before an engine's death may be its cause; older errors were those of requests."""

_SPEAKING_LINES: Final = 50


@dataclass(frozen=True, slots=True)
class _Rule:
    kind: str
    pattern: str
    """Compiled when a start has failed: the others need not wait for it."""
    advice: str


_SHARED_MEMORY_ADVICE: Final = (
    "Give the worker's container more shared memory (/dev/shm), or fewer GPUs to share a model."
)

# First match wins, so the specific stands before the general.
_RULES: Final = (
    _Rule(
        "bad_flag",
        r"error: (unrecognized arguments|argument -|ambiguous option|the following arguments)"
        r"|invalid tool call parser",
        "Correct or remove the variable that sets this option; its name is the option's in capitals.",
    ),
    _Rule(
        "driver_mismatch",
        r"NVIDIA driver on your system is too old|CUDA driver version is insufficient"
        r"|unsupported display driver|[Ff]orward compatibility was attempted|unsupported toolchain"
        r"|unsatisfied condition: cuda|[Dd]river/library version mismatch",
        "The driver is too old for this engine's CUDA: update it, or use an engine built for an older CUDA.",
    ),
    _Rule(
        "gpu_unsupported",
        r"no kernel image is available for execution",
        "This engine's build has no code for this GPU: use another GPU, or an engine built for this one.",
    ),
    _Rule(
        "no_gpu",
        r"Found no NVIDIA driver|Failed to infer device type|No CUDA GPUs are available"
        r"|no CUDA-capable device is detected|libcuda\.so\.1: cannot open|NVML Shared Library Not Found"
        r"|CUDA initialization: CUDA unknown error",
        "This engine is built for GPUs and sees none: give the worker a GPU, or install the engine for CPUs.",
    ),
    _Rule(
        "quantization_mismatch",
        r"[Qq]uantization method .* (does not match|is not supported)|Unknown quantization method"
        r"|Cannot find the config file for \w+|quantization is currently not supported in"
        r"|is not supported for quantization method|Quantization scheme is not supported"
        r"|Unsupported quantization config|Unsupported num_bits|desc_act=True\) is no longer supported"
        r"|Marlin does not support (weight_bits|group_size)|to use torchao quantization"
        r"|Failed to find a kernel that can implement the \w+ linear layer|scaled_fp8_quant\(\) expected"
        # Plain weights in a model that calls itself quantised, or the other way round.
        r"|no module or parameter named .*(qweight|qzeros|weight_packed|weight_scale|\.scales)",
        "Leave QUANTIZATION unset to take what the model's config.json says; its weights must be so, and this"
        " engine and GPU must know the method.",
    ),
    _Rule(
        "untrusted_code",
        r"requires you to execute (custom code|the \w+ file)|[Pp]lease (pass|set) .{0,30}trust_remote_code",
        "The model brings code of its own: read it, and if you trust it set TRUST_REMOTE_CODE=true.",
    ),
    _Rule(
        "unknown_architecture",
        r"[Mm]odel architectures? .* (is|are) not supported|does not recognize this architecture"
        r"|has no vLLM implementation",
        "This vLLM does not know the model's architecture: choose another model or a newer vLLM.",
    ),
    _Rule(
        "unauthorized",
        r"[Gg]ated ?[Rr]epo|401 Client Error|403 Client Error|[Aa]ccess to model .* is restricted"
        r"|Invalid user token",
        "Set HF_TOKEN to a token that may read this repository, and accept its licence on the hub.",
    ),
    _Rule(
        "out_of_memory",
        r"out of memory|CUDA OOM|Cannot allocate memory|MemoryError|DefaultCPUAllocator"
        r"|less than desired (GPU|CPU) memory utilization|less than requested memory for kv|std::bad_alloc"
        r"|less than the engine's budget|exceed the desired GPU memory|CUBLAS_STATUS_ALLOC_FAILED",
        "Lower GPU_MEMORY_UTILIZATION, MAX_MODEL_LEN or the KV cache, or give the worker more memory.",
    ),
    _Rule(
        "context_too_large",
        r"max_model_len .* is greater than|is larger than the available KV cache memory"
        r"|No available memory for the cache|Cannot auto-fit max_model_len"
        r"|larger than the maximum number of tokens that can be stored in KV cache",
        "Lower MAX_MODEL_LEN, or raise GPU_MEMORY_UTILIZATION or the memory of the KV cache.",
    ),
    _Rule(
        "shared_memory",
        r"shared memory segment|insufficient shared memory|No space left on device: '/(dev/shm|psm_)"
        r"|Insufficient space in /dev/shm|unable to (allocate|open|resize) shared memory",
        _SHARED_MEMORY_ADVICE,
    ),
    _Rule(
        "disk_full", r"No space left on device|Disk quota exceeded", "Free disk space for weights and caches."
    ),
    _Rule(
        "model_damaged",
        r"is not a valid JSON file|SafetensorError|Error while deserializing header"
        r"|PytorchStreamReader failed",
        "A file of the model is damaged or incomplete: fetch it again.",
    ),
    _Rule(
        "model_not_found",
        r"Invalid repository ID or local directory|Repo id must be|RepositoryNotFoundError|404 Client Error"
        r"|Cannot find any model weights|cached snapshot folder|EntryNotFoundError"
        r"|does not appear to have a file named|OfflineModeIsEnabled|LocalTokenNotFound",
        "Check MODEL_NAME: a hub id, or a folder with config.json, tokenizer and weights.",
    ),
    _Rule(
        "address_in_use",
        r"[Aa]ddress already in use|AF_UNIX path too long|error while attempting to bind",
        "Another process holds the engine's address, or its path is too long; use another run folder.",
    ),
    _Rule(
        "start_timeout",
        r"VLLM_ENGINE_READY_TIMEOUT_S",
        "The engine's processes were not ready in time; raise VLLM_STARTUP_TIMEOUT if they need longer.",
    ),
)

# What a process that was killed leaves in the log of another one looks like these, too.
_VAGUE_RULES: Final = (
    _Rule(
        "missing_module",
        r"ModuleNotFoundError|No module named|ImportError|cannot open shared object file",
        "The engine's environment is incomplete; install it again with `make setup`.",
    ),
    _Rule("bad_value", r"^(Value error,|ValueError:)", "Correct the setting this line names."),
)


class StageTracker:
    """Feeds on log lines and tells when the start has moved on; never moves backwards."""

    def __init__(self) -> None:
        self._reached = Stage.STARTING

    def advance(self, stage: Stage) -> bool:
        """True when `stage` is further than everything before, which then becomes the current one."""
        if STAGE_ORDER.index(stage) <= STAGE_ORDER.index(self._reached):
            return False
        self._reached = stage
        return True

    def reached(self, stage: Stage) -> bool:
        """Whether the start has come as far as this stage."""
        return STAGE_ORDER.index(self._reached) >= STAGE_ORDER.index(stage)

    def read(self, line: str) -> Stage | None:
        """The stage that this line shows to be reached, if it is new."""
        for stage, pattern in _MARKERS:
            if pattern.search(line):
                return stage if self.advance(stage) else None
        return None


class LogTail:
    """The last lines of a log, and its first and latest speaking ones, which tracebacks would push out."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._latest: deque[tuple[float, str]] = deque(maxlen=_SPEAKING_LINES)
        self._last: deque[str] = deque(maxlen=TAIL_LINES)

    def add(self, line: str, moment: float = 0.0) -> None:
        """Takes one line, and when it came in seconds; what is kept is bounded."""
        line = line[:2000]
        if _speaks(line):
            if len(self._first) < _SPEAKING_LINES:
                self._first.append(line)
            self._latest.append((moment, line))
        self._last.append(line)

    def lines(self) -> tuple[str, ...]:
        """Speaking lines first, then the tail; a line may appear twice."""
        return (*self._first, *self._last)

    def recent(self, moment: float) -> tuple[str, ...]:
        """Speaking lines of the last `RECENT_SECONDS` before a moment, oldest first."""
        return tuple(line for when, line in self._latest if when >= moment - RECENT_SECONDS)


def classify_failure(lines: Sequence[str], exit_code: int | None) -> Failure:
    """Why the engine did not start, in its own words, with what to do about it.

    Args:
        lines: Its log, oldest line first.
        exit_code: As `waitpid` gives it: negative for a signal; None when it never ended by itself.

    Returns:
        A failure whose cause is one line of the log, without time stamps and secrets, at most
        `CAUSE_CHARS_MAX` long.
    """
    told = [line for line in lines if not _QUIET.match(line) and not _GENERIC.search(_plain(line))]
    found = _by_rules(_RULES, told) or _by_signal(lines, exit_code) or _by_rules(_VAGUE_RULES, told)
    if found is not None:
        return found
    speaking = [line for line in told if _SPEAKING.search(line)]
    return Failure(
        kind="engine_exited",
        cause=_cause_of(speaking or told),
        advice=f"The engine ended with exit code {exit_code}; its log says more.",
    )


def classify_death(lines: Sequence[str], exit_code: int | None, *, silent: str = "") -> Failure:
    """Why an engine that had served died.

    The latest words count, not the best known: those before them may have been about a single request.

    Args:
        lines: What its log said shortly before, oldest line first (`LogTail.recent`).
        exit_code: As `waitpid` gives it; None where it did not end by itself.
        silent: What to say of one that neither spoke nor ended.
    """
    latest = lines[-1:]
    found = _by_rules(_RULES, latest)
    if found is None or found.kind != "out_of_memory":
        found = _by_signal(lines, exit_code)
    if found is not None:
        return found
    how = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    ended = f"the engine ended with {how}" if exit_code is not None else silent
    cause = _clean(latest[0]) if latest else ended
    return Failure(kind="engine_died", cause=cause, advice="A new worker starts with a new engine.")


def _by_rules(rules: Sequence[_Rule], lines: Sequence[str]) -> Failure | None:
    plain = [_plain(line) for line in lines]
    for rule in rules:
        for line in plain:
            if re.search(rule.pattern, line):
                return Failure(kind=rule.kind, cause=_clean(line), advice=rule.advice)
    return None


def _by_signal(lines: Sequence[str], exit_code: int | None) -> Failure | None:
    """A process that was killed, or that wrote to shared memory which did not exist; it cannot say so."""
    signals = [int(match[1]) for line in lines if (match := _SIGNALLED.search(line))]
    for signal in (exit_code, *signals):
        if signal == -9:
            return Failure(
                kind="killed",
                cause="a process of the engine was killed (signal 9)",
                advice="The kernel does it for lack of memory; give the worker more, or a smaller model.",
            )
        if signal == -7:
            cause = "a process of the engine found no memory behind an address (signal 7, bus error)"
            return Failure(kind="shared_memory", cause=cause, advice=_SHARED_MEMORY_ADVICE)
    return None


def timeout_failure(lines: Sequence[str], seconds: float) -> Failure:
    """The failure of an engine that lives but did not become healthy in time."""
    return Failure(
        kind="start_timeout",
        cause=_cause_of(lines),
        advice=f"Not healthy after {seconds:g} s; raise VLLM_STARTUP_TIMEOUT if it needs longer.",
    )


def stuck_failure(lines: Sequence[str], seconds: float) -> Failure:
    """The failure of an engine that was forked and then did nothing."""
    cause = f"the engine did not begin with the model within {seconds:g} s; last it said: {_cause_of(lines)}"
    return Failure(kind="engine_stuck", cause=cause[:CAUSE_CHARS_MAX], advice="Start it without a launcher.")


def logs_its_start(env: Mapping[str, str]) -> bool:
    """Whether vLLM, with these variables, writes the lines from which stages are read."""
    level = clean_value(env.get("VLLM_LOGGING_LEVEL")) or "INFO"
    configured = any(
        clean_value(env.get(name)) for name in ("VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_CONFIG_PATH")
    )
    return level.upper() in {"INFO", "DEBUG"} and not configured


_PLAIN_START: Final = re.compile(r"^pilotlight_engine: vLLM is started as it is: (.+)")


def read_plain_start(line: str) -> str:
    """Why our own entry point runs vLLM's as it is (`engines/distribution`); "" where a line does not say."""
    match = _PLAIN_START.match(line)
    return match[1] if match else ""


_STARTED: Final = re.compile(r"Application startup complete")


def says_started(line: str) -> bool:
    """Whether a line says that the engine's server is there, or will be in a moment."""
    return bool(_STARTED.search(line))


_ASKED_FOR_LOAD: Final = '"GET /metrics/?name'


def tells_of_question(line: str) -> bool:
    """Whether a line only tells that the gateway asked for the engine's load, as it does every second."""
    return _ASKED_FOR_LOAD in line


_CONCURRENCY: Final = re.compile(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x")


def read_concurrency(line: str) -> float | None:
    """How many requests of full length an engine says it has memory for; None where a line does not say."""
    match = _CONCURRENCY.search(line)
    return float(match[1]) if match else None


_DRAINED: Final = re.compile(r"\[shutdown\] EngineCore: request processing complete")


def says_drained(line: str) -> bool:
    """Whether a line says that an engine that was told to end has finished its last request."""
    return bool(_DRAINED.search(line))


_FATAL: Final = re.compile(
    r"CUDA (driver )?error:|illegal memory access was encountered|NCCL (error|failure)"
    r"|EngineDeadError|EngineCore encountered an issue"
)


def is_fatal_error(body: bytes) -> bool:
    """Whether the text of an upstream 500 means that the engine will not recover (`vllm-worker.md` §7)."""
    return bool(_FATAL.search(body[:20_000].decode("utf-8", "replace")))


def _speaks(line: str) -> bool:
    return bool(_SPEAKING.search(line)) and not _QUIET.match(line) and not _GENERIC.search(_plain(line))


def _cause_of(lines: Sequence[str]) -> str:
    """The last line that says anything."""
    return next((text for line in reversed(lines) if (text := _clean(line))), "the engine printed nothing")


def _plain(line: str) -> str:
    """A line without time stamp, and without the dump of the settings that pydantic appends."""
    return _PYDANTIC.sub("", _PREFIX.sub("", line.strip()).strip())


def _clean(line: str) -> str:
    """A line as it is shown: plain, short, without secrets."""
    text = _plain(line).removeprefix("Value error, ").removeprefix("ValueError: ").strip()
    text = _UNKNOWN_ARGUMENTS.sub(_options_of, text)
    return mask_value(_HUB_TOKEN.sub("***", text))[:CAUSE_CHARS_MAX]


def _options_of(arguments: re.Match[str]) -> str:
    """The names of unknown options without their values: a misspelt one may be that of a secret."""
    options = [word.partition("=")[0] for word in arguments[0].split() if word.startswith("-")]
    return f" {' '.join(options)}" if options else arguments[0]
