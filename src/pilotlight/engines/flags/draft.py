"""A command line in the making: what `translation` and the repairs work on.

A `Setting` is one option that will be written, with the variables it comes from. What a repair takes away
leaves a *fate* behind, so that in the end every variable of the environment can be explained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pilotlight.engines.flags.masking import abridge
from pilotlight.engines.flags.plan import FlagError, Source
from pilotlight.engines.flags.values import clean_value, is_integer, parse_boolean
from pilotlight.engines.flags.variables import PREFIX_FORM, VARIABLES, Kind, describe, may_be_prefixed
from pilotlight.engines.manifest import EngineFlag, EngineManifest

Value = str | bool | tuple[str, ...]
"""An option's value: one argument, a yes or no, or one argument for each element."""

_WORKERS_OWN: Final = frozenset({Source.OWNED, Source.DEFAULT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One option that will be written.

    Attributes:
        value: See `Value`; text is checked and converted when it is written.
        source: Where it comes from.
        variables: The variables that made it; none for the worker's own.
        note: What to say about it.
    """

    value: Value
    source: Source
    variables: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a variable that makes no option."""

    source: Source
    note: str


@dataclass(slots=True)
class Draft:
    """What is known so far.

    Attributes:
        env: The variables that are set, cleaned; those of the prefix form stand under their option's name.
        manifest: What the installed vLLM understands; None if unknown.
        texts: Contents of files that variables name, by path; None if nobody looked.
        run_folder: Where `files` will lie.
        origin: For a variable of the prefix form its real name.
        config: What the configuration file sets, by the option's name in capitals.
        extra: What `VLLM_EXTRA_ARGS` sets, by the option's name in capitals.
        settings: Options by name in capitals.
        fates: Variables that make no option.
        notes: As in `FlagPlan`.
        errors: As in `FlagPlan`.
        files: As in `FlagPlan`.
    """

    env: Mapping[str, str]
    manifest: EngineManifest | None
    texts: Mapping[str, str] | None
    run_folder: str
    origin: Mapping[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)
    settings: dict[str, Setting] = field(default_factory=dict)
    fates: dict[str, Fate] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: list[FlagError] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    # Questions

    def flag(self, option: str) -> EngineFlag | None:
        """The option as the installed vLLM has it."""
        return self.manifest.flags.get(option) if self.manifest is not None else None

    def registered(self, option: str) -> frozenset[str]:
        """Values that the installed vLLM has for an option without a closed list; empty if unknown."""
        return self.manifest.registered.get(option, frozenset()) if self.manifest is not None else frozenset()

    def called(self, name: str) -> str:
        """The variable's name as the environment spells it."""
        return self.origin.get(name, name)

    def number(self, name: str) -> int | None:
        """A variable's whole number, 0 included; None if it is unset. What is no number is an error."""
        text = self.env.get(name)
        if text is None:
            return None
        if not is_integer(text):
            self.fail(name, text, "must be a whole number")
            return None
        return int(text)

    def boolean(self, name: str) -> bool | None:
        """A variable's truth value; None if it is unset. What is neither is an error."""
        text = self.env.get(name)
        if text is None:
            return None
        truth = parse_boolean(text)
        if truth is None:
            self.fail(name, text, "must be true or false", legal=("true", "false"))
        return truth

    def text(self, option: str) -> str | None:
        """An option's value so far, as text; also what the configuration file says where nobody else does."""
        setting = self.settings.get(option)
        value = setting.value if setting is not None else self.config.get(option)
        if value is None or isinstance(value, tuple):
            return None
        return str(value).lower() if isinstance(value, bool) else str(value)

    def final(self, option: str) -> str | None:
        """As `text`, but what the extra arguments say wins."""
        return self.extra.get(option) or self.text(option)

    def truth(self, option: str) -> bool:
        """Whether a boolean option is on so far."""
        return parse_boolean(self.text(option) or "") is True

    def given(self, option: str) -> bool:
        """Whether anybody says something about an option: a variable, the file, or the extra arguments."""
        return option in self.settings or option in self.config or option in self.extra

    def makers(self, option: str, fallback: str = "") -> tuple[str, ...]:
        """The variables an option comes from so far."""
        setting = self.settings.get(option)
        return setting.variables if setting is not None else ((fallback,) if fallback else ())

    # Changes

    def put(
        self, option: str, value: Value, *variables: str, source: Source | None = None, note: str = ""
    ) -> None:
        """Set an option, in the place of what it was; names may be those of the prefix form.

        Variables that made it until now, and do no longer, are said to have lost, unless they say the same.
        """
        if source is None:
            aliased = any(VARIABLES[name].kind is not Kind.OPTION for name in variables if name in VARIABLES)
            source = Source.ALIAS if aliased else Source.VARIABLE
            if variables == ("VLLM_CONFIG_FILE",):
                source = Source.CONFIG_FILE
        names = tuple(dict.fromkeys(self.called(name) for name in variables))
        if any(name.startswith(PREFIX_FORM) for name in names) and source is Source.VARIABLE:
            source = Source.ALIAS
        before = self.settings.get(option)
        for other in before.variables if before is not None else ():
            if before is not None and other not in names:
                winner = " and ".join(names) or "the worker"
                self.ignore(
                    other,
                    f"{other} is ignored: {winner} is set too and wins",
                    quiet=before.source in _WORKERS_OWN or before.value == value,
                )
        self.settings[option] = Setting(value=value, source=source, variables=names, note=note)

    def amend(self, option: str, value: Value, note: str, *, quiet: bool = False) -> None:
        """Change an option's value and say why."""
        self.settings[option] = replace(self.settings[option], value=value, note=note)
        if not quiet:
            self.notes.append(note)

    def drop(self, option: str, note: str, *, source: Source = Source.IGNORED, quiet: bool = False) -> None:
        """Take an option away and say why; nothing is said of what the worker added by itself."""
        setting = self.settings.pop(option, None)
        if setting is None or setting.source in _WORKERS_OWN:
            return
        for name in setting.variables:
            self.fates[name] = Fate(source, note)
        if not quiet:
            self.notes.append(note)

    def ignore(self, name: str, note: str, *, source: Source = Source.IGNORED, quiet: bool = False) -> None:
        """Say that a variable makes no option, and why."""
        self.fates[self.called(name)] = Fate(source, note)
        if not quiet:
            self.notes.append(note)

    def fail(self, variable: str, value: str, problem: str, *, legal: tuple[str, ...] = ()) -> None:
        """Stop the start because of a variable; `problem` follows its name and value in the message."""
        name = self.called(variable)
        row = VARIABLES.get(variable)
        shown = "***" if row is not None and row.secret else repr(abridge(value))
        message = f"{name}={shown} {problem}"
        if not any(error.message == message for error in self.errors):
            self.errors.append(FlagError(variable=name, value=abridge(value), legal=legal, message=message))
        self.fates[name] = Fate(Source.IGNORED, f"refused: {problem}")

    def fail_option(self, option: str, problem: str) -> None:
        """Stop the start because of an option's value, wherever that comes from."""
        spelling = "--" + option.lower().replace("_", "-")
        if option in self.extra:
            self.fail("VLLM_EXTRA_ARGS", f"{spelling} {self.extra[option]}", problem)
        elif option in self.settings:
            self.fail_setting(option, problem)
        else:
            path = self.env.get("VLLM_CONFIG_FILE", "")
            self.fail("VLLM_CONFIG_FILE", path, f"holds {spelling[2:]}, which {problem}")

    def fail_setting(self, option: str, problem: str, *, legal: tuple[str, ...] = ()) -> None:
        """Stop the start because of an option's value, and take the option away."""
        setting = self.settings.pop(option)
        value = " ".join(setting.value) if isinstance(setting.value, tuple) else str(setting.value)
        for name in setting.variables or (option,):
            self.fail(name, self.env.get(name, value), problem, legal=legal)


def read_environment(
    env: Mapping[str, str], manifest: EngineManifest | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """The variables that are set, and the real names of those in the prefix form (§4.2, §4.9).

    `VLLM_RUNPOD_SEED=1` counts as `SEED=1` where that is not set; what is no option has no such form.
    """
    cleaned = {name: text for name, raw in env.items() if (text := clean_value(raw)) is not None}
    origin: dict[str, str] = {}
    for name in sorted(cleaned):
        option = name.removeprefix(PREFIX_FORM)
        known = may_be_prefixed(option) or (
            manifest is not None and describe(option) is None and option in manifest.flags
        )
        if option != name and known and option not in cleaned:
            cleaned[option] = cleaned[name]
            origin[option] = name
    return cleaned, origin


def without_prefix(env: Mapping[str, str]) -> dict[str, str]:
    """The environment with `VLLM_RUNPOD_X` renamed to `X` where X is an option, alias or part, and unset.

    For whoever reads variables beside `translate`, which names the variable as it is written.
    """
    _, origin = read_environment(env)
    renamed = {name: env[real] for name, real in origin.items()}
    return {name: text for name, text in env.items() if name not in origin.values()} | renamed
