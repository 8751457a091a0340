"""A front's side of its link to the owner: its settings, its copy of endpoints and keys, and its desk."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

import msgspec
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import RequestRecord
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.fronts import messages
from pilotlight.gateway.fronts.link import Link, LinkError
from pilotlight.gateway.fronts.remote_desk import RemoteDesk
from pilotlight.settings import Settings

_decoder = msgspec.msgpack.Decoder(list[messages.FromOwner])


class _Told(Settings):
    """Settings as the owner has them: environment and files may say something else by now."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What was told, and nothing else."""
        return (init_settings,)


class _Copy:
    """What the owner told last of endpoints and keys (`gateway.directory.Source`)."""

    def __init__(self) -> None:
        self.state = messages.State(0, (), (), leading=False, closing=False)

    async def endpoints(self) -> Sequence[Endpoint]:
        """See `Source`."""
        return self.state.endpoints

    async def keys(self) -> Sequence[ApiKey]:
        """See `Source`."""
        return self.state.keys


class FrontSide:
    """Made by `connect`.

    Attributes:
        directory: Endpoints and keys, kept current.
        desk: Gives slots.
        lost: Set once the owner is gone; every request that waited was refused.
        stopping: Set once the owner wants this front to end.
        on_drop: Called with the addresses to which idle connections are to be closed.
    """

    def __init__(self) -> None:
        self._link = Link(_decoder, self._on_message, self._on_lost)
        self._copy = _Copy()
        self._begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settings: Settings | None = None
        self.directory = Directory(self._copy)
        self.desk = RemoteDesk(self._link.send)
        self.lost = asyncio.Event()
        self.stopping = asyncio.Event()
        self.on_drop: Callable[[Sequence[str]], None] = lambda _: None
        self._handlers: dict[type[messages.FromOwner], Callable[..., None]] = {
            messages.Welcome: self._welcome,
            messages.State: self._state,
            messages.Counted: self.desk.counted,
            messages.Reached: self.desk.reached,
            messages.Granted: self.desk.granted,
            messages.Refused: self.desk.refused,
            messages.Failed: self.desk.failed,
            messages.LivesAnswer: self.desk.lives_answered,
            messages.CommentAnswer: self.desk.commented,
            messages.Drop: self._drop,
            messages.Stop: self._stop,
        }

    @classmethod
    async def connect(cls, sock: socket.socket) -> FrontSide:
        """The link's end, once it is known what a front works by.

        Args:
            sock: One of a pair of connected Unix sockets, the other of which the owner has; it is the link's.

        Raises:
            LinkError: The owner went before it said anything, or cannot be understood.
        """
        front = cls()
        await front._link.open(sock)
        await front._begun
        return front

    @property
    def settings(self) -> Settings:
        """All settings, as the owner has them."""
        assert self._settings is not None
        return self._settings

    @property
    def leading(self) -> bool:
        """Whether the workers are the owner's."""
        return self._copy.state.leading

    @property
    def closing(self) -> bool:
        """Whether new requests are refused."""
        return self._copy.state.closing

    def ready(self) -> None:
        """Tell the owner that requests are answered here."""
        self._link.send(messages.Ready())

    def record(self, record: RequestRecord) -> None:
        """Pass on the row of a request; never blocks."""
        self._link.send(messages.Row(record))

    async def close(self) -> None:
        """Tell the owner what it is to be told, and end the link; returns when it is lost."""
        await self._link.close()

    def _on_message(self, message: messages.FromOwner) -> None:
        self._handlers[type(message)](message)

    def _welcome(self, message: messages.Welcome) -> None:
        self._settings = _Told.model_validate_json(message.settings)

    def _state(self, message: messages.State) -> None:
        self._copy.state = message
        self.directory.replace(message.endpoints, message.keys)
        self._link.send(messages.Seen(message.number))
        if self._settings is None:
            raise LinkError("the owner sent no settings")
        if not self._begun.done():
            self._begun.set_result(None)

    def _drop(self, message: messages.Drop) -> None:
        self.on_drop(message.urls)

    def _stop(self, _: messages.Stop) -> None:
        self.stopping.set()

    def _on_lost(self) -> None:
        if not self._begun.done():
            self._begun.set_exception(LinkError("the owner is gone"))
        self.lost.set()
        self.desk.lose()
