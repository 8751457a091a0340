"""What `translate` answers: a command line, and for each variable what became of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pilotlight.engines.flags.parallel import Ranks


class Source(StrEnum):
    """Where a value comes from (`vllm-worker.md` §4.1); without a flag, what becomes of the variable."""

    OWNED = "worker-owned"
    EXTRA_ARGS = "extra args"
    BAKED = "baked"
    ALIAS = "alias"
    VARIABLE = "variable"
    CONFIG_FILE = "config file"
    DEFAULT = "default"
    WORKER = "worker"
    ENGINE = "engine"
    STORAGE = "storage"
    PLATFORM = "platform"
    OBSOLETE = "obsolete"
    IGNORED = "ignored"
    UNSET = "unset"


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
class Explanation:
    """What became of one variable; one more line for each further flag that it makes.

    Attributes:
        variable: Its name; "" for what the worker adds by itself.
        flag: The option it became; "" for none.
        value: The option's value, else the variable's; secrets hidden.
        source: Where the value comes from, or what becomes of the variable.
        note: One sentence, where there is something to say.
        default: The documented default; "" where there is none.
    """

    variable: str
    flag: str = ""
    value: str = ""
    source: Source
    note: str = ""
    default: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagPlan:
    """The command line that an environment asks for.

    Attributes:
        argv: Arguments after the program's name, without model and address.
        notes: One sentence for each variable that was repaired, ignored or looks misspelt.
        errors: Variables that stop the start; empty if `argv` can be used.
        files: Texts to write before the start, by file name below the run folder.
        explanations: What became of each variable, by name; what the worker adds comes last.
        ranks: Over how many GPUs the model is to be spread, as far as that is said.
    """

    argv: tuple[str, ...]
    notes: tuple[str, ...] = ()
    errors: tuple[FlagError, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    explanations: tuple[Explanation, ...] = ()
    ranks: Ranks = field(default_factory=Ranks)

    def is_default(self, flag: str) -> bool:
        """Whether an option is written because nobody said anything about it."""
        return any(line.flag == flag and line.source is Source.DEFAULT for line in self.explanations)
