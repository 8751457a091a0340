"""From environment variables to vLLM's command line (`vllm-worker.md` §4.1, §4.2, §4.4).

Pure. The valid options come from the manifest of the installed vLLM, not from a list kept by hand: every long
option can be set by its name in capitals. On top of that stand aliases and repairs for names and values that
older deployment templates send (`variables`, `repairs`). The worker program calls `translate` before it
starts the engine; the gateway calls it when an endpoint is deployed, to refuse a bad value before anything
starts.

The order of precedence, highest first: what the worker owns, `VLLM_EXTRA_ARGS`, what is baked into the image,
aliases, the option's own variable, the configuration file, the worker's defaults, vLLM's defaults.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from pilotlight.core.variables import MEMORY_UTILIZATION
from pilotlight.engines.flags.draft import Draft, Setting, Value, read_environment
from pilotlight.engines.flags.explaining import explain
from pilotlight.engines.flags.lora import ADAPTER_CONFIG, lora_modules
from pilotlight.engines.flags.masking import mask_value
from pilotlight.engines.flags.parallel import Ranks, decide_tensor_parallel, read_ranks
from pilotlight.engines.flags.plan import FlagPlan, Source
from pilotlight.engines.flags.raw import CONFIG_FILE, OWNED, take_config_file, take_extra_arguments
from pilotlight.engines.flags.repairs import REPAIRS
from pilotlight.engines.flags.values import (
    choices_problem,
    clean_value,
    is_integer,
    is_number,
    is_size,
    is_zero,
    parse_boolean,
    parse_config,
    parse_json,
    parse_object,
    split_list,
    split_names,
)
from pilotlight.engines.flags.variables import (
    FOREIGN,
    NUMBER_MAX,
    PREFIX_FORM,
    VARIABLES,
    Kind,
    Legal,
    Variable,
    describe,
    may_be_prefixed,
)
from pilotlight.engines.manifest import EngineFlag, EngineManifest

MODEL_ID: Final = "MODEL_ID"
"""Key of the baked values that holds the repository's id where `MODEL_NAME` is a folder (§5.3)."""

ZERO_IS_UNSET: Final = frozenset(
    {
        "MAX_NUM_BATCHED_TOKENS",
        "MAX_MODEL_LEN",
        "MAX_MODEL_LENGTH",
        "NUM_GPU_BLOCKS_OVERRIDE",
        "MAX_CPU_LORAS",
    }
)
"""Number fields of consoles that send 0 for "nothing" (§4.2), beside those of speculative decoding."""

_BAKED: Final = ("MODEL_REVISION", "TOKENIZER_NAME", "TOKENIZER_REVISION", "QUANTIZATION")
_OF_DIRECT_MODE: Final = frozenset({"PORT", "PORT_HEALTH", "HEALTH_CHECK_PATH"})
"""Read in direct HTTP mode only; elsewhere orchestrators may put anything there."""

_PLAIN_JSON: Final = frozenset(
    {"SPECULATIVE_CONFIG", "WATERMARK_CONFIG", "DIFFUSION_CONFIG", "OVERRIDE_GENERATION_CONFIG"}
)
"""Options named …_CONFIG that take no sizes such as `80m` (vLLM 0.32, engine/arg_utils.py)."""

_TEXT_OR_OBJECT: Final = frozenset(
    {"HF_OVERRIDES", "MODEL_LOADER_EXTRA_CONFIG", "ADDITIONAL_CONFIG", "PT_LOAD_MAP_LOCATION"}
)
"""Options whose value must be valid JSON where it stands in braces."""

_WITHOUT_MANIFEST: Final = frozenset({"LORA_MODULES"})
"""Options that are passed on, like aliases, to a vLLM that nobody has asked."""

_NOT_MAPPED: Final = frozenset({Kind.UNMAPPED, Kind.ENGINE, Kind.IGNORED})


_SUGGESTED: Final = frozenset(
    name
    for name, row in VARIABLES.items()
    if row.kind in {Kind.OPTION, Kind.ALIAS, Kind.PART, Kind.WORKER, Kind.STORAGE}
)
"""Documented names that a misspelt one may mean."""


def named_files(env: Mapping[str, str]) -> tuple[str, ...]:
    """Paths of the small files that `translate` wants to know the contents of; they need not exist."""
    cleaned, _ = read_environment(env)
    paths = [cleaned.get("VLLM_CONFIG_FILE", CONFIG_FILE)]
    speculative = cleaned.get("SPECULATIVE_CONFIG", "{")
    if not speculative.startswith("{"):
        paths.append(speculative)
    try:
        modules = lora_modules(cleaned.get("LORA_MODULES", "[]"))
    except ValueError:
        modules = ()
    paths += [f"{module.path.rstrip('/')}/{ADAPTER_CONFIG}" for module in modules]
    return tuple(dict.fromkeys(paths))


