"""How the variables of an endpoint are read wherever they are read (`vllm-worker.md` §4.2, §8 A4). Pure."""

from __future__ import annotations

from typing import Final

MEMORY_UTILIZATION: Final = 0.95
"""Share of a device's memory that an engine may take where nobody says otherwise; console forms send it."""

_TRUTHY: Final = frozenset({"true", "1", "yes", "on", "y", "t"})
_FALSY: Final = frozenset({"false", "0", "no", "off", "n", "f"})
_UNSET: Final = frozenset({"", "none", "null", "~"})


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


def is_formal_share(text: str | None, platform: str) -> bool:
    """Whether `GPU_MEMORY_UTILIZATION` holds no wish: the forms' 0.95, for an engine that runs on CPUs.

    Forms send it to every endpoint. On a GPU it is what holds anyway; on a CPU vLLM would claim 95 % of the
    host's memory by it.
    """
    try:
        return platform == "cpu" and float(clean_value(text) or "") == MEMORY_UTILIZATION
    except ValueError:
        return False
