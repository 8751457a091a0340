"""What must not be shown: secrets within values, command lines and sentences (`vllm-worker.md` §4.1 step 7).

Pure. Whatever a person or a log gets to see of an environment goes through `mask_value` or `mask_secrets`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from pilotlight.engines.flags.values import compact, parse_json

MASK: Final = "***"
"""What is shown in place of a secret."""

# `num_speculative_tokens` and `stop_token_ids` are none, `api_key`, `apiKey` and `kv.token` are.
_WORD: Final = r"(?:token|api_?keys?|key|secrets?|passwords?|passwd|credentials?|authorization|signature)"
_CAMEL: Final = r"(?:Tokens?|Keys?|Secrets?|Passwords?|Credentials?)"
_NAME: Final = rf"(?:(?:[\w.-]*[_.-])?(?i:{_WORD})|[\w.-]*[a-z0-9]{_CAMEL})"
_SECRET_NAME: Final = re.compile(_NAME)
_SECRET_IN_TEXT: Final = re.compile(
    rf"""
    (?P<name> (?<![\w.-]) (?P<quote>\\?["']?) {_NAME} (?P=quote) \s* [:=] \s* )
    (?: "(?:[^"\\]|\\.)*"? | '(?:[^'\\]|\\.)*'? | \\["'].*?(?:\\["']|$) | \[[^\]]*\]? | \{{[^}}]*\}}?
      | (?:(?i:bearer|basic|token)\s+)? [^\s,;&"'}}\]]+ )
    """,
    re.VERBOSE,
)
_HINT: Final = re.compile(r"(?i)token|key|secret|passw|credential|authorization|signature|://")
"""What every secret that is found has near it; most texts have none of it."""

_CREDENTIALS_IN_URL: Final = re.compile(r"""://(?:[^/\s"']*|[^/\s:@"']*:[^\s"']*)@""")
_SECRET_OPTIONS: Final = ("--hf-token", "--api-key")
"""Any beginning of these counts as the whole, as it does for argparse."""


def is_secret_name(name: str) -> bool:
    """Whether what a variable, an option or a JSON key of this name holds must not be shown."""
    return _SECRET_NAME.fullmatch(name) is not None


def mask_value(text: str) -> str:
    """A value or sentence fit for logs: secrets in JSON, YAML, queries and credentials of URLs hidden."""
    if _HINT.search(text) is None:
        return text
    parsed = parse_json(text) if text.lstrip().startswith(("{", "[")) else None
    if parsed is not None:
        masked = _masked(parsed)
        return text if masked == parsed else compact(masked)
    return _SECRET_IN_TEXT.sub(rf"\g<name>{MASK}", _CREDENTIALS_IN_URL.sub(f"://{MASK}@", text))


def mask_secrets(argv: Sequence[str]) -> list[str]:
    """A command line fit for logs: what follows options named …token, …key, …secret, …password is hidden."""
    masked: list[str] = []
    hide = False
    for argument in argv:
        option, equals, value = argument.partition("=")
        is_option = argument.startswith("--")
        secret = is_option and _is_secret_option(option)
        if hide and not is_option:
            masked.append(MASK)
        elif is_option and equals:
            masked.append(f"{option}={MASK if secret else mask_value(value)}")
        else:
            masked.append(mask_value(argument))
        hide = (secret and not equals) or (hide and not is_option)
    return masked


def abridge(text: str) -> str:
    """The text as an error shows it: secrets hidden, not longer than 100 characters."""
    shown = mask_value(text)
    return shown if len(shown) <= 100 else f"{shown[:100]}…"


def _is_secret_option(option: str) -> bool:
    spelling = "--" + option[2:].replace("_", "-")
    return is_secret_name(option[2:]) or any(
        len(spelling) > 2 and secret.startswith(spelling) for secret in _SECRET_OPTIONS
    )


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: MASK if is_secret_name(name) and held not in (None, "", [], {}) else _masked(held)
            for name, held in value.items()
        }
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return mask_value(value) if isinstance(value, str) else value
