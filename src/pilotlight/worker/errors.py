"""What can go wrong inside the worker program, split by who is at fault."""

from __future__ import annotations

from pilotlight.domain.worker import Failure
from pilotlight.engines.flags import mask_value


class InputError(Exception):
    """A job input or body that cannot be served; becomes an OpenAI error envelope (`vllm-worker.md` §1.11).

    Args:
        message: One sentence naming the field, its value and what is legal.
        status: HTTP status of the envelope.
        error_type: OpenAI error type.
        param: Name of the offending field, where there is one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        error_type: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.error_type = error_type
        self.param = param


class ConfigError(Exception):
    """An environment variable of the worker program that is missing or malformed; nothing was started.

    Args:
        message: One sentence; secrets within are hidden.
    """

    def __init__(self, message: str) -> None:
        super().__init__(mask_value(message))


class EngineGoneError(Exception):
    """The engine died or closed the connection before it answered; the job may run elsewhere."""


class ModelMissingError(Exception):
    """A model, or something that belongs to it, that is not here and cannot be had."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.cause)
        self.failure = failure
