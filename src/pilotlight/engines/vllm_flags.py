"""From environment variables to vLLM's command line (`vllm-worker.md` §4.1, §4.2, §4.4, §4.5).

Pure. The valid options come from the manifest of the installed vLLM, not from a list kept by hand: every long
option can be set by its name in capitals. On top of that stand aliases and repairs for names and values that
older deployment templates send. The worker program calls `translate` before it starts the engine; the gateway
calls it when an endpoint is deployed, to refuse a bad value before anything starts.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pilotlight.engines.manifest import EngineFlag, EngineManifest

OWNED: Final = frozenset(
    {"HOST", "PORT", "UDS", "API_KEY", "MODEL", "MODEL_TAG", "CONFIG", "HEADLESS", "HELP", "FD"}
)
"""Options that the worker decides; variables of these names are left alone, and extra arguments refused."""

NOT_MAPPED: Final = frozenset(
    {
        "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "NNODES", "LOG_LEVEL", "ROOT_PATH", "MIDDLEWARE", "GRPC",
        "GRPC_PORT", "ENABLE_SSL_REFRESH", "LOGGING_CONFIG", "LOG_CONFIG_FILE", "TOKENS_ONLY", "HF_TOKEN",
    }
)  # fmt: skip
"""Names that orchestrators set for other purposes, and the one secret among the options (§4.4)."""

WORKER_VARIABLES: Final = frozenset(
    {
        "MODEL_NAME", "MAX_CONCURRENCY", "DRAIN_TIMEOUT", "REQUEST_TIMEOUT", "VLLM_STARTUP_TIMEOUT",
        "DEFAULT_BATCH_SIZE", "DEFAULT_MIN_BATCH_SIZE", "DEFAULT_BATCH_SIZE_GROWTH_FACTOR", "MIN_BATCH_SIZE",
        "BATCH_SIZE_GROWTH_FACTOR", "DEFAULT_MAX_TOKENS", "NATIVE_STREAM_FORMAT", "NATIVE_SAMPLING_DEFAULTS",
        "RAW_OPENAI_OUTPUT", "ALLOW_ADMIN_ROUTES", "PLATFORM_LOST_TIMEOUT", "VLLM_EXTRA_ARGS",
        "VLLM_CONFIG_FILE",
    }
)  # fmt: skip
"""Variables that the worker program reads itself; never options, never typing errors."""

_FOLDED: Final = frozenset(
    {
        "OPENAI_SERVED_MODEL_NAME_OVERRIDE",
        "CUSTOM_CHAT_TEMPLATE",
        "DISABLE_LOG_REQUESTS",
        "DISABLE_LOGGING_REQUEST",
    }
)
"""Variables that a repair turns into an option of another name."""

OBSOLETE: Final[Mapping[str, str]] = {
    "DEVICE": "the device is chosen by the vLLM build",
    "ENABLE_REASONING": "REASONING_PARSER alone is sufficient",
    "MAX_CONTEXT_LEN_TO_CAPTURE": "graphs are captured by batch size now: MAX_CUDAGRAPH_CAPTURE_SIZE",
    "MAX_PARALLEL_LOADING_WORKERS": "vLLM parses it and ignores it",
    "MAX_SEQ_LEN_TO_CAPTURE": "graphs are captured by batch size now: MAX_CUDAGRAPH_CAPTURE_SIZE",
    "NUM_LOOKAHEAD_SLOTS": "removed from vLLM",
    "NUM_SCHEDULER_STEPS": "removed from vLLM",
    "PREEMPTION_MODE": "removed from vLLM",
    "SCHEDULER_DELAY_FACTOR": "removed from vLLM",
    "SWAP_SPACE": "removed from vLLM; the nearest is KV_OFFLOADING_SIZE",
    "USE_V2_BLOCK_MANAGER": "removed from vLLM",
}
"""Variables of older templates that no vLLM understands any more, and what to know instead (§4.9)."""

_HARMLESS: Final[Mapping[str, frozenset[str]]] = {
    "DEVICE": frozenset({"auto", "cuda"}),
    "MAX_PARALLEL_LOADING_WORKERS": frozenset({"0", "1"}),
    "SCHEDULER_DELAY_FACTOR": frozenset({"0", "0.0"}),
}
"""Values that templates send by default and that ask for nothing: no note about them."""

_ALIASES: Final[Mapping[str, str]] = {
    "MODEL_REVISION": "REVISION",
    "TOKENIZER_NAME": "TOKENIZER",
    "MAX_MODEL_LENGTH": "MAX_MODEL_LEN",
    "OPENAI_RESPONSE_ROLE": "RESPONSE_ROLE",
    "VLLM_ATTENTION_BACKEND": "ATTENTION_BACKEND",
    "NUM_GPU_SHARD": "TENSOR_PARALLEL_SIZE",
}
"""Alias to the option's variable. An alias that is set wins, the last two excepted (§4.5)."""

