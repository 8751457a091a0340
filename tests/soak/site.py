"""The installation under load: its endpoints and keys, and what may go wrong with each at which moment."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .asks import Ends
from .wire import Connection

NOTHING: Ends = frozenset()
FAILS: Ends = frozenset({"error_event", "cut", "502", "503"})
"""How requests end whose workers are killed; a body that is no stream stays visibly incomplete."""


@dataclass(frozen=True)
class Key:
    """An API key of a target.

    Attributes:
        secret: What is sent.
        id: By which it is revoked; "" for one that lives as long as the installation.
        ends: What its requests may get besides.
        per_minute: Its limit on requests; 0 for none.
        concurrent: Its limit on requests at once; 0 for none.
    """

    secret: str
    id: str = ""
    ends: Ends = NOTHING
    per_minute: int = 0
    concurrent: int = 0


@dataclass
class Target:
    """An endpoint that is asked.

    Attributes:
        name: For the counts.
        id: Of the endpoint.
        keys: Who may ask.
        disturbed: Whether faults are injected; if not, nothing may fail.
        flowing: Set while it is asked; in between its workers go.
        closing_s: When its deletion was begun, by `time.monotonic`; None while it is to stay.
        closed_s: When its deletion was acknowledged.
    """

    name: str
    id: str
    keys: list[Key]
    disturbed: bool
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    closing_s: float | None = None
    closed_s: float | None = None

    def may_end(self, began_s: float, ended_s: float) -> tuple[Ends, bool]:
        """What a request may get, and whether that is all it may get.

        Args:
            began_s: When it was sent.
            ended_s: When its answer was complete.
        """
        if self.closed_s is not None and self.closed_s <= began_s:
            return frozenset({"404"}), True
        also = FAILS if self.disturbed else NOTHING
        if self.closing_s is not None and self.closing_s <= ended_s:
            also |= {"404", "503"}
        return also, False


@dataclass(frozen=True)
class Sent:
    """A request that was sent.

    Attributes:
        target: Endpoint id.
        end: How it ended: `exact`, `error_event`, `cut`, an HTTP status, `left`, or `left_early`, where it is
            not sure that the gateway ever had all of its head.
        status: HTTP status that came; 0 if none did.
        usage: Tokens in and out of an exact answer; None where the engine does not count.
    """

    target: str
    end: str
    status: int
    usage: tuple[int, int] | None


class Site:
    """A running gateway, from outside.

    Args:
        port: Where it listens.
        key: An admin key.
        home: Its data folder.
        pid: Its process.
        log: What it tells of itself.
    """

    def __init__(self, *, port: int, key: str, home: Path, pid: int, log: Path) -> None:
        self.port = port
        self.key = key
        self.home = home
        self.pid = pid
        self.log = log
        self.host = f"127.0.0.1:{port}"
        self.targets: list[Target] = []
        self.sent: dict[str, Sent] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.over = asyncio.Event()
        self._numbers = 0

    def name(self) -> str:
        """A name that nobody else has, of seven characters at most: one token of the stand-in."""
        self._numbers += 1
        return f"q{self._numbers}"

    def report(self, what: str) -> None:
        """Note something wrong; much of it ends the soak."""
        self.wrong.append(f"{time.strftime('%H:%M:%S')} {what}")
        if len(self.wrong) >= 50:
            self.over.set()

    async def pause(self, seconds: float) -> bool:
        """Wait; whether the soak goes on."""
        try:
            async with asyncio.timeout(seconds):
                await self.over.wait()
        except TimeoutError:
            return True
        return False

    async def call(self, method: str, path: str, body: Any = None, *, name: str = "") -> tuple[int, Any]:
        """Status and JSON of one call over a connection of its own.

        Args:
            method: Of HTTP.
            path: With its query.
            body: What becomes the body.
            name: Of the request, for its row; "" for none.
        """
        data = b"" if body is None else json.dumps(body).encode()
        connection = await Connection.open(self.port)
        try:
            await connection.send(
                f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
                f"Authorization: Bearer {self.key}\r\nX-Request-Id: {name or 'manager'}\r\n"
                f"Content-Length: {len(data)}\r\n\r\n".encode()
                + data
            )
            head = await connection.head(method)
            text = await connection.body()
        finally:
            connection.close()
        if not head.headers.get("content-type", "").endswith("json"):
            return head.status, text.decode()
        return head.status, json.loads(text)

    async def managed(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of a call that must succeed."""
        status, found = await self.call(method, path, body)
        assert status < 300, f"{method} {path}: {status} {found}"
        return found

    async def deploy(self, name: str, *, disturbed: bool, **settings: Any) -> Target:
        """A new endpoint of the built-in model, with the admin's key."""
        body = {"model": "pilotlight/ember", "name": name, **settings}
        made = await self.managed("POST", "/pilotlight/v1/endpoints", body)
        target = Target(name.partition("-")[0], made["id"], [Key(self.key)], disturbed)
        self.targets.append(target)
        return target

    async def delete(self, target: Target) -> None:
        """Delete an endpoint that is being asked."""
        target.closing_s = time.monotonic()
        await self.managed("DELETE", f"/v2/serverless/{target.id}")
        target.closed_s = time.monotonic()

    async def make_key(self, target: Target, *, ends: Ends = NOTHING, **terms: Any) -> Key:
        """A new key for one endpoint."""
        body = {"name": "soak", "endpoints": [target.id], **terms}
        made = await self.managed("POST", "/pilotlight/v1/keys", body)
        return Key(
            made["key"],
            made["id"],
            ends,
            per_minute=terms.get("requests_per_minute", 0),
            concurrent=terms.get("concurrent_max", 0),
        )

    async def workers(self, target: Target) -> list[dict[str, Any]]:
        """Living workers."""
        status, found = await self.call("GET", f"/pilotlight/v1/endpoints/{target.id}/workers")
        return found["workers"] if status == 200 else []

    async def metrics(self) -> dict[str, float]:
        """All samples of `/metrics`, by name and labels."""
        status, text = await self.call("GET", "/metrics")
        assert status == 200, text
        rows = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in rows}
