"""Where the gateway is and which key opens it.

`PILOTLIGHT_URL` and `PILOTLIGHT_API_KEY` win. Without them, a running gateway's `server.json` and `cli.key`
in the data folder are read, both written by `pilotlight up` with mode 0600. The key in the data folder is
only ever sent to the URL that stands beside it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pilotlight.errors import DataFolderError, InvalidInputError

URL_VARIABLE = "PILOTLIGHT_URL"
KEY_VARIABLE = "PILOTLIGHT_API_KEY"
SERVER_FILE = "server.json"
KEY_FILE = "cli.key"
URL_DEFAULT = "http://127.0.0.1:8400"


@dataclass(frozen=True, slots=True)
class Access:
    """A gateway and the key for it.

    Attributes:
        url: Base URL without a slash at its end.
        key: API key, or None where none was found.
        key_source: Where the key came from, or why there is none, for messages.
    """

    url: str
    key: str | None = field(repr=False)
    key_source: str


def find_access(home: Path | None = None) -> Access:
    """The gateway that this process should talk to, and its key.

    Args:
        home: The data folder; None takes the usual one. It is not looked at when the environment says both.

    Raises:
        InvalidInputError: `PILOTLIGHT_URL` or `PILOTLIGHT_API_KEY` cannot be used.
        DataFolderError: A file in the data folder is damaged or may not be read.
    """
    named_url = os.environ.get(URL_VARIABLE, "").strip()
    named_key = os.environ.get(KEY_VARIABLE, "").strip()
    if named_key and not (named_key.isascii() and named_key.isprintable() and " " not in named_key):
        raise InvalidInputError(f"{KEY_VARIABLE} holds blanks or characters that no key has")
    if named_url:
        check_url(named_url, URL_VARIABLE)
        if named_key:
            return Access(named_url.rstrip("/"), named_key, KEY_VARIABLE)
    folder = home or _default_home()
    local_url = _read_server(folder / SERVER_FILE)
    url = (named_url or local_url or URL_DEFAULT).rstrip("/")
    if named_key:
        return Access(url, named_key, KEY_VARIABLE)
    if named_url and (local_url is None or url != local_url.rstrip("/")):
        return Access(url, None, f"none: set {KEY_VARIABLE} to a key of the gateway at {url}")
    path = folder / KEY_FILE
    key = _read_private(path)
    if not key:
        return Access(
            url, None, f"none: there is no {path}; set {KEY_VARIABLE}, or start `pilotlight up` here"
        )
    return Access(url, key, str(path))


def check_url(url: str, name: str) -> None:
    """Make sure that a URL can be the base of requests.

    Raises:
        InvalidInputError: Names the setting, its value and what is legal.
    """
    try:
        parts = urlsplit(url)
        legal = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        legal = False
    if not legal or parts.query or parts.fragment or parts.username:
        raise InvalidInputError(f"{name}={url!r} is not a base URL like {URL_DEFAULT}")


def _default_home() -> Path:
    # Settings bring pydantic along, which a caller with both variables set need not pay for.
    from pilotlight.settings import default_home  # noqa: PLC0415

    return default_home()


def _read_private(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataFolderError(f"cannot read {path}: {error}") from error


def _read_server(path: Path) -> str | None:
    text = _read_private(path)
    if text is None:
        return None
    try:
        url = json.loads(text)["url"]
        check_url(url, "url")
    except (ValueError, KeyError, TypeError, InvalidInputError) as error:
        raise DataFolderError(f"{path} is damaged ({error}); start `pilotlight up` again") from error
    return str(url)
