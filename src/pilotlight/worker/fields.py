"""Reads single fields of a job's input with the coercions of `vllm-worker.md` §1.2.

Pure. Every reader raises InputError that names the field, its value and what is legal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeGuard

from pilotlight.worker.errors import InputError

_DIGITS_MAX: Final = 20
"""Longest number that is read out of a text. Arbitrary."""


def read_boolean(fields: Mapping[str, Any], key: str) -> bool:
    """A truth value; null and absent are false. `"true"`, `"false"`, 1 and 0 count, too."""
    value = fields.get(key)
    if value is None or value is False or value is True:
        return bool(value)
    if isinstance(value, str) and value.lower() in {"true", "false", "1", "0"}:
        return value.lower() in {"true", "1"}
    if is_integer(value) and value in {0, 1}:
        return bool(value)
    raise InputError(f"{key} must be true or false, not {value!r:.80}", param=key)


def read_number(fields: Mapping[str, Any], key: str) -> float:
    """A number that is not negative; 0 for absent, null and zero. Numeric strings count."""
    value = fields.get(key)
    if value is None:
        return 0.0
    number = None
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = None
    # The second comparison also refuses NaN and infinity, which JSON readers let through as text.
    if number is None or not 0 <= number < 1e9:
        raise InputError(f"{key} must be a number that is not negative, not {value!r:.80}", param=key)
    return number


def read_object(fields: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """An object; None for null and absent."""
    value = fields.get(key)
    if value is None or isinstance(value, dict):
        return value
    raise InputError(f"{key} must be an object, not {kind_of(value)}", param=key)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_integer(value: object) -> int | None:
    """The whole number that the engine reads in a value, such as 2, 2.0 and `"2"`; None for all others."""
    if is_integer(value):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < _DIGITS_MAX:
        return int(value)
    return None


def kind_of(value: object) -> str:
    """JSON's name for a value's type, for messages."""
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {names[type(value)].split()[-1]}"
    return names.get(type(value), "a number")
