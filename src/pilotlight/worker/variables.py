"""Values of environment variables, read by the rules of `vllm-worker.md` §4.2.

Pure. Every reader takes the environment and a name, gives the value or the default, and raises ConfigError
that names the variable, its value and what is legal.
"""

from __future__ import annotations

from collections.abc import Mapping

from pilotlight.engines.flags import clean_value, parse_boolean
from pilotlight.worker.errors import ConfigError


def read_number(env: Mapping[str, str], name: str, default: float, *, minimum: float) -> float:
    """A number of at least `minimum`; the default where the variable is unset, empty or `None`."""
    text = clean_value(env.get(name))
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("-inf")
    if not minimum <= value < 1e9:
        raise ConfigError(f"{name} must be a number of at least {minimum:g}, not {text!r}")
    return value


def read_boolean(env: Mapping[str, str], name: str, *, default: bool) -> bool:
    """A truth value; the default where the variable is unset, empty or `None`."""
    text = clean_value(env.get(name))
    if text is None:
        return default
    value = parse_boolean(text)
    if value is None:
        raise ConfigError(f"{name} must be true or false, not {text!r}")
    return value


def read_choice(env: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """One of the choices, in lower case; the first where the variable is unset, empty or `None`."""
    value = (clean_value(env.get(name)) or choices[0]).lower()
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value