_WEAK_ALIASES: Final = frozenset({"VLLM_ATTENTION_BACKEND", "NUM_GPU_SHARD", "MAX_MODEL_LENGTH"})

_ZERO_IS_UNSET: Final = frozenset(
    {"MAX_NUM_BATCHED_TOKENS", "MAX_MODEL_LEN", "NUM_GPU_BLOCKS_OVERRIDE", "MAX_CPU_LORAS"}
)
_TEMPLATE_DEFAULTS: Final = frozenset({("TOKENIZER_MODE", "slow"), ("LORA_DTYPE", "float32")})
_FOREIGN: Final = ("RUNPOD_", "PILOTLIGHT_", "VLLM_", "HF_", "SSL_", "PYTHON", "TORCH_", "CUDA_", "NVIDIA_")
"""Beginnings of names that belong to other programs; never taken for misspelt options."""

_SECRET_ENDINGS: Final = ("-token", "-key", "-secret", "-password")
_TRUTHY: Final = frozenset({"true", "1", "yes", "on", "y", "t"})
_FALSY: Final = frozenset({"false", "0", "no", "off", "n", "f"})
_UNSET: Final = frozenset({"", "none", "null", "~"})
_CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagError:
    """A variable whose value cannot be used; the engine would refuse to start with it.

    Attributes:
        variable: Its name.
        value: What it holds.
        legal: Legal values, where they can be listed.
        message: One sentence for people, naming all three.
    """

    variable: str
    value: str
    legal: tuple[str, ...] = ()
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagPlan:
    """The command line that an environment asks for.

    Attributes:
        argv: Arguments after the program's name, without model and address.
        notes: One sentence for each variable that was repaired, ignored or looks misspelt.
        errors: Variables that stop the start; empty if `argv` can be used.
        files: Texts to write before the start, by file name below the run folder.
    """

    argv: tuple[str, ...]
    notes: tuple[str, ...] = ()
    errors: tuple[FlagError, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def clean_value(value: str | None) -> str | None:
    """The value without surrounding blanks, or None where templates mean "unset" (§4.2)."""
    text = (value or "").strip()
    return None if text.lower() in _UNSET else text


def parse_boolean(text: str) -> bool | None:
    """The truth value of an environment variable's text; None if it is neither (§4.2)."""
    lowered = text.strip().lower()
    if lowered in _TRUTHY:
        return True
    return False if lowered in _FALSY else None


def mask_secrets(argv: Sequence[str]) -> list[str]:
    """A command line fit for logs: values of options named …token, …key, …secret, …password hidden."""
    masked: list[str] = []
    hide = False
    for argument in argv:
        option, equals, _ = argument.partition("=")
        secret = option.startswith("--") and option.endswith(_SECRET_ENDINGS)
        if hide and not argument.startswith("--"):
            masked.append("***")
        else:
            masked.append(f"{option}=***" if secret and equals else argument)
        hide = (secret and not equals) or (hide and not argument.startswith("--"))
    return masked


def translate(
    env: Mapping[str, str],
    manifest: EngineManifest | None,
    *,
    served_names: Sequence[str] = (),
    run_folder: str = "/run/pilotlight",
) -> FlagPlan:
    """The command line for an environment, by the five steps of §4.1.

    Args:
        env: All variables; those that are no option are ignored.
        manifest: What the installed vLLM understands; None if unknown, then only aliases and
            `VLLM_EXTRA_ARGS` are passed on.
        served_names: Names of the model, repository id first; follow the user's override names.
        run_folder: Where `FlagPlan.files` will lie, for the paths in `argv`.

    Returns:
        A plan; look at `errors` before using `argv`.
    """
    return _Translation(env, manifest, served_names, run_folder).plan()


class _Translation:
    """One run of `translate`: collects option values, then writes them down in one order."""

    def __init__(
        self,
        env: Mapping[str, str],
        manifest: EngineManifest | None,
        served_names: Sequence[str],
        run_folder: str,
    ) -> None:
        self._env = {name: text for name, raw in env.items() if (text := clean_value(raw)) is not None}
        self._manifest = manifest
        self._flags: Mapping[str, EngineFlag] = manifest.flags if manifest is not None else {}
        self._served_names = served_names
        self._run_folder = run_folder.rstrip("/")
        self._values: dict[str, str | None] = {}
        self._arguments: list[str] = []
        self._notes: list[str] = []
        self._errors: list[FlagError] = []
        self._files: dict[str, str] = {}

    def plan(self) -> FlagPlan:
        if self._manifest is None:
            self._notes.append(
                "no manifest of the engine's options: only aliases and VLLM_EXTRA_ARGS are passed on"
            )
        self._collect()
        self._repair()
        argv: list[str] = []
        for name, value in self._values.items():
            if value is not None:
                argv += self._argument(name, value)
        argv += self._arguments
        if config := self._env.get("VLLM_CONFIG_FILE"):
            argv += ["--config", config]
        argv += self._extra_arguments()
        self._suggest()
        return FlagPlan(
            argv=tuple(argv), notes=tuple(self._notes), errors=tuple(self._errors), files=dict(self._files)
        )

    def _collect(self) -> None:
        """Steps 1 and 2: the variable of each option, then aliases over it."""
        for name in sorted(self._flags):
            if name in OWNED or name in NOT_MAPPED or name.startswith("SSL_") or name in OBSOLETE:
                continue
            if name in self._env:
                self._values[name] = self._env[name]
        for alias, name in _ALIASES.items():
            if alias in self._env and not (alias in _WEAK_ALIASES and name in self._values):
                self._values[name] = self._env[alias]
        for name, why in OBSOLETE.items():
            if name in self._env and self._env[name].lower() not in _HARMLESS.get(name, frozenset()):
                self._notes.append(f"{name} has no effect: {why}")

    def _repair(self) -> None:
        """The repairs of §4.5, each its own small step so that more can follow."""
        for name in _ZERO_IS_UNSET:
            if self._values.get(name) == "0":
                self._values[name] = None
        repairs: tuple[Callable[[], None], ...] = (
            self._repair_names,
            self._repair_chat_template,
            self._repair_logging,
            self._repair_tools,
            self._repair_lora,
            self._repair_sizes,
        )
        for repair in repairs:
            repair()

    def _repair_names(self) -> None:
        """Override names, then the given ones, then `SERVED_MODEL_NAME`; duplicates once (§5.4)."""
        override = self._env.get("OPENAI_SERVED_MODEL_NAME_OVERRIDE")
        text = override or self._values.pop("SERVED_MODEL_NAME", None)
        self._values.pop("SERVED_MODEL_NAME", None)
        names = _split(text) if text else []
        names += [name for name in self._served_names if name not in names]
        if names:
            self._arguments += ["--served-model-name", *dict.fromkeys(names)]

    def _repair_chat_template(self) -> None:
        template = self._env.get("CUSTOM_CHAT_TEMPLATE") or self._values.get("CHAT_TEMPLATE")
        if template is None:
            return
        self._values.pop("CHAT_TEMPLATE", None)
        # vLLM takes a value without braces and newlines for a path. Inline text goes into a file, so that
        # it neither fills the command line nor shows in process lists (§1.4).
        if any(character in template for character in "{}\n"):
            self._files[_CHAT_TEMPLATE_FILE] = template
            template = f"{self._run_folder}/{_CHAT_TEMPLATE_FILE}"
        self._arguments += ["--chat-template", template]

    def _repair_logging(self) -> None:
        for name in ("DISABLE_LOG_REQUESTS", "DISABLE_LOGGING_REQUEST"):
            if self._boolean(name) and "ENABLE_LOG_REQUESTS" not in self._values:
                self._values["ENABLE_LOG_REQUESTS"] = "false"
        if self._boolean("ENABLE_LOG_OUTPUTS") and "ENABLE_LOG_REQUESTS" not in self._values:
            self._values["ENABLE_LOG_REQUESTS"] = "true"

    def _repair_tools(self) -> None:
        if self._boolean("ENABLE_AUTO_TOOL_CHOICE") and "TOOL_CALL_PARSER" not in self._values:
            self._values["ENABLE_AUTO_TOOL_CHOICE"] = None
            self._notes.append("ENABLE_AUTO_TOOL_CHOICE is ignored: vLLM needs TOOL_CALL_PARSER with it")

    def _repair_lora(self) -> None:
        """`LORA_MODULES` in any of its three spellings becomes one argument per adapter (§4.8)."""
        text = self._values.pop("LORA_MODULES", None)
        if text is None:
            return
        try:
            modules = _lora_modules(text)
        except ValueError as error:
            self._error("LORA_MODULES", text, str(error))
            return
        if not modules:
            return
        self._arguments += ["--lora-modules", *modules]
        if self._values.get("ENABLE_LORA") is None:
            self._values["ENABLE_LORA"] = "true"

    def _repair_sizes(self) -> None:
        """Values that name a size in a form vLLM does not take."""
        rank = self._values.get("MAX_LORA_RANK")
        flag = self._flags.get("MAX_LORA_RANK")
        if (
            rank is not None
            and flag is not None
            and flag.choices
            and rank not in flag.choices
            and rank.isdigit()
        ):
            larger = [choice for choice in flag.choices if choice.isdigit() and int(choice) >= int(rank)]
            if larger:
                self._values["MAX_LORA_RANK"] = min(larger, key=int)
                self._notes.append(f"MAX_LORA_RANK={rank} was raised to {self._values['MAX_LORA_RANK']}")
        if (self._values.get("TENSOR_PARALLEL_SIZE") or "").lower() in {"auto", "0"}:
            self._values["TENSOR_PARALLEL_SIZE"] = None

    def _argument(self, name: str, value: str) -> list[str]:
        """One option as arguments, by the value rules of §4.2."""
        flag = self._flags.get(name)
        if flag is None:
            return [f"--{name.lower().replace('_', '-')}", value]
        if flag.kind in {"pair", "switch"}:
            truth = parse_boolean(value)
            if truth is None:
                self._error(name, value, "must be true or false", legal=("true", "false"))
                return []
            if truth:
                return [flag.flag]
            return [f"--no-{flag.flag[2:]}"] if flag.kind == "pair" else []
        if flag.multi:
            return [flag.flag, *_split(value)]
        if flag.choices:
            matched = self._choose(name, value, tuple(flag.choices))
            if matched is None:
                return []
            value = matched
        return [f"{flag.flag}={value}"] if value.startswith("-") else [flag.flag, value]

    def _choose(self, name: str, value: str, choices: tuple[str, ...]) -> str | None:
        if value in choices:
            return value
        for choice in choices:
            if choice.lower() == value.lower():
                return choice
        if (name, value.lower()) in _TEMPLATE_DEFAULTS:
            self._notes.append(
                f"{name}={value} is ignored: vLLM has no such value; legal are {', '.join(choices)}"
            )
        else:
            self._error(name, value, f"must be one of {', '.join(choices)}", legal=choices)
        return None

    def _extra_arguments(self) -> list[str]:
        """Step 4: `VLLM_EXTRA_ARGS`, each long option checked against the manifest (§4.10)."""
        text = self._env.get("VLLM_EXTRA_ARGS")
        if text is None:
            return []
        try:
            arguments = shlex.split(text)
        except ValueError as error:
            self._error("VLLM_EXTRA_ARGS", text, f"cannot be split like a shell line: {error}")
            return []
        for argument in arguments:
            if argument.startswith("--"):
                self._check_extra(argument.partition("=")[0])
        return arguments

    def _check_extra(self, option: str) -> None:
        name = option[2:].replace("-", "_").upper()
        if name in OWNED:
            self._error("VLLM_EXTRA_ARGS", option, f"must not hold {option}: the worker sets it itself")
            return
        known = {flag.flag for flag in self._flags.values()}
        known |= {f"--no-{flag.flag[2:]}" for flag in self._flags.values() if flag.kind == "pair"}
        plain = "--" + option[2:].replace("_", "-")
        # argparse accepts unique prefixes; an option of the form --a.b sets one key of a JSON option.
        if (
            not known
            or plain.partition(".")[0] in known
            or sum(item.startswith(plain) for item in known) == 1
        ):
            return
        nearest = difflib.get_close_matches(plain, sorted(known), n=1, cutoff=0.6)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        self._error("VLLM_EXTRA_ARGS", option, f"holds {option}, which this vLLM does not know{hint}")

    def _suggest(self) -> None:
        """Notes on variables that look like a misspelt option."""
        candidates = (set(self._flags) | set(_ALIASES) | WORKER_VARIABLES) - OWNED - NOT_MAPPED
        known = candidates | set(OBSOLETE) | OWNED | NOT_MAPPED | _FOLDED
        for name in sorted(self._env):
            if name in known or "_" not in name or name.startswith(_FOREIGN):
                continue
            nearest = difflib.get_close_matches(name, candidates, n=1, cutoff=0.85)
            if nearest:
                self._notes.append(f"{name} is unknown and was ignored; did you mean {nearest[0]}?")

    def _boolean(self, name: str) -> bool:
        value = self._env.get(name)
        return value is not None and parse_boolean(value) is True

    def _error(self, variable: str, value: str, problem: str, *, legal: tuple[str, ...] = ()) -> None:
        shown = value if len(value) <= 100 else f"{value[:100]}…"
        self._errors.append(
            FlagError(variable=variable, value=value, legal=legal, message=f"{variable}={shown!r} {problem}")
        )


def _split(text: str) -> list[str]:
    """A list from a JSON array, or from text cut at commas and blanks."""
    if text.startswith("["):
        parsed = _json(text)
        if isinstance(parsed, list):
            return [part if isinstance(part, str) else json.dumps(part) for part in parsed]
    return [part for part in re.split(r"[,\s]+", text) if part]


def _lora_modules(text: str) -> list[str]:
    """One argument per adapter.

    Raises:
        ValueError: The text is in none of the three forms, or an entry lacks its name or path.
    """
    if text.startswith(("[", "{")):
        parsed = _json(text)
        entries = [parsed] if isinstance(parsed, dict) else parsed
        if not isinstance(entries, list):
            raise ValueError("is not valid JSON")
        for entry in entries:
            if not isinstance(entry, dict) or not entry.get("name") or not entry.get("path"):
                raise ValueError('must hold objects with "name" and "path"')
        return [json.dumps(entry, separators=(",", ":")) for entry in entries]
    pairs = _split(text)
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not name or not path:
            raise ValueError("must be JSON or name=path pairs")
    return pairs


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
