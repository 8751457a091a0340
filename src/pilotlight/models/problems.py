"""What goes wrong with a hub, in our own words: every failure of its client library becomes one of these.

A refusal meets the next try again; a hub that cannot be reached may answer then. Neither carries the
signature of an address, which would let whoever reads a log fetch the file.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pilotlight.domain.repository import Repository, RepositoryKind, revision_field
from pilotlight.errors import InvalidInputError, PilotlightError
from pilotlight.models.cache import MAIN, FetchCancelledError, local_problem
from pilotlight.models.catalog import MODEL_FIELD

PUBLIC_HUB = "https://huggingface.co"

DISK_ADVICE = (
    "make room (`pilotlight models ls`, `pilotlight models rm`), or set HF_HUB_CACHE to another disk"
)
_TOKEN_ADVICE = "set HF_TOKEN in the endpoint's environment (--env HF_TOKEN=…) or in the gateway's"  # noqa: S105
_CACHE_ADVICE = "see that this program may write there, or set HF_HUB_CACHE to another folder"

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT})
_LOCAL_ERRORS = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST,
        errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE,
    }
)  # fmt: skip
"""What only this machine's own disks and limits answer."""

_QUERY = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]*")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUTHY = frozenset({"1", "ON", "YES", "TRUE"})


class HubUnreachableError(PilotlightError):
    """A hub that does not answer; the caller may try again or use a folder."""


class HubRefusedError(InvalidInputError):
    """A repository that cannot be had, for a reason that another try would meet again.

    Args:
        cause: What is the matter.
        advice: What to do about it.
        kind: Machine-readable class: `unauthorized`, `model_not_found`, `disk_full`, `cache_unusable` or
            `bad_repository`.
        field: Dotted name of the input that is to be changed.
    """

    def __init__(self, cause: str, advice: str, *, kind: str, field: str = MODEL_FIELD) -> None:
        super().__init__(f"{cause}: {advice}" if advice else cause, field=field)
        self.cause = cause
        self.advice = advice
        self.kind = kind


@dataclass(frozen=True, slots=True)
class HubAccess:
    """Which hub, and as whom.

    Attributes:
        endpoint: Its URL, without a slash at the end.
        token: Hugging Face token; None asks as nobody, whatever the client library may have stored.
    """

    endpoint: str
    token: str | None = field(repr=False)

    @property
    def sent(self) -> str | bool:
        """The token as the client library takes it; False keeps it from looking for one."""
        return self.token or False


def access_to(endpoint: str | None, token: str | None) -> HubAccess:
    """The hub at this URL, else the one this process is set to, else the public one."""
    # The library reads the variable when it is imported, which may be before the operator's setting is known.
    url = endpoint or os.environ.get("HF_ENDPOINT") or PUBLIC_HUB
    return HubAccess(url.rstrip("/"), token)


def forbidden_by() -> str | None:
    """The variable of this process that forbids asking any hub, or None."""
    return next((name for name in _OFFLINE if os.environ.get(name, "").upper() in _TRUTHY), None)


def field_of(repository: Repository) -> str:
    """The input that names a repository."""
    return MODEL_FIELD if repository.kind is RepositoryKind.MODEL else f"env.{repository.variable}"


def without_queries(text: str) -> str:
    """A text with the queries of its URLs taken out; they may be signatures."""
    return _QUERY.sub(r"\1", text)


@contextmanager
def translated(
    repository: Repository, access: HubAccess, cache: Path, stop: threading.Event | None = None
) -> Iterator[None]:
    """Turn everything that the client library raises into our errors, cause kept."""
    try:
        yield
    except PilotlightError:
        raise
    except Exception as error:
        if stop is not None and stop.is_set():
            raise FetchCancelledError(f"the download of {repository.name} was cancelled") from error
        raise _translate(error, repository, access, cache) from error


def comes_from_elsewhere(error: HfHubHTTPError, access: HubAccess) -> bool:
    """Whether not the hub answered but whoever stores its files, to which it had led the way."""
    answered, asked = urlsplit(str(error.response.url)), urlsplit(access.endpoint)
    return (answered.scheme, answered.netloc) != (asked.scheme, asked.netloc)


def _translate(error: Exception, repository: Repository, access: HubAccess, cache: Path) -> PilotlightError:
    name, page = repository.name, f"{access.endpoint}/{repository.name}"
    if isinstance(error, HfHubHTTPError):
        if comes_from_elsewhere(error, access):
            host, status = urlsplit(str(error.response.url)).netloc, error.response.status_code
            return HubUnreachableError(
                f"model {name} cannot be read from {page}: {host}, to which that leads, answers {status}"
            )
        refused = _refusal(error, repository, access, page)
        if refused is not None:
            return refused
    elif isinstance(error, OSError) and not isinstance(error, HfHubHTTPError | LocalEntryNotFoundError):
        if error.errno in _DISK_ERRORS:
            cause = f"the disk of {cache} filled up during the download of {name}"
            return HubRefusedError(cause, DISK_ADVICE, kind="disk_full")
        if error.errno in _LOCAL_ERRORS:
            return HubRefusedError(local_problem(cache, error), _CACHE_ADVICE, kind="cache_unusable")
    text = without_queries(str(error)).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    return HubUnreachableError(f"model {name} cannot be read from {page}: {first}")


def _refusal(
    error: HfHubHTTPError, repository: Repository, access: HubAccess, page: str
) -> HubRefusedError | None:
    name, field, token = repository.name, field_of(repository), access.token
    if isinstance(error, GatedRepoError):
        if token is None:
            advice = f"accept its terms at {page}, then {_TOKEN_ADVICE}"
        else:
            advice = (
                f"accept its terms at {page} with the account of this HF_TOKEN, and see that the token may "
                "read gated repositories"
            )
        return HubRefusedError(f"model {name} is gated", advice, kind="unauthorized", field=field)
    if isinstance(error, RevisionNotFoundError):
        cause = f"model {name} has no revision {repository.revision or MAIN!r} on the hub"
        return HubRefusedError(
            cause, f"see {page}/refs", kind="model_not_found", field=revision_field(repository.variable)
        )
    if isinstance(error, RepositoryNotFoundError):
        advice = f"if it is private, {_TOKEN_ADVICE}" if token is None else "or this HF_TOKEN may not see it"
        cause = f"the hub has no model {name} at {page}"
        return HubRefusedError(cause, advice, kind="model_not_found", field=field)
    if isinstance(error, EntryNotFoundError):
        path = urlsplit(str(error.response.url)).path.rpartition("/resolve/")[2].partition("/")[2]
        cause = f"model {name} lists {path}, but the hub does not have it"
        return HubRefusedError(cause, "name another revision", kind="model_not_found", field=field)
    status = error.response.status_code
    if status not in {401, 403}:
        return None
    whom = f"the hub refuses {name} to this HF_TOKEN" if token else f"the hub refuses {name}"
    advice = "see that the token is right, not expired, and may read it" if token else _TOKEN_ADVICE
    return HubRefusedError(f"{whom} ({status})", advice, kind="unauthorized", field=field)
