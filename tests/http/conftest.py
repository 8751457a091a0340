"""The whole gateway as `pilotlight up` runs it, on uvloop, in front of a scripted engine; reached by bare sockets.

One installation per module. After every test nothing may have gone wrong unseen: no error in the log, no
exception that ended nowhere, nothing but HTTP at the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest_asyncio
import structlog

from pilotlight.bootstrap import Installation, open_installation
from pilotlight.settings import (
    LauncherSettings,
    LimitSettings,
    LoadBalancerSettings,
    ServerSettings,
    Settings,
    StoreSettings,
    WorkerSettings,
)

from ..timeouts import UvLoop  # noqa: TID252
from .engine import Engine
from .wire import WAIT_S, Answer, Wire, until

BODY_MAX = 100_000
"""Largest body on every road."""

SLOTS = 8
"""What the engine serves at a time."""


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": UvLoop}


class Trouble(logging.Handler):
    """Everything that is logged as an error, and exceptions that nobody caught."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter().format(record))

    def nobody_caught(self, _loop: asyncio.AbstractEventLoop, context: dict) -> None:
        self.lines.append(repr(context))


@dataclass(frozen=True)
class Route:
    """A hot path: how it is asked with a text, and how its answer says it back.

    Attributes:
        name: For people.
        path: What is posted to.
        body: The body that carries a text.
        says: Whether this is the answer to that text.
    """

    name: str
    path: str
    body: Callable[[str], bytes]
    says: Callable[[Answer, str], bool]


def chat_body(text: str, **more: object) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **more}).encode()


def _is_chat(answer: Answer, text: str) -> bool:
    return answer.json()["choices"][0]["message"]["content"] == text


def _is_stream(answer: Answer, text: str) -> bool:
    lines = answer.body.decode().split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    said = [item["choices"][0]["delta"]["content"] for item in events]
    return said == [f"{text}-{n}" for n in range(3)] and lines[-2] == "data: [DONE]"


class Site:
    """The gateway, its engine, and the ways to ask it.

    Attributes:
        routes: The hot paths by name: chat, stream, run, keys, lb.
    """

    def __init__(self, installation: Installation, engine: Engine, trouble: Trouble) -> None:
        self.installation = installation
        self.engine = engine
        self.trouble = trouble
        self.port = int(installation.url.rpartition(":")[2])
        self.key = (installation.settings.home / "cli.key").read_text().strip()
        self.auth = f"Authorization: Bearer {self.key}\r\n".encode()
        self.routes: dict[str, Route] = {}
        self._numbers = itertools.count(1)
        self._wires: list[Wire] = []
        self._sockets = 0
        self._tasks = 0

    async def fill(self) -> None:
        """Deploy the endpoints and wait until each road has answered once."""
        headers = {"authorization": f"Bearer {self.key}"}
        engine_url = f"http://127.0.0.1:{self.engine.port}"
        worker = [sys.executable, str(Path(__file__).with_name("lb_worker.py"))]
        async with httpx.AsyncClient(
            base_url=self.installation.local_url, headers=headers, timeout=20, trust_env=False
        ) as api:
            made = []
            for body in (
                {"name": "chat", "engine_url": engine_url, "model": "m", "concurrency": SLOTS},
                {"name": "queue", "kind": "queue", "command": ["/bin/true"], "max": 0},
                {
                    "name": "lb", "kind": "load-balancer", "command": worker, "min": 1, "max": 1,
                    "env": {"TARGET": str(self.engine.port)}, "concurrency": SLOTS,
                },
            ):  # fmt: skip
                answer = await api.post("/pilotlight/v1/endpoints", json=body)
                assert answer.status_code == 201, answer.text
                made.append(answer.json()["id"])
        self._add_routes(*made)
        await self.all_work()
        self.end_idle()
        before = None
        while before != (before := self._held()):
            await asyncio.sleep(0.05)
        self._sockets, self._tasks = self._held()

    def _add_routes(self, chat_id: str, queue_id: str, lb_id: str) -> None:
        chat = f"/v2/{chat_id}/openai/v1/chat/completions"
        for route in (
            Route("chat", chat, chat_body, _is_chat),
            Route("stream", chat, lambda text: chat_body(text, stream=True), _is_stream),
            Route(
                "run",
                f"/v2/{queue_id}/run",
                lambda text: json.dumps({"input": text}).encode(),
                lambda answer, _: answer.json()["status"] == "IN_QUEUE",
            ),
            Route(
                "keys",
                "/pilotlight/v1/keys",
                lambda text: json.dumps({"name": text, "scope": "admin"}).encode(),
                lambda answer, text: answer.json()["name"] == text,
            ),
            Route(
                "lb",
                f"/lb/{lb_id}/echo",
                str.encode,
                lambda answer, text: answer.json()["body"] == text,
            ),
        ):
            self.routes[route.name] = route

    def text(self) -> str:
        """A text that was never said before."""
        return f"t{next(self._numbers):06d}"

    def request(
        self,
        route: Route,
        text: str,
        *,
        line: bytes = b"POST %b HTTP/1.1",
        fields: bytes = b"",
        host: bytes = b"Host: h\r\n",
        auth: bytes | None = None,
        body: bytes | None = None,
    ) -> bytes:
        """A correct request of a route; each part may be another one. `fields` end in CRLF."""
        body = route.body(text) if body is None else body
        line = line.replace(b"%b", route.path.encode())
        auth = self.auth if auth is None else auth
        return b"%b\r\n%b%b%bContent-Length: %d\r\n\r\n%b" % (line, host, auth, fields, len(body), body)

    async def open(self, *, receive_bytes: int = 0) -> Wire:
        """A connection; closed at the end of the test."""
        wire = await Wire.open(self.port, receive_bytes=receive_bytes)
        self._wires.append(wire)
        return wire

    async def warm(self, route: Route, *, requests: int = 2) -> Wire:
        """A connection on which requests with the same fields were answered before."""
        wire = await self.open()
        for _ in range(requests):
            await self.serves(wire, route)
        return wire

    async def serves(self, wire: Wire, route: Route) -> None:
        """Return when the connection has answered one more request, and that one."""
        text = self.text()
        await wire.send(self.request(route, text))
        self.answers(route, text, await wire.answer())

    def answers(self, route: Route, text: str, answer: Answer) -> None:
        """Return if this is the answer to that text."""
        assert answer.status in {200, 201}, answer
        assert route.says(answer, text), (route.name, text, answer)

    async def all_work(self) -> None:
        """Return when a fresh connection was served on each road."""
        for route in self.routes.values():
            wire = await self.open()
            await self.serves(wire, route)
            wire.close()

    def close_wires(self) -> None:
        for wire in self._wires:
            wire.close()
        self._wires.clear()

    async def is_clean(self) -> None:
        """Return when no socket, task or slot is left of what was asked; fail if that does not come."""
        self.close_wires()
        await self._all_slots_free()
        self.end_idle()
        try:
            await until(self._is_at_rest, "sockets and tasks given back")
        except AssertionError as error:
            rest = f"{self._held()} sockets and tasks, not {(self._sockets, self._tasks)}"
            # What has leaked is blamed on this test alone.
            self._sockets, self._tasks = self._held()
            raise AssertionError(f"{rest}: {asyncio.all_tasks()}") from error

    async def _all_slots_free(self) -> None:
        """As many requests as there are slots are in the engine's hands at a time, on both roads.

        Requests of clients that have just left may still be in the way for a moment.
        """
        for name in ("chat", "lb"):
            try:
                async with asyncio.timeout(WAIT_S):
                    while not await self._fills(self.routes[name]):
                        await asyncio.sleep(0.02)
            except TimeoutError:
                raise AssertionError(f"slots of {name} are not given back") from None

    async def _fills(self, route: Route) -> bool:
        """Whether the engine is given a request for each slot at the same time, and all are answered."""
        held, release, text = [], asyncio.Event(), self.text()
        script = self.engine.script

        async def hold(seen, writer):
            if text.encode() in seen.body:
                held.append(seen)
                await release.wait()
            await script(seen, writer)

        self.engine.script = hold
        wires = [await self.open() for _ in range(SLOTS)]
        answers = [asyncio.create_task(wire.answer()) for wire in wires]
        try:
            for wire in wires:
                await wire.send(self.request(route, text))
            await until(lambda: len(held) == SLOTS or any(map(asyncio.Task.done, answers)), "a slot")
            full = len(held) == SLOTS
        finally:
            self.engine.script = script
            release.set()
        for answer in await asyncio.gather(*answers):
            if full:
                self.answers(route, text, answer)
        self.close_wires()
        return full

    def end_idle(self) -> None:
        """End connections between gateway and engine, which may be kept as long as one likes."""
        self.close_wires()
        self.engine.hang_up()

    def _held(self) -> tuple[int, int]:
        """Open sockets and unfinished tasks of this process. Files may be opened at any time, and stay."""
        sockets = 0
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
            with contextlib.suppress(FileNotFoundError):
                sockets += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")  # noqa: PTH115
        return sockets, len(asyncio.all_tasks())

    def _is_at_rest(self) -> bool:
        sockets, tasks = self._held()
        return sockets <= self._sockets and tasks <= self._tasks


