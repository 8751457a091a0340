"""The worker program's HTTP client against servers that behave and servers that do not."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from pilotlight.worker.http import AnswerTimeoutError, HttpClient

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """Answers each request on each connection with the next of its answers; None hangs up."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.connections = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = [
                    int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")
                ]
                self.requests.append((head, await reader.readexactly(size[0] if size else 0)))
                answer = self.answers.pop(0)
                if answer is None:
                    return
                writer.write(answer)
                await writer.drain()


@pytest.fixture
async def client():
    made = HttpClient({"Authorization": "key"})
    yield made
    await made.close()


def ask(client, url, method="GET", body=None, seconds=20):
    return client.request(method, url, content_type="a/b", body=body, seconds=seconds)


async def test_request_as_the_protocol_has_it(client):
    """Raw key, content type, length; the second request uses the same connection."""
    async with Server(OK, OK) as server:
        assert await ask(client, f"{server.url}/v2/x?q=1") == (200, b"ok")
        assert await ask(client, f"{server.url}/y", "POST", b"body") == (200, b"ok")
        assert server.connections == 1
        (first, _), (second, body) = server.requests
        assert first.startswith(b"GET /v2/x?q=1 HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"\r\nAuthorization: key\r\n" in first
        assert b"\r\nContent-Type: a/b\r\n" in first
        assert body == b"body"
        assert b"\r\nContent-Length: 4\r\n" in second


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
            (200, b"abc"),
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, (200, b"ok")),
        (b"HTTP/1.1 429 Slow\r\nContent-Length: 0\r\n\r\n", (429, b"")),
    ],
)
async def test_forms_of_answers(client, answer, expected):
    async with Server(answer, OK) as server:
        assert await ask(client, server.url) == expected
        assert await ask(client, server.url) == (200, b"ok")
        assert server.connections == 1


async def test_redirects_keep_method_and_body(client):
    """worker-protocol.md §3: 307 is followed."""
    async with Server(OK) as target:
        location = f"HTTP/1.1 307 X\r\nLocation: {target.url}/there\r\nContent-Length: 0\r\n\r\n"
        async with Server(location.encode()) as server:
            assert await ask(client, f"{server.url}/here", "POST", b"body") == (200, b"ok")
        assert target.requests[0][0].startswith(b"POST /there ")
        assert target.requests[0][1] == b"body"


async def test_redirect_to_another_server_does_not_carry_the_key():
    """worker-protocol.md §1: the key is for the platform."""
    client = HttpClient({"Authorization": "secret", "User-Agent": "x"})
    async with Server(OK) as target:
        location = f"HTTP/1.1 307 X\r\nLocation: {target.url}/there\r\nContent-Length: 0\r\n\r\n"
        async with Server(
            b"HTTP/1.1 307 X\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n", location.encode()
        ) as server:
            assert await ask(client, f"{server.url}/a") == (200, b"ok")
        assert all(b"Authorization: secret" in head for head, _ in server.requests)
        assert b"secret" not in target.requests[0][0]
        assert b"User-Agent: x" in target.requests[0][0]
    await client.close()


async def test_endless_redirects(client):
    async with Server(*[b"HTTP/1.1 307 X\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"] * 9) as server:
        with pytest.raises(ConnectionError, match="redirects"):
            await ask(client, server.url)


async def test_connection_that_was_closed_while_idle(client):
    """The request is sent again on a fresh one, once."""
    async with Server(OK, None, OK) as server:
        await ask(client, server.url)
        assert await ask(client, server.url, "POST", b"x") == (200, b"ok")
        assert server.connections == 2
        assert len(server.requests) == 3


async def test_fresh_connection_that_breaks(client):
    async with Server(None) as server:
        with pytest.raises(ConnectionError):
            await ask(client, server.url)


async def test_connection_that_may_not_be_kept(client):
    async with Server(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", OK) as server:
        await ask(client, server.url)
        await ask(client, server.url)
        assert server.connections == 2


@pytest.mark.parametrize("answer", [b"220 smtp\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"])
async def test_answers_that_are_no_http(client, answer):
    async with Server(answer) as server:
        with pytest.raises(ConnectionError, match="no HTTP"):
            await ask(client, server.url)


async def test_no_answer_in_time(client):
    async with Server(b"HTTP/1.1 200 OK\r\n") as server:
        with pytest.raises(AnswerTimeoutError):
            await ask(client, server.url, seconds=0.05)


async def test_nobody_there(client):
    async with Server() as server:
        url = server.url
    with pytest.raises(OSError, match=r"."):
        await ask(client, url)


def test_header_with_a_line_break():
    with pytest.raises(ValueError, match="line break"):
        HttpClient({"Authorization": "a\r\nb: c"})