def translate(
    env: Mapping[str, str],
    manifest: EngineManifest | None,
    *,
    served_names: Sequence[str] = (),
    run_folder: str = "/run/pilotlight",
    texts: Mapping[str, str] | None = None,
    baked: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
    gpus: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> FlagPlan:
    """The command line for an environment, by the steps of §4.1.

    Args:
        env: All variables; those that are no option are ignored.
        manifest: What the installed vLLM understands; None if unknown, then only aliases and
            `VLLM_EXTRA_ARGS` are passed on.
        served_names: Names of the model, repository id first; follow the user's override names.
        run_folder: Where `FlagPlan.files` will lie, for the paths in `argv`.
        texts: Contents of the `named_files` that exist; None if nobody has looked.
        baked: What was recorded when the weights were put into the image (§5.3).
        defaults: Options of the worker's own, by upper-case name, where neither variables nor the
            configuration file nor extra arguments say anything.
        gpus: GPUs that the worker sees; None if unknown.
        heads: Attention heads of the model; None if unknown.
        kv_heads: Key-value heads of the model; None if unknown.

    Returns:
        A plan; look at `errors` before using `argv`.
    """
    cleaned, origin = read_environment(env, manifest)
    draft = Draft(
        env=cleaned, manifest=manifest, texts=texts, run_folder=run_folder.rstrip("/"), origin=origin
    )
    if manifest is None:
        draft.notes.append(
            "no manifest of the engine's options: only aliases and VLLM_EXTRA_ARGS are passed on"
        )
    extra = take_extra_arguments(draft)
    config = take_config_file(draft)
    _collect(draft)
    _take_baked(draft, baked or {})
    for repair in REPAIRS:
        repair(draft)
    ranks = _spread(draft, gpus, heads, kv_heads)
    _name(draft, served_names)
    _yield_to_extra(draft)
    _add_defaults(draft, defaults or {})
    _check_workers_own(draft)
    _note_the_rest(draft)
    arguments = _write(draft)
    argv = [argument for _, written in sorted(arguments.items()) for argument in written]
    if config is not None:
        argv += ["--config", config]
    return FlagPlan(
        argv=(*argv, *extra),
        notes=tuple(dict.fromkeys(mask_value(note) for note in draft.notes)),
        errors=tuple(replace(error, message=mask_value(error.message)) for error in draft.errors),
        files=dict(draft.files),
        explanations=tuple(
            replace(line, note=mask_value(line.note))
            for line in explain(draft, arguments, config, extra, tuple(sorted(env.keys() - cleaned.keys())))
        ),
        ranks=ranks,
    )


def _collect(draft: Draft) -> None:
    """Steps 1 and 2: the variable of each option, then aliases over it."""
    documented = {name for name, row in VARIABLES.items() if row.kind is Kind.OPTION}
    names = documented | set(draft.manifest.flags) if draft.manifest is not None else _WITHOUT_MANIFEST
    for name in sorted(names & draft.env.keys() - OWNED):
        row = describe(name)
        if row is not None and (row.kind in _NOT_MAPPED or (row.kind is Kind.OBSOLETE and row.gone)):
            continue
        _put_variable(draft, name, name)
    for name, row in VARIABLES.items():
        if row.kind is not Kind.ALIAS or name not in draft.env:
            continue
        older = draft.makers(row.option)
        if row.weak and draft.manifest is None and row.option in draft.env:
            # Of an option whose alias is passed on it is known that it exists.
            _put_variable(draft, row.option, row.option)
            older = draft.makers(row.option)
        if row.weak and older:
            same = draft.env[name] == draft.text(row.option)
            draft.ignore(name, f"{name} is ignored: {older[0]} is set too and wins", quiet=same)
        else:
            _put_variable(draft, row.option, name)


def _put_variable(draft: Draft, option: str, name: str) -> None:
    if name in ZERO_IS_UNSET and is_zero(draft.env[name]):
        draft.ignore(name, "0 means that it is not set", quiet=True)
    else:
        draft.put(option, draft.env[name], name)


def _take_baked(draft: Draft, baked: Mapping[str, str]) -> None:
    """What is in the image wins over variables; a difference is said (§4.1, §5.3)."""
    values = {name: text for name in ("MODEL_NAME", *_BAKED) if (text := clean_value(baked.get(name)))}
    for name in baked.keys() - values.keys():
        option = VARIABLES[name].option if name in VARIABLES else ""
        draft.drop(option or name, "does not apply to what the image has baked in", quiet=True)
    for name, text in values.items():
        asked = draft.env.get(name)
        if asked not in {None, text, baked.get(MODEL_ID) if name == "MODEL_NAME" else text}:
            draft.ignore(name, f"{name}={asked} is ignored: the image has {text} baked in")
        if name == "MODEL_NAME":
            continue
        option = VARIABLES[name].option or name
        for other in draft.makers(option):
            if other != name:
                draft.ignore(other, f"{other} is ignored: the image has {name}={text} baked in")
        draft.settings.pop(option, None)
        draft.put(option, text, name, source=Source.BAKED)


def _spread(draft: Draft, gpus: int | None, heads: int | None, kv_heads: int | None) -> Ranks:
    """The tensor parallel size (§4.6), decided unless somebody says it; what is said in all."""
    option = "TENSOR_PARALLEL_SIZE"
    automatic = draft.boolean("TENSOR_PARALLEL_AUTO") is not False
    if option in draft.config and option in draft.settings and automatic:
        asked = (draft.text(option) or "").lower()
        if asked in {"auto", "1"} or is_zero(asked):
            draft.drop(option, "not decided by the variable, but by the configuration file", quiet=True)
    fixed = option in draft.extra or (option in draft.config and option not in draft.settings)
    others = ("PIPELINE_PARALLEL_SIZE", "DATA_PARALLEL_SIZE", "DATA_PARALLEL_SIZE_LOCAL")
    ranks = read_ranks(
        {
            **{name: text for name in (*others, option) if (text := draft.final(name)) is not None},
            "DISTRIBUTED_EXECUTOR_BACKEND": draft.final("DISTRIBUTED_EXECUTOR_BACKEND") or "",
            "TENSOR_PARALLEL_AUTO": "true" if automatic and not fixed else "false",
        }
    )
    maker = "VLLM_EXTRA_ARGS" if option in draft.extra else (*draft.makers(option), option)[0]
    ranks = replace(ranks, variable=maker)
    many_nodes = {"NNODES", "DATA_PARALLEL_RANK", "DATA_PARALLEL_START_RANK"} & draft.extra.keys()
    on_gpu = draft.manifest is None or draft.manifest.platform == "cuda"
    seen = gpus if on_gpu and not many_nodes else None
    answer = decide_tensor_parallel(ranks, gpus=seen, heads=heads, kv_heads=kv_heads)
    if answer.error:
        draft.fail_option(answer.option, answer.error)
        return ranks
    if "TENSOR_PARALLEL_AUTO" in draft.env:
        note = "TENSOR_PARALLEL_SIZE=1 is " + ("not decided" if automatic else "meant literally")
        draft.ignore("TENSOR_PARALLEL_AUTO", note, source=Source.WORKER, quiet=True)
    if fixed:
        return ranks
    if answer.note:
        draft.notes.append(answer.note)
    if answer.size is None:
        draft.drop(option, "decided by the worker: there is one GPU, or their number is unknown", quiet=True)
    else:
        source = None if option in draft.settings else Source.DEFAULT
        draft.put(option, str(answer.size), *draft.makers(option), source=source, note=answer.note)
    return ranks


def _name(draft: Draft, served_names: Sequence[str]) -> None:
    """The names that somebody chose, then the model's own; each once (§5.4)."""
    option, override = "SERVED_MODEL_NAME", "OPENAI_SERVED_MODEL_NAME_OVERRIDE"
    setting = draft.settings.get(option)
    if setting is not None:
        # A name of the override may hold blanks (§8 A25).
        by_override = any(name.endswith(override) for name in setting.variables)
        try:
            chosen = split_names(str(setting.value), blanks=not by_override)
        except ValueError as error:
            draft.fail_setting(option, str(error))
            return
    else:
        configured = draft.config.get(option) or []
        chosen = [str(name) for name in (configured if isinstance(configured, list) else [configured])]
    names = tuple(dict.fromkeys([*chosen, *served_names]))
    if not names:
        draft.drop(option, "holds no name", quiet=True)
    elif option in draft.settings:
        draft.amend(option, names, "the model's own names follow", quiet=True)
    elif option not in draft.config or draft.manifest is not None:
        draft.put(option, names, source=Source.OWNED)


def _yield_to_extra(draft: Draft) -> None:
    """Take out what the extra arguments say again, so that vLLM does not warn of duplicates."""
    for option in sorted(draft.extra.keys() & draft.settings.keys()):
        names = " and ".join(draft.makers(option))
        draft.drop(option, f"{names} is overruled by VLLM_EXTRA_ARGS")


def _add_defaults(draft: Draft, defaults: Mapping[str, str]) -> None:
    on_gpu = draft.manifest is not None and draft.manifest.platform == "cuda"
    if on_gpu and not draft.given("DEVICE_MEMORY_UTILIZATION"):
        defaults = {"GPU_MEMORY_UTILIZATION": str(MEMORY_UTILIZATION), **defaults}
    for option, text in defaults.items():
        known = draft.manifest is None or option in draft.manifest.flags
        said = draft.given(option) or (option == "KV_CACHE_MEMORY_BYTES" and _says_cache(draft))
        if known and not said:
            draft.put(option, text, source=Source.DEFAULT)


def _says_cache(draft: Draft) -> bool:
    """Whether the size of the cache is said in another way."""
    return draft.given("GPU_MEMORY_UTILIZATION") or "VLLM_CPU_KVCACHE_SPACE" in draft.env


def _check_workers_own(draft: Draft) -> None:
    """Refuse what the worker program could not read, before it is started for nothing."""
    direct = draft.env.get("WORKER_MODE", "").lower() == "http"
    for name, row in VARIABLES.items():
        text = draft.env.get(name)
        if row.kind is not Kind.WORKER or text is None or (name in _OF_DIRECT_MODE and not direct):
            continue
        if row.choices and text.lower() not in row.choices:
            draft.fail(name, text, choices_problem(text, row.choices), legal=row.choices)
        elif row.legal is Legal.BOOLEAN and parse_boolean(text) is None:
            draft.fail(name, text, "must be true or false", legal=("true", "false"))
        elif row.legal is Legal.NUMBER and not _is_legal_number(row, text):
            words = "".join(f" or {word}" for word in row.words)
            most = f" and at most {row.maximum}" if row.maximum < NUMBER_MAX else ""
            whole = "whole " if row.whole else ""
            draft.fail(name, text, f"must be a {whole}number of at least {row.minimum:g}{most}{words}")
        elif name == "HEALTH_CHECK_PATH" and not text.startswith("/"):
            draft.fail(name, text, "must be a path such as /ping")


def _is_legal_number(row: Variable, text: str) -> bool:
    if text.lower() in row.words:
        return True
    # Not a number compares as false, too.
    in_bounds = is_number(text) and row.minimum <= float(text) <= row.maximum
    return in_bounds and (not row.whole or float(text).is_integer())


def _note_the_rest(draft: Draft) -> None:
    """One sentence for each variable that is obsolete, dead, or looks misspelt."""
    for name in sorted(draft.env):
        row = describe(name)
        if name in draft.origin:
            continue
        if name.startswith(PREFIX_FORM):
            _note_prefix_form(draft, name)
            continue
        if row is None:
            _suggest(draft, name)
        elif row.kind is Kind.OBSOLETE and name not in draft.settings:
            quiet = draft.env[name].lower() in row.quiet
            draft.ignore(name, f"{name} has no effect: {row.note}", source=Source.OBSOLETE, quiet=quiet)
        elif row.kind is Kind.IGNORED:
            draft.ignore(name, f"{name} is ignored: {row.note}")
        elif row.kind is Kind.OPTION and draft.manifest is None and name not in draft.fates:
            draft.ignore(name, "not passed on: the engine's options are unknown", quiet=True)
        elif name.startswith("VLLM_") and name not in VARIABLES:
            _suggest(draft, name)


def _note_prefix_form(draft: Draft, name: str) -> None:
    option = name.removeprefix(PREFIX_FORM)
    if draft.origin.get(option) == name:
        return
    if may_be_prefixed(option) or (describe(option) is None and draft.flag(option) is not None):
        same = draft.env[option] == draft.env[name]
        draft.ignore(name, f"{name} is ignored: {option} is set too and wins", quiet=same)
    else:
        draft.ignore(name, f"{name} is ignored: {option} is no option of vLLM that can be set so")


def _suggest(draft: Draft, name: str) -> None:
    """A note on a variable that nobody knows, where a known one is near."""
    options = draft.manifest.flags if draft.manifest is not None else {}
    is_engines = name.startswith("VLLM_")
    if name in options or (name.startswith(FOREIGN) and not is_engines) or len(name) < 5:
        return
    # Short words are near to many others; what has no underscore is as a rule somebody else's.
    cutoff = 0.85 if "_" in name and not name.startswith(("VLLM_", "HF_")) else 0.9
    # Services of a cluster bring hundreds of names; one of another length cannot be near enough.
    longest = len(name) * (2 / cutoff - 1)
    shortest = len(name) / (2 / cutoff - 1)
    words = set(name.split("_"))
    candidates = [
        other
        for other in _SUGGESTED | (set() if is_engines else options.keys())
        if shortest <= len(other) <= longest
        and (len(words) == 1 or not words.isdisjoint(other.split("_")))
        and other not in OWNED
        and (not is_engines or other.startswith("VLLM_"))
    ]
    nearest = difflib.get_close_matches(name, sorted(candidates), n=1, cutoff=cutoff)
    if nearest:
        row = VARIABLES.get(nearest[0])
        meant = row.option if row is not None and row.weak else nearest[0]
        draft.ignore(name, f"{name} is unknown and was ignored; did you mean {meant}?")


# Writing down


def _write(draft: Draft) -> dict[str, list[str]]:
    """The arguments of each option that is left, by its name; what cannot be written leaves the draft."""
    arguments = {}
    for option in sorted(draft.settings):
        flag = draft.flag(option)
        if flag is None and draft.manifest is not None:
            version, names = draft.manifest.version, " and ".join(draft.makers(option))
            draft.drop(option, f"{names} has no effect: vLLM {version} has no option {_spelling(option)}")
            continue
        setting = draft.settings[option]
        written = (
            _unchecked(option, setting.value) if flag is None else _argument(draft, option, flag, setting)
        )
        if written:
            arguments[option] = written
    return arguments


def _argument(draft: Draft, option: str, flag: EngineFlag, setting: Setting) -> list[str]:
    """One option as arguments, by the value rules of §4.2; nothing where there is nothing to write."""
    value = setting.value
    if flag.kind in {"pair", "switch"}:
        truth = value if isinstance(value, bool) else parse_boolean(value if isinstance(value, str) else "")
        if truth is None:
            draft.fail_setting(option, "must be true or false", legal=("true", "false"))
            return []
        if truth:
            return [flag.flag]
        return [f"--no-{flag.flag[2:]}"] if flag.kind == "pair" else []
    if isinstance(value, bool):
        value = str(value).lower()
    listed = split_list(value) if isinstance(value, str) and (flag.multi or flag.kind == "repeat") else value
    elements = [listed] if isinstance(listed, str) else list(listed)
    checked = [_checked(draft, option, flag, element) for element in elements]
    words = [word for word in checked if word is not None]
    if len(words) < len(elements) or not words:
        return []
    if len(words) > 1 and any(word.startswith("-") and not is_number(word) for word in words):
        draft.fail_setting(option, "must not hold a value that begins with a dash beside others")
        return []
    if flag.kind == "repeat":
        return [word for each in words for word in _pair(flag.flag, each)]
    return [flag.flag, *words] if len(words) > 1 else _pair(flag.flag, words[0])


def _pair(flag: str, word: str) -> list[str]:
    # A value with a leading dash would be read as an option.
    return [f"{flag}={word}"] if word.startswith("-") else [flag, word]


def _checked(draft: Draft, option: str, flag: EngineFlag, text: str) -> str | None:
    """The element as vLLM takes it; None if it was refused."""
    if option not in draft.settings:
        return None
    if flag.choices:
        if text in flag.choices:
            return text
        same = [choice for choice in flag.choices if choice.lower() == text.lower()]
        if not same:
            draft.fail_setting(option, choices_problem(text, flag.choices), legal=tuple(flag.choices))
        return same[0] if same else None
    if option == "MAX_MODEL_LEN" and text.lower() == "auto":
        return "auto"
    wrong = {
        "integer": not is_integer(text) and "must be a whole number",
        "number": not is_number(text) and "must be a number",
        "size": not is_size(text) and "must be a whole number, such as 32000, 32k (32,000) or 1K (1,024)",
        "json": _parsed(option, text) is None and "must be valid JSON",
    }.get(flag.value)
    if option in _TEXT_OR_OBJECT and text.startswith("{") and text.endswith("}") and not wrong:
        wrong = parse_object(text) is None and "must be valid JSON"
    if wrong:
        draft.fail_setting(option, wrong)
        return None
    return text


def _parsed(option: str, text: str) -> Any:
    """The JSON as vLLM reads it for this option; None if it would refuse it."""
    sized = option.endswith("_CONFIG") and option not in _PLAIN_JSON
    return parse_config(text) if sized and text.startswith("{") else parse_json(text)


def _unchecked(option: str, value: Value) -> list[str]:
    """One option of a vLLM that nobody has asked."""
    flag = _spelling(option)
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, *value] if isinstance(value, tuple) else _pair(flag, value)


def _spelling(option: str) -> str:
    return "--" + option.lower().replace("_", "-")