@contextlib.asynccontextmanager
async def running(home: Path, *, processes: int) -> AsyncIterator[Site]:
    """A gateway of so many processes."""
    settings = Settings(
        home=home,
        server=ServerSettings(port=0, processes=processes),
        limits=LimitSettings(body_bytes=BODY_MAX, run_body_bytes=BODY_MAX, body_s=3, hold_requests=4),
        load_balancer=LoadBalancerSettings(body_bytes=BODY_MAX, check_interval_ms=2500),
        launchers=LauncherSettings(enabled=False),
        store=StoreSettings(synchronous="NORMAL"),
        workers=WorkerSettings(memory_reserve_bytes=0, memory_default_bytes=1_000_000, stop_grace_s=1),
    )
    trouble, loop = Trouble(), asyncio.get_running_loop()
    loop.set_exception_handler(trouble.nobody_caught)
    logging.getLogger().addHandler(trouble)
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    engine = Engine()
    await engine.start()
    try:
        with structlog.testing.capture_logs([structlog.processors.format_exc_info]) as logged:
            async with open_installation(settings) as installation:
                site = Site(installation, engine, trouble)
                site.logged = logged
                await site.fill()
                yield site
                site.close_wires()
    finally:
        await engine.stop()
        logging.getLogger().removeHandler(trouble)
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(tmp_path_factory):
    async with running(tmp_path_factory.mktemp("h"), processes=1) as site:
        yield site


@pytest_asyncio.fixture(loop_scope="module")
async def site(installed):
    installed.engine.reset()
    yield installed
    # Whatever a failed test has left with the engine ends here, too.
    installed.end_idle()
    for _ in range(20):
        await asyncio.sleep(0)
    errors = [line for line in installed.logged if line["log_level"] in {"error", "critical", "exception"}]
    trouble = [*installed.trouble.lines, *map(str, errors), *installed.engine.faults]
    installed.trouble.lines.clear()
    installed.logged.clear()
    # The end of each says what it was.
    assert not trouble, "\n".join(line[-600:] for line in trouble)
