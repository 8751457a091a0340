"""Reads the engine's log: which stage of its start it has reached, and why it failed.

Pure. The markers were read off real starts of vLLM 0.32 on CPU and compared with its sources for GPU. An
engine that prints none of them still becomes ready: its health is what counts, the stages are information.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pilotlight.domain.worker import Failure, Stage

STAGE_ORDER: Final = (Stage.STARTING, Stage.IMPORTING, Stage.LOADING_WEIGHTS, Stage.WARMING_UP, Stage.READY)
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
_QUIET: Final = re.compile(r"^(\([\w-]+ pid=\d+\) )?(DEBUG|INFO|WARNING) ")
_SPEAKING: Final = re.compile(r"Error\b|\berror:|[Ee]xception:|Killed|out of memory|No space left")
_GENERIC: Final = re.compile(r"Engine core initialization failed|See root cause above|\s+raise \w|Traceback ")
CAUSE_CHARS_MAX: Final = 500
TAIL_LINES: Final = 200
"""Log lines kept for a failure report; `vllm-worker.md` §7."""


@dataclass(frozen=True, slots=True)
class _Rule:
    kind: str
    pattern: re.Pattern[str]
    advice: str


def _rule(kind: str, pattern: str, advice: str) -> _Rule:
    return _Rule(kind, re.compile(pattern), advice)


# First match wins, so the specific stands before the general.
_RULES: Final = (
    _rule(
        "bad_flag",
        r"error: (unrecognized arguments|argument -|ambiguous option|the following arguments)"
        r"|invalid tool call parser",
        "Correct or remove the variable that sets this option; its name is the option's in capitals.",
    ),
    _rule(
        "unknown_architecture",
        r"[Mm]odel architectures? .* (is|are) not supported|does not recognize this architecture"
        r"|has no vLLM implementation",
        "This vLLM does not know the model's architecture: choose another model or a newer vLLM.",
    ),
    _rule(
        "unauthorized",
        r"[Gg]ated ?[Rr]epo|401 Client Error|403 Client Error|[Aa]ccess to model .* is restricted"
        r"|Invalid user token",
        "Set HF_TOKEN to a token that may read this repository, and accept its licence on the hub.",
    ),
    _rule(
        "out_of_memory",
        r"out of memory|OutOfMemoryError|CUDA OOM|Cannot allocate memory|MemoryError|DefaultCPUAllocator"
        r"|less than desired (GPU|CPU) memory utilization",
        "Lower GPU_MEMORY_UTILIZATION, MAX_MODEL_LEN or the KV cache, or give the worker more memory.",
    ),
    _rule(
        "context_too_large",
        r"max_model_len .* is greater than|is larger than the available KV cache memory"
        r"|No available memory for the cache"
        r"|larger than the maximum number of tokens that can be stored in KV cache",
        "Lower MAX_MODEL_LEN, or raise the memory of the KV cache.",
    ),
    _rule(
        "disk_full", r"No space left on device|Disk quota exceeded", "Free disk space for weights and caches."
    ),
    _rule(
        "model_not_found",
        r"Invalid repository ID or local directory|Repo id must be|RepositoryNotFoundError|404 Client Error"
        r"|Cannot find any model weights|LocalEntryNotFoundError|cached snapshot folder|EntryNotFoundError"
        r"|does not appear to have a file named|OfflineModeIsEnabled|LocalTokenNotFound",
        "Check MODEL_NAME: a hub id, or a folder with config.json, tokenizer and weights.",
    ),
    _rule(
        "address_in_use",
        r"Address already in use|AF_UNIX path too long|error while attempting to bind",
        "Another process holds the engine's address, or its path is too long; use another run folder.",
    ),
    _rule(
        "missing_module",
        r"ModuleNotFoundError|No module named|ImportError|cannot open shared object file",
        "The engine's environment is incomplete; install it again with `make setup`.",
    ),
    _rule("bad_value", r"ValidationError|Value error,|ValueError", "Correct the setting this line names."),
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

    def read(self, line: str) -> Stage | None:
        """The stage that this line shows to be reached, if it is new."""
        for stage, pattern in _MARKERS:
            if pattern.search(line):
                return stage if self.advance(stage) else None
        return None


class LogTail:
    """The last lines of a log plus its first speaking ones, which long tracebacks would push out."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._last: deque[str] = deque(maxlen=TAIL_LINES)

    def add(self, line: str) -> None:
        """Takes one line; what is kept is bounded."""
        line = line[:2000]
        speaks = _SPEAKING.search(line) and not _GENERIC.search(line) and not _QUIET.match(line)
        if len(self._first) < 50 and speaks:
            self._first.append(line)
        self._last.append(line)

    def lines(self) -> tuple[str, ...]:
        """Speaking lines first, then the tail; a line may appear twice."""
        return (*self._first, *self._last)


def classify_failure(lines: Sequence[str], exit_code: int | None) -> Failure:
    """Why the engine did not start, in its own words, with what to do about it.

    Args:
        lines: Its log, oldest line first.
        exit_code: As `waitpid` gives it: negative for a signal; None when it never ended by itself.

    Returns:
        A failure whose cause is one line of the log, without time stamps, at most `CAUSE_CHARS_MAX` long.
    """
    cleaned = [_clean(line) for line in lines if not _QUIET.match(line) and not _GENERIC.search(line)]
    for rule in _RULES:
        for line in cleaned:
            if rule.pattern.search(line):
                return Failure(kind=rule.kind, cause=line, advice=rule.advice)
    if exit_code == -9:
        return Failure(
            kind="killed",
            cause="the engine was killed (signal 9)",
            advice="The kernel kills for lack of memory; give the worker more, or choose a smaller model.",
        )
    speaking = [line for line in cleaned if _SPEAKING.search(line) and not _GENERIC.search(line)]
    last = next((line for line in reversed(cleaned) if line), "the engine printed nothing")
    return Failure(
        kind="engine_exited",
        cause=speaking[-1] if speaking else last,
        advice=f"The engine ended with exit code {exit_code}; its log says more.",
    )


def timeout_failure(lines: Sequence[str], seconds: float) -> Failure:
    """The failure of an engine that lives but did not become healthy in time."""
    last = next(
        (line for line in reversed([_clean(line) for line in lines]) if line), "the engine printed nothing"
    )
    return Failure(
        kind="start_timeout",
        cause=last,
        advice=f"Not healthy after {seconds:g} s; raise VLLM_STARTUP_TIMEOUT if it needs longer.",
    )


_DRAINED: Final = re.compile(r"\[shutdown\] EngineCore: request processing complete")


def says_drained(line: str) -> bool:
    """Whether a line says that an engine that was told to end has finished its last request."""
    return bool(_DRAINED.search(line))


_FATAL: Final = re.compile(r"CUDA error|illegal memory access|NCCL|EngineDeadError|EngineCore encountered")


def is_fatal_error(body: bytes) -> bool:
    """Whether the text of an upstream 500 means that the engine will not recover (`vllm-worker.md` §7)."""
    return bool(_FATAL.search(body[:20_000].decode("utf-8", "replace")))


def _clean(line: str) -> str:
    text = _PREFIX.sub("", line.strip()).strip()
    text = text.removeprefix("Value error, ").removeprefix("ValueError: ").strip()
    return text[:CAUSE_CHARS_MAX]
