"""The application of a front: the data path, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pilotlight.gateway.addressing import endpoint_of_host, is_served_directly, openai_call
from pilotlight.gateway.call import CallRoad
from pilotlight.gateway.connection import Connection
from pilotlight.gateway.directory import Directory

_MODELS = b"/openai/v1/models"


class Told(Protocol):
    """What a front knows of its owner (`FrontSide`)."""

    @property
    def leading(self) -> bool:
        """Whether the workers are the owner's."""
        ...

    @property
    def closing(self) -> bool:
        """Whether new requests are refused."""
        ...


class FrontGateway:
    """Serves calls of the OpenAI routes of endpoints whose engines are reached; others go to the owner.

    Args:
        data_path: Serves them.
        directory: Endpoints.
        told: What is known of the owner; while it closes, it refuses by itself.
        hand_over: Gives a connection to the owner.
        tells_models: Whether models are listed here. They seek no slot, so where every request is counted
            (`limits.profile`), nobody would count these.
    """

    def __init__(
        self,
        *,
        data_path: CallRoad,
        directory: Directory,
        told: Told,
        hand_over: Callable[[Connection, bytes], None],
        tells_models: bool,
    ) -> None:
        self._data_path = data_path
        self._directory = directory
        self._told = told
        self._tells_models = tells_models
        self.hand_over = hand_over

    def call_road(
        self, target: bytes, headers: Sequence[tuple[bytes, bytes]]
    ) -> tuple[CallRoad, bytes, bytes] | None:
        """The data path for its own requests, with their path and query; None for everything else."""
        told, endpoint = self._told, self._directory.endpoint
        called = None if told.closing else openai_call(target, headers, self._named_by_host)
        if called is None or not is_served_directly(endpoint(called[0]), leads=told.leading):
            return None
        if not self._tells_models and _MODELS in called[1]:
            return None
        return self._data_path, called[1], called[2]

    def _named_by_host(self, host: bytes) -> str | None:
        return endpoint_of_host(host, self._directory.endpoint)
