"""Repositories of a hub: which one is meant, at which revision, and what of it is needed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from pilotlight.errors import InvalidInputError

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
"""Weight formats in the order of preference; the first one that a repository has is fetched."""

OBJECT_SCHEMES = ("s3://", "gs://", "az://")
"""Object stores from which vLLM 0.32 can stream weights (transformers_utils/runai_utils.py)."""


REVISION_CHARS_MAX = 200

_FORBIDDEN_IN_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.")
"""What git takes in no branch or tag; a revision becomes a path in the cache."""


class RepositoryKind(StrEnum):
    """What of a repository is needed, and what makes a copy of it whole."""

    MODEL = "model"
    """One weight format and all that is no weight; whole with config.json and every shard."""
    ADAPTER = "adapter"
    """A LoRA adapter; whole with its configuration and weights."""
    CONFIG = "config"
    """All that is no weight, such as a tokenizer."""
    EXTRA = "extra"
    """What `EXTRA_REPOS` names: as a model, but nothing is required to be there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """One repository that an engine needs.

    Attributes:
        name: Its id, in the owner's spelling.
        revision: Branch, tag or commit; None is the main branch.
        kind: What of it is needed.
        variable: The environment variable that names it.
        patterns: Weight formats, in the order of preference.
        ignore: Patterns of paths that are left out.

    Raises:
        InvalidInputError: The revision can be no branch, tag or commit.
    """

    name: str
    revision: str | None = None
    kind: RepositoryKind = RepositoryKind.MODEL
    variable: str = "MODEL_NAME"
    patterns: tuple[str, ...] = WEIGHT_PATTERNS
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the revision."""
        if self.revision is not None and not _is_revision(self.revision):
            msg = (
                f"{self.name} cannot have the revision {self.revision!r}; expected a branch, a tag or a "
                f"commit, such as main or refs/pr/1, of at most {REVISION_CHARS_MAX} characters"
            )
            raise InvalidInputError(msg, field=revision_field(self.variable))

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} at {self.revision}"


def is_folder_name(name: str) -> bool:
    """Whether a model's name means a folder of this machine."""
    return name.startswith(("/", "./", "../", "~")) or name in {".", ".."}


def is_object_uri(name: str) -> bool:
    """Whether a model's name means a place in an object store."""
    return name.lower().startswith(OBJECT_SCHEMES)


def revision_field(variable: str) -> str:
    """The input that holds the revision of the repository that a variable names."""
    return "env.MODEL_REVISION" if variable == "MODEL_NAME" else f"env.{variable}"


def _is_revision(text: str) -> bool:
    if len(text) > REVISION_CHARS_MAX or _FORBIDDEN_IN_REVISION.search(text):
        return False
    return all(part and not part.startswith(".") for part in text.split("/"))
