"""Options that come as raw text: `VLLM_EXTRA_ARGS`, the configuration file (`vllm-worker.md` §4.1, §4.10).

Pure. Each option is checked against the manifest, because vLLM says what it does not understand only after
ten seconds.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from pilotlight.engines.flags.draft import Draft
from pilotlight.engines.flags.values import is_number, is_too_deep, listed
from pilotlight.engines.flags.variables import obsolete_option
from pilotlight.engines.manifest import EngineFlag, EngineManifest

OWNED: Final = frozenset(
    {"HOST", "PORT", "UDS", "API_KEY", "MODEL", "MODEL_TAG", "CONFIG", "HEADLESS", "HELP", "FD"}
)
"""Options that the worker decides."""

CONFIG_FILE: Final = "/vllm_config.yaml"
"""Used where it exists and `VLLM_CONFIG_FILE` is unset."""

_HARMLESS_IN_FILE: Final = frozenset({"HOST", "PORT", "UDS", "MODEL", "MODEL_TAG"})
"""Owned options that the command line overrules anyway; `MODEL` is read from the file."""


def config_path(env: Mapping[str, str], texts: Mapping[str, str] | None) -> str | None:
    """The configuration file of an environment; None if it has none."""
    named = env.get("VLLM_CONFIG_FILE")
    if named is None and texts is not None and CONFIG_FILE in texts:
        return CONFIG_FILE
    return named


def read_config(text: str) -> dict[str, Any]:
    """What a configuration file says, by the option's name in capitals.

    Raises:
        ValueError: It is no YAML, or no mapping.
    """
    try:
        parsed = msgspec.yaml.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"is not valid YAML: {error}") from error
    if is_too_deep(parsed):
        raise ValueError("is nested too deeply")
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        msg = "must hold one option per line, as `max-model-len: 4096`"
        raise ValueError(msg)  # noqa: TRY004 - what is wrong is a text
    return {_capitals(str(key)): value for key, value in parsed.items()}


def take_config_file(draft: Draft) -> str | None:
    """Read the configuration file into the draft; its path, or None if there is none or it cannot be used."""
    path = config_path(draft.env, draft.texts)
    if path is None:
        return None
    if not path.endswith((".yaml", ".yml")):
        draft.fail("VLLM_CONFIG_FILE", path, "must end in .yaml or .yml")
        return None
    if draft.texts is None:
        return path
    if path not in draft.texts:
        draft.fail("VLLM_CONFIG_FILE", path, "does not exist or cannot be read")
        return None
    try:
        config = read_config(draft.texts[path])
    except ValueError as error:
        draft.fail("VLLM_CONFIG_FILE", path, str(error))
        return None
    config = {_meant(draft.manifest, _option(name)): value for name, value in config.items()}
    for name in config:
        if name in OWNED - _HARMLESS_IN_FILE:
            draft.fail(
                "VLLM_CONFIG_FILE", path, f"must not hold {_option(name)[2:]}; the worker sets it itself"
            )
        elif name in _HARMLESS_IN_FILE - {"MODEL", "MODEL_TAG"}:
            draft.notes.append(f"{_option(name)[2:]} in {path} has no effect: the worker sets it itself")
        elif (problem := _unknown(draft.manifest, _option(name))) is not None:
            draft.fail("VLLM_CONFIG_FILE", path, f"holds {_option(name)[2:]}, {problem}")
    draft.config = {name: value for name, value in config.items() if name not in OWNED}
    return path


def take_extra_arguments(draft: Draft) -> tuple[str, ...]:
    """The arguments of `VLLM_EXTRA_ARGS`, the options among them noted in the draft."""
    text = draft.env.get("VLLM_EXTRA_ARGS")
    if text is None:
        return ()
    try:
        arguments = tuple(shlex.split(text))
    except ValueError as error:
        # What cannot be split cannot be searched for secrets either, so it is not shown.
        draft.fail("VLLM_EXTRA_ARGS", "…", f"cannot be split like a shell line: {error}")
        return ()
    found: dict[str, str] = {}
    for option, values in group_arguments(arguments):
        if option is None:
            draft.fail("VLLM_EXTRA_ARGS", values[0], "belongs to no option")
            continue
        name = _checked_option(draft, option)
        if name is None:
            continue
        flag = draft.flag(name)
        dotted = "." in option
        problem = None if flag is None or dotted else _wrong_values(flag, values)
        if problem is not None:
            draft.fail("VLLM_EXTRA_ARGS", option, problem)
        negated = flag is not None and flag.kind == "pair" and option.startswith("--no")
        found[name] = " ".join(values) or ("false" if negated else "true")
    draft.extra = found
    return arguments


def group_arguments(arguments: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """Each option with the values that follow it, `--x=V` taken apart; None in front of words before any."""
    groups: list[tuple[str | None, list[str]]] = []
    for word in arguments:
        if word.startswith("-") and len(word) > 1 and not is_number(word):
            option, equals, value = word.partition("=")
            groups.append((option, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append((None, [word]))
    return groups


def _checked_option(draft: Draft, option: str) -> str | None:
    """The name in capitals of the option that is meant; None if it must not be given, or nobody knows it."""
    if not option.startswith("--"):
        name = "HELP" if option == "-h" else _short(draft.manifest, option.partition(".")[0])
    else:
        plain = "--" + option[2:].replace("_", "-").partition(".")[0]
        if plain == "--":
            draft.fail("VLLM_EXTRA_ARGS", option, "must not be given: it ends the options")
            return None
        name = _meant(draft.manifest, plain)
        if (problem := _unknown(draft.manifest, plain)) is not None and name not in OWNED:
            draft.fail("VLLM_EXTRA_ARGS", option, f"is an option {problem}")
            return None
    reason = {"CONFIG": "the worker sets it itself; set VLLM_CONFIG_FILE"} | {
        "HF_TOKEN": "it would show in process lists; set HF_TOKEN"
    }
    if name is not None and (name in OWNED or name == "HF_TOKEN"):
        means = "" if _capitals(option.partition(".")[0]) == name else f"it means {_option(name)}, and "
        why = reason.get(name, "the worker sets it itself")
        draft.fail("VLLM_EXTRA_ARGS", option, f"must not be given: {means}{why}")
        return None
    return name


def _wrong_values(flag: EngineFlag, values: Sequence[str]) -> str | None:
    """Why the parser would not take these values with this option, or would take them for something else."""
    if flag.kind in {"pair", "switch"}:
        return f"takes no value, but {values[0]!r} follows" if values else None
    if not values:
        return "needs a value"
    return None if flag.multi or len(values) == 1 else f"takes one value, but {values[1]!r} follows too"


def _unknown(manifest: EngineManifest | None, option: str) -> str | None:
    """Why vLLM would refuse an option; None if it would not, or if nobody knows."""
    if manifest is None or _candidates(manifest, option):
        return None
    gone = obsolete_option(_capitals(option[2:].removeprefix("no-")))
    if gone is not None:
        return f"that this vLLM no longer has: {gone.note}"
    several = sorted(item for item in _spellings(manifest) if item.startswith(option))
    if several:
        return f"that could mean {listed(several, ' or ')}"
    nearest = difflib.get_close_matches(option, sorted(_spellings(manifest)), n=1, cutoff=0.6)
    return "that this vLLM does not know" + (f"; did you mean {nearest[0]}?" if nearest else "")


def _meant(manifest: EngineManifest | None, option: str) -> str:
    """The option's name in capitals, unique beginnings filled up as argparse does.

    Where nobody knows the options, a beginning of what must not be given counts as that.
    """
    if manifest is not None:
        found = _candidates(manifest, option)
    else:
        names = sorted(OWNED | {"HF_TOKEN"})
        found = [spelling for spelling in map(_option, names) if spelling.startswith(option)]
    return _capitals((found[0] if found else option)[2:].removeprefix("no-"))


def _candidates(manifest: EngineManifest, option: str) -> list[str]:
    """The one option that is meant, as argparse finds it: by its whole name, or by a unique beginning."""
    known = _spellings(manifest)
    if option in known:
        return [option]
    found = sorted(item for item in known if item.startswith(option))
    return found if len(found) == 1 else []


def _spellings(manifest: EngineManifest) -> set[str]:
    known = {flag.flag for flag in manifest.flags.values()}
    return known | {f"--no-{flag.flag[2:]}" for flag in manifest.flags.values() if flag.kind == "pair"}


def _short(manifest: EngineManifest | None, option: str) -> str | None:
    flags: Iterable[tuple[str, tuple[str, ...]]] = (
        ((name, flag.short) for name, flag in manifest.flags.items()) if manifest is not None else ()
    )
    return next((name for name, short in flags if option in short), None)


def _capitals(option: str) -> str:
    return option.lstrip("-").replace("-", "_").upper()


def _option(name: str) -> str:
    return "--" + name.lower().replace("_", "-")
