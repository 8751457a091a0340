"""Everything that can go wrong, in one tree, split by who is at fault.

PilotlightError
├── InvalidInputError          the caller sent something we cannot accept (HTTP 400)
├── NotFoundError              the caller named a thing that does not exist (404)
├── ConflictError              the request contradicts the present state (409)
├── SettingsError              the operator's settings are wrong; nothing was started
├── DataFolderError            the data folder is in use, not writable or from a newer version
├── StoreError                 the store could not do its work; the caller may try again (503)
├── ClusterError               a worker could not be placed or started (503)
└── EngineEnvironmentError     the engine's own environment is missing or broken

Narrower ones live beside what raises them: `gateway.errors` (HTTP answers of the job API),
`management.problems`, `models.problems`, and `client.errors` (what a client of our API may meet).

Rejections for load are decisions (`core.admission`), not errors. Programmer errors are assertions.
"""

from __future__ import annotations


class PilotlightError(Exception):
    """The base of every error raised on purpose. `str(error)` is fit for a user's eyes."""


class InvalidInputError(PilotlightError):
    """A request that cannot be accepted; names the field, its value and what is legal.

    Args:
        message: One sentence for the caller.
        field: Dotted name of the offending field, where there is one.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFoundError(PilotlightError):
    """A named thing that does not exist, or that this key may not know of."""


class ConflictError(PilotlightError):
    """A request that contradicts the present state of the thing it names."""


class SettingsError(PilotlightError):
    """A setting that is missing, malformed or contradicts another; nothing was started."""


class DataFolderError(PilotlightError):
    """A data folder that is in use by another process, not writable, or of a newer version."""


class StoreError(PilotlightError):
    """A store that could not finish its work (disk full, database gone); nothing was half done."""


class ClusterError(PilotlightError):
    """A worker that could not be placed or started; the message says what was missing."""


class EngineEnvironmentError(PilotlightError):
    """An engine environment that is missing or broken; the message names the command that mends it."""
