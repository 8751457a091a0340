"""`pilotlight up --processes 3`: one port, three processes that serve the data path, and one that has everything.

The engine is a server in this process. It counts what it has in hand, and keeps requests until it is told.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import httpx
import pytest
from aiohttp import web

from ..certificates import Pair  # noqa: TID252
from .conftest import WAIT_S, Installation, start_with_tls

PROCESSES = 3
FRONT = "pilotlight.front"


class Engine(ThreadingHTTPServer):
    """An engine of OpenAI's API, as an endpoint with `engine_url` has it.

    Attributes:
        running: Requests in hand.
        most: As many as there ever were at a time.
        go_on: Whether requests that ask to be held are let go.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.running = self.most = 0
        self.go_on = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """A gateway that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._answer(body, body["messages"][0]["content"])

    @contextlib.contextmanager
    def _in_hand(self) -> Iterator[None]:
        """Counted until its answer is about to be whole: the next request may come before that is written."""
        engine = self.server
        with engine.lock:
            engine.running += 1
            engine.most = max(engine.most, engine.running)
        try:
            yield
        finally:
            with engine.lock:
                engine.running -= 1

    def _answer(self, body: dict, text: str) -> None:
        if body.get("stream"):
            with self._in_hand():
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                self._event(json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}))
                if "hold" in text:
                    self.server.go_on.wait(WAIT_S)
                self._event(json.dumps({"choices": [{"index": 0, "delta": {"content": "end"}}]}))
                self._event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
            return
        with self._in_hand():
            if "hold" in text:
                self.server.go_on.wait(WAIT_S)
            elif text == "briefly":
                time.sleep(0.005)
        answer = json.dumps({"choices": [{"message": {"content": text}}], "usage": {}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))


class Gateway:
    """An installation, and ways to look at its processes and to ask it over fresh connections."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.threads = ThreadPoolExecutor(64)

    def fronts(self) -> dict[int, str]:
        """Processes that serve the data path."""
        found = {}
        for pid in self.installation.processes():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if FRONT.encode() in command:
                    found[pid] = FRONT
        return found

    def endpoint(self, engine: Engine, **settings: object) -> str:
        body = {"name": f"e{time.monotonic_ns()}", "engine_url": engine.url, "model": "m", **settings}
        answer = self.installation.api.post("/pilotlight/v1/endpoints", json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def chat(self, endpoint_id: str, text: str, *, key: str = "", **more: object) -> httpx.Response:
        """One call on a connection of its own, so that any of the processes may get it."""
        return self.installation.api.post(
            f"/v2/{endpoint_id}/openai/v1/chat/completions",
            json={"model": "m", "messages": [{"role": "user", "content": text}], **more},
            headers={"authorization": f"Bearer {key}"} if key else {},
        )

    def chats(self, count: int, endpoint_id: str, text: str, **more: object) -> list[Future[httpx.Response]]:
        return [self.threads.submit(self.chat, endpoint_id, text, **more) for _ in range(count)]

    def key(self, endpoint_id: str, **limits: object) -> str:
        answer = self.installation.api.post(
            "/pilotlight/v1/keys", json={"name": "k", "endpoints": [endpoint_id], **limits}
        )
        assert answer.status_code == 201, answer.text
        return answer.json()["key"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def _calm(engine: Engine) -> Iterator[None]:
    engine.go_on.clear()
    engine.most = 0
    yield
    engine.go_on.set()


@pytest.fixture(scope="module")
def gateway(engine_home: Path) -> Iterator[Gateway]:
    """One for all tests that leave it as it was."""
    installation = Installation(Path(tempfile.mkdtemp(prefix="pl-e2e-")), engine_home)
    made = Gateway(installation)
    installation.environment["PILOTLIGHT_SERVER__PROCESSES"] = str(PROCESSES)
    try:
        yield Gateway(installation.start())
    finally:
        try:
            installation.finish()
        finally:
            made.threads.shutdown()
            shutil.rmtree(installation.root, ignore_errors=True)


def test_everything_that_a_gateway_answers_comes_through_the_port(gateway, engine, tools):
    api = gateway.installation.api
    assert len(gateway.fronts()) == PROCESSES
    chat = gateway.endpoint(engine)
    assert gateway.chat(chat, "hello").json()["choices"][0]["message"]["content"] == "hello"
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with api.stream("POST", f"/v2/{chat}/openai/v1/chat/completions", json=body) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert len(lines) == 3
    assert lines[-1] == "data: [DONE]"
    assert api.get(f"/v2/{chat}/openai/v1/models").json()["data"][0]["id"] == "m"
    assert gateway.chat(chat, "hello", key="wrong").status_code == 401
    assert gateway.chat("nobody", "hello").status_code == 404
    assert api.get("/health").json() == {"status": "ok"}
    queue = api.post(
        "/pilotlight/v1/endpoints",
        json={"name": "queue", "kind": "queue", "command": ["/bin/true"], "max": 0},
    ).json()["id"]
    job = api.post(f"/v2/{queue}/run", json={"input": 1}).json()
    assert api.get(f"/v2/{queue}/status/{job['id']}").json()["status"] == "IN_QUEUE"
    rows = tools.until(
        lambda: api.get(f"/pilotlight/v1/requests?endpoint={chat}&limit=10").json()["requests"], "the rows"
    )
    assert {row["status"] for row in rows} <= {200, 401}
    metrics = api.get("/metrics").text
    assert f'endpoint="{chat}"' in metrics


def test_a_connection_may_ask_for_this_and_that_by_turns(gateway, engine):
    chat = gateway.endpoint(engine)
    with httpx.Client(
        base_url=gateway.installation.url,
        headers=gateway.installation.api.headers,
        trust_env=False,
        timeout=WAIT_S,
    ) as client:
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        for _ in range(3):
            for _ in range(3):
                answer = client.post(f"/v2/{chat}/openai/v1/chat/completions", json=body)
                assert answer.json()["choices"][0]["message"]["content"] == "hello"
            assert client.get(f"/v2/{chat}/health").status_code == 200


def test_a_websocket_is_answered_by_what_serves_them(gateway, engine):
    """The realtime API of an engine that has none, and a path where nobody listens."""
    chat = gateway.endpoint(engine)
    for path, status in ((f"/v2/{chat}/openai/v1/realtime?model=m", b"50"), ("/nowhere", b"404")):
        with socket.create_connection(("127.0.0.1", gateway.installation.port), WAIT_S) as sock:
            key = base64.b64encode(b"0123456789abcdef").decode()
            sock.sendall(
                f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
                f"Authorization: {gateway.installation.api.headers['authorization']}\r\n\r\n".encode()
            )
            answer = sock.makefile("rb").readline()
        assert answer.startswith(b"HTTP/1.1 " + status), answer


def test_all_processes_together_keep_to_the_slots_of_an_endpoint(gateway, engine, tools):
    chat = gateway.endpoint(engine, concurrency=4)
    held = gateway.chats(4, chat, "hold")
    tools.until(lambda: engine.running == 4, "all slots are in use")
    answers = [*held, *gateway.chats(200, chat, "briefly")]
    engine.go_on.set()
    assert {answer.result().status_code for answer in answers} == {200}
    assert engine.most == 4


def test_all_processes_together_keep_to_the_limits_of_a_key(gateway, engine, tools):
    chat = gateway.endpoint(engine)
    key = gateway.key(chat, concurrent_max=2)
    # A key that was just made is known to all of them.
    held = gateway.chats(2, chat, "hold", key=key)
    tools.until(lambda: engine.running == 2, "both at the engine")
    more = [answer.result() for answer in gateway.chats(12, chat, "more", key=key)]
    assert {answer.status_code for answer in more} == {429}
    assert all("retry-after" in answer.headers for answer in more)
    engine.go_on.set()
    assert [answer.result().status_code for answer in held] == [200, 200]
    tools.until(lambda: gateway.chat(chat, "more", key=key).status_code == 200, "the limit is free again")


def test_a_process_that_is_killed_costs_only_what_it_had_in_hand(gateway, engine, tools):
    chat = gateway.endpoint(engine, concurrency=24)
    held = gateway.chats(24, chat, "hold")
    tools.until(lambda: engine.running == 24, "all at the engine")
    waiting = gateway.chats(24, chat, "wait")
    before = set(gateway.fronts())
    victim = min(before)
    gateway.installation.signal(victim, signal.SIGKILL)
    tools.until(lambda: len(set(gateway.fronts()) - {victim}) == PROCESSES, "a new process")
    engine.go_on.set()
    told = []
    for answer in (*held, *waiting):
        try:
            told.append(answer.result().status_code)
        except httpx.TransportError:
            told.append(None)
    assert set(told) == {200, None}
    # Slots and places are back, and connections that waited for the killed one are served by the new one.
    engine.go_on.clear()
    again = gateway.chats(24, chat, "hold")
    tools.until(lambda: engine.running == 24, "all slots")
    engine.go_on.set()
    assert {answer.result().status_code for answer in again} == {200}
    assert len(gateway.fronts()) == PROCESSES


def test_a_stop_waits_for_streams_and_a_kill_leaves_nobody(make_installation, engine, tools):
    installation = make_installation(PILOTLIGHT_SERVER__PROCESSES="2").start()
    gateway = Gateway(installation)
    chat = gateway.endpoint(engine)
    streams = gateway.chats(6, chat, "hold", stream=True)
    tools.until(lambda: engine.running == 6, "all at the engine")
    idle = socket.create_connection(("127.0.0.1", installation.port), WAIT_S)
    os.killpg(installation.pid, signal.SIGINT)

    late = []

    def refused() -> bool:
        try:
            late.append(gateway.chat(chat, "late").status_code)
        except httpx.TransportError:
            return True
        return late[-1] == 503

    tools.until(refused, "new requests are refused")
    engine.go_on.set()
    for answer in streams:
        assert answer.result().text.endswith("data: [DONE]\n\n"), answer.result().text
    assert installation.exited() == 0
    idle.close()
    rows = installation.table(f"SELECT count(*) FROM requests WHERE endpoint_id = '{chat}' AND status = 200")
    assert rows == [(6 + late.count(200),)]

    engine.go_on.clear()
    installation.start()
    assert len(gateway.fronts()) == 2
    held = gateway.chats(2, chat, "hold")
    tools.until(lambda: engine.running == 2, "all at the engine")
    installation.crash()
    tools.until(lambda: not installation.processes(), "no process is left")
    for answer in held:
        assert isinstance(answer.exception(), httpx.TransportError)
    gateway.threads.shutdown()


def test_fronts_speak_tls_and_wake_workers(make_installation, tmp_path):
    """The engine is a worker's: held requests, its socket, and what its end means are told across processes."""
    pair = Pair(tmp_path)
    installation = start_with_tls(make_installation, pair, PILOTLIGHT_SERVER__PROCESSES="2")
    assert installation.url.startswith("https://")
    endpoint = installation.deploy()
    assert endpoint.chat("hello").status_code == 200
    with endpoint.stream("hello") as events:
        assert list(events)[-1] == "[DONE]"
    with httpx.Client(
        base_url=installation.url, headers=installation.api.headers, trust_env=False, verify=pair.trust()
    ) as client:
        body = {"model": "pilotlight/ember", "messages": [{"role": "user", "content": "hello"}]}
        for _ in range(3):
            answer = client.post(f"/v2/{endpoint.id}/openai/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
    assert endpoint.result(endpoint.run("hello"))["status"] == "COMPLETED"


async def echo(request: web.Request) -> web.WebSocketResponse:
    """Say everything backwards, until the client leaves."""
    talk = web.WebSocketResponse(max_msg_size=0)
    await talk.prepare(request)
    async for message in talk:
        await talk.send_bytes(message.data[::-1])
    return talk


async def talk_backwards(installation: Installation, trust: ssl.SSLContext, connections: int) -> None:
    """Frames of some megabytes and of a few bytes over fresh connections, which any of the processes may get."""
    app = web.Application()
    app.router.add_get("/v1/realtime", echo)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    body = {"name": "talk", "engine_url": f"http://{host}:{port}", "model": "m"}
    answer = await asyncio.to_thread(installation.api.post, "/pilotlight/v1/endpoints", json=body)
    path = f"/v2/{answer.json()['id']}/openai/v1/realtime?model=m"
    headers = {"authorization": installation.api.headers["authorization"]}
    said = [bytes(range(256)) * 12_000, b"little", bytes(range(256)) * 12_000]
    for _ in range(connections):
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_S)) as client,
            client.ws_connect(installation.url + path, ssl=trust, headers=headers, max_msg_size=0) as talk,
        ):
            for text in said:
                sending = asyncio.create_task(talk.send_bytes(text))
                assert await talk.receive_bytes() == text[::-1]
                await sending
    await runner.cleanup()


def test_frames_pass_through_a_front_over_tls(make_installation, tmp_path):
    """A connection that is handed to the process which serves WebSockets, with its TLS at the front."""
    pair = Pair(tmp_path)
    installation = start_with_tls(make_installation, pair, PILOTLIGHT_SERVER__PROCESSES="2")
    asyncio.run(talk_backwards(installation, pair.trust(), connections=6))
