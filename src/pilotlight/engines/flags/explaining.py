"""What became of each variable, from a finished draft (`pilotlight worker --explain`). Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pilotlight.engines.flags.draft import Draft, Setting
from pilotlight.engines.flags.masking import MASK, is_secret_name, mask_secrets, mask_value
from pilotlight.engines.flags.plan import Explanation, Source
from pilotlight.engines.flags.values import compact, is_number
from pilotlight.engines.flags.variables import PREFIX_FORM, Kind, Variable, describe

_SOURCES = {
    Kind.WORKER: Source.WORKER,
    Kind.STORAGE: Source.STORAGE,
    Kind.ENGINE: Source.ENGINE,
    Kind.PLATFORM: Source.PLATFORM,
    Kind.KEPT_BACK: Source.IGNORED,
    Kind.UNMAPPED: Source.IGNORED,
    Kind.OBSOLETE: Source.OBSOLETE,
    Kind.IGNORED: Source.IGNORED,
    Kind.PART: Source.WORKER,
}


def explain(
    draft: Draft,
    arguments: Mapping[str, Sequence[str]],
    config: str | None,
    extra: Sequence[str],
    unset: Sequence[str],
) -> tuple[Explanation, ...]:
    """One line for each variable that the contract or the engine knows, and for what the worker adds.

    Args:
        draft: When everything is decided.
        arguments: What was written, by the option's name in capitals.
        config: Path of the configuration file in use.
        extra: The extra arguments.
        unset: Variables that are there and hold nothing.
    """
    lines: dict[str, list[Explanation]] = {}
    own: list[Explanation] = []
    for option, setting in draft.settings.items():
        flag, value = _shown(arguments.get(option, ()))
        for name in setting.variables or ("",):
            line = Explanation(
                variable=name,
                flag=flag,
                value=value or (_value(draft, name) if not flag else ""),
                source=setting.source,
                note=setting.note if flag else setting.note or _unwritten(setting),
                default=_default(name),
            )
            lines.setdefault(name, []).append(line) if name else own.append(line)
    for name in draft.env:
        if name in draft.origin or name in lines:
            continue
        line_or_none = _line(draft, name, config)
        if line_or_none is not None:
            lines[name] = [line_or_none]
    if config is not None:
        lines.setdefault("VLLM_CONFIG_FILE", []).extend(_config_lines(draft))
    if extra:
        lines["VLLM_EXTRA_ARGS"] = _extra_lines(extra)
    for name in unset:
        if describe(name) is not None or draft.flag(name) is not None:
            note = "holds nothing, which means that it is not set"
            lines[name] = [Explanation(variable=name, source=Source.UNSET, note=note, default=_default(name))]
    return (*(line for name in sorted(lines) for line in lines[name]), *own)


def _line(draft: Draft, name: str, config: str | None) -> Explanation | None:
    """What became of a variable that made no option; None for a stranger's."""
    fate, row = draft.fates.get(name), describe(name)
    if fate is not None:
        return Explanation(
            variable=name,
            value=_value(draft, name),
            source=fate.source,
            note=fate.note,
            default=_default(name),
        )
    if name == "VLLM_CONFIG_FILE" and config is not None:
        return Explanation(variable=name, flag="--config", value=config, source=Source.CONFIG_FILE)
    if row is None:
        is_option = draft.manifest is not None and name in draft.manifest.flags
        note = "not mapped: the worker program decides this option"
        return Explanation(variable=name, source=Source.IGNORED, note=note) if is_option else None
    return Explanation(
        variable=name,
        value=_value(draft, name),
        source=_SOURCES.get(row.kind, Source.IGNORED),
        note=row.note,
        default=row.default,
    )


def _config_lines(draft: Draft) -> list[Explanation]:
    lines = []
    for option, value in draft.config.items():
        text = value if isinstance(value, str) else compact(value)
        winner = "VLLM_EXTRA_ARGS" if option in draft.extra else " and ".join(draft.makers(option))
        lines.append(
            Explanation(
                variable="VLLM_CONFIG_FILE",
                flag="--" + option.lower().replace("_", "-"),
                value=MASK if is_secret_name(option) else mask_value(text),
                source=Source.CONFIG_FILE,
                note=f"overruled by {winner}" if winner and winner != "VLLM_CONFIG_FILE" else "",
            )
        )
    return lines


def _extra_lines(extra: Sequence[str]) -> list[Explanation]:
    """One line for each option, with the words that follow it."""
    groups: list[list[str]] = []
    for word, shown in zip(extra, mask_secrets(extra), strict=True):
        if groups and not (word.startswith("-") and not is_number(word)):
            groups[-1].append(shown)
        else:
            groups.append([shown])
    lines = []
    for words in groups:
        flag, value = _shown(words)
        lines.append(
            Explanation(variable="VLLM_EXTRA_ARGS", flag=flag, value=value, source=Source.EXTRA_ARGS)
        )
    return lines


def _shown(written: Sequence[str]) -> tuple[str, str]:
    if not written:
        return "", ""
    flag, equals, value = written[0].partition("=")
    rest = [value] if equals else list(written[1:])
    masked = mask_secrets([flag, *rest])
    return flag, " ".join(masked[1:])


def _unwritten(setting: Setting) -> str:
    return "false is what vLLM does without it" if setting.variables else ""


def _value(draft: Draft, name: str) -> str:
    if name == "VLLM_EXTRA_ARGS":
        # Only shown whole where it could not be split, and then secrets within cannot be found.
        return "…"
    real = name.removeprefix(PREFIX_FORM)
    row: Variable | None = describe(name)
    if (row is not None and row.secret) or is_secret_name(name):
        return MASK
    return mask_value(draft.env.get(name, draft.env.get(real, "")))


def _default(name: str) -> str:
    row = describe(name)
    return row.default if row is not None else ""
