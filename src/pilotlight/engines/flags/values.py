"""Values of variables and arguments, read by the rules of `vllm-worker.md` §4.2. Pure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from pilotlight.core.variables import clean_value, parse_boolean

__all__ = ["clean_value", "parse_boolean"]

_SIZE: Final = re.compile(r"(\d+)(\.\d+)?([kmgtKMGT])", re.ASCII)
_SIZE_IN_JSON: Final = re.compile(r"\b\d+(?:\.\d+)?[kmgtKMGT]\b", re.ASCII)
_STRING_IN_JSON: Final = re.compile(r'("(?:[^"\\]|\\.)*")')
_UNITS: Final = {
    **{unit: 1000**power for power, unit in enumerate("kmgt", 1)},
    **{unit: 1024**power for power, unit in enumerate("KMGT", 1)},
}

_DEPTH_MAX: Final = 100
"""Nesting of JSON and YAML beyond which a text counts as damaged; nobody needs it, and recursion ends."""

_LISTED_MAX: Final = 20
"""Legal values that an error lists; of more it names the nearest."""


def parse_json(text: str) -> Any:
    """What the JSON text holds; None if it is no JSON, or nested deeper than anybody needs."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return None if is_too_deep(parsed) else parsed


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text holds; None if it holds anything else."""
    parsed = parse_json(text)
    return parsed if isinstance(parsed, dict) else None


def parse_config(text: str) -> dict[str, Any] | None:
    """As `parse_object`, with sizes such as `80m` as numbers, as vLLM reads whole configurations."""
    parts = _STRING_IN_JSON.split(text)
    # Every second part is a string.
    parts[::2] = [_SIZE_IN_JSON.sub(_plain_size, part) for part in parts[::2]]
    return parse_object("".join(parts))


def is_too_deep(value: Any, depth: int = _DEPTH_MAX) -> bool:
    """Whether lists and objects are nested so deeply that walking through them would fail."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(is_too_deep(item, depth - 1) for item in items)


def compact(value: Any) -> str:
    """JSON without blanks, as one argument; what JSON has no form for (a date of YAML) as text."""
    return json.dumps(value, separators=(",", ":"), default=str)


def split_list(text: str) -> list[str]:
    """A list from a JSON array, or from text cut at commas and blanks."""
    if text.startswith("["):
        parsed = parse_json(text)
        if isinstance(parsed, list):
            return [part if isinstance(part, str) else json.dumps(part) for part in parsed]
    return [part for part in re.split(r"[,\s]+", text) if part]


def split_names(text: str, *, blanks: bool) -> list[str]:
    """Names from a JSON array of strings, or from text cut at commas, and at blanks where those separate too.

    Raises:
        ValueError: A broken array, an empty name, or one that the command line would take for an option.
    """
    if text.startswith("["):
        names = parse_json(text)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("is not a JSON array of strings")
    elif blanks:
        names = split_list(text)
    else:
        names = text.split(",")
    names = [name.strip() for name in names]
    if not all(names):
        raise ValueError("must not hold an empty name")
    if any(name.startswith("-") for name in names):
        raise ValueError("must not hold a name that begins with a dash")
    return names


def is_integer(text: str) -> bool:
    """Whether it is a plain whole number, as Python's `int` takes it."""
    return _is_read_by(int, text)


def is_number(text: str) -> bool:
    """Whether it is a number, as Python's `float` takes it."""
    return _is_read_by(float, text)


def is_zero(text: str) -> bool:
    """Whether it is a number that is 0: `0`, `00`, `0.0`."""
    return is_number(text) and float(text) == 0


def is_size(text: str) -> bool:
    """Whether it is a number as vLLM's options for sizes take it: `32000`, `32k`, `1.5k`, `1K`, `-1`.

    A fraction goes with the decimal units only.
    """
    found = _SIZE.fullmatch(text)
    return is_integer(text) or (found is not None and (found[2] is None or found[3].islower()))


def _plain_size(found: re.Match[str]) -> str:
    text = found[0]
    return str(int(float(text[:-1]) * _UNITS[text[-1]])) if is_size(text) else text


def _is_read_by(read: Callable[[str], object], text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True


def choices_problem(value: str, legal: Sequence[str]) -> str:
    """What is wrong with a value that is none of these; with the nearest one where they are many."""
    nearest = difflib.get_close_matches(value[:100], legal, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"must be one of {listed(legal, ', ')}{hint}"


def listed(names: Sequence[str], joint: str) -> str:
    """The names for a sentence, the first of them where they are many."""
    more = len(names) - _LISTED_MAX
    return joint.join(names[:_LISTED_MAX]) + (f" and {more} more" if more > 0 else "")
