"""WebSockets through the load balancer (serverless-api.md §3: upgrades are forwarded)."""

from __future__ import annotations

import asyncio
import contextlib
import os

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from pilotlight.gateway import tunnel

ID = "lbendpoint1234"


async def echo(request):
    socket = web.WebSocketResponse(protocols=("chat",), heartbeat=None)
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.BINARY:
            await socket.send_bytes(message.data)
        elif message.data == "leave":
            await socket.close(code=4001, message=b"bye")
        elif message.data == "about":
            await socket.send_json({"path": request.path_qs, "headers": dict(request.headers)})
        else:
            await socket.send_str(message.data[::-1])
    return socket


def connect(balanced, path="/ws", **more):
    return balanced.client.ws_connect(f"{balanced.url}/lb/{ID}{path}", **more)


async def idle(balanced, worker_id="w1"):
    async with asyncio.timeout(20):
        while balanced.slots.worker(worker_id).occupied:
            await asyncio.sleep(0.01)


async def test_messages_pass_both_ways_and_take_a_slot_meanwhile(balanced):
    await balanced.worker("w1", echo)
    async with connect(balanced, "/ws?a=1", protocols=["chat"], compress=15) as socket:
        assert socket._response.headers["X-Runpod-Worker-Id"] == "w1"
        assert socket.protocol == "chat"
        assert balanced.slots.worker("w1").occupied == 1
        await socket.send_str("abc")
        assert await socket.receive_str() == "cba"
        await socket.send_str("about")
        seen = await socket.receive_json()
        assert seen["path"] == "/ws?a=1"
        assert seen["headers"]["X-Forwarded-Proto"] == "http"
    await idle(balanced)
    assert balanced.rows[-1].status == 101


async def test_large_messages_pass_and_a_slow_reader_slows_the_writer(balanced):
    await balanced.worker("w1", echo)
    payload = os.urandom(3_000_000)
    async with connect(balanced, max_msg_size=0) as socket:
        for _ in range(3):
            sending = asyncio.create_task(socket.send_bytes(payload))
            assert await socket.receive_bytes() == payload
            await sending


async def test_the_workers_close_reaches_the_client_with_its_code(balanced):
    await balanced.worker("w1", echo)
    async with connect(balanced) as socket:
        await socket.send_str("leave")
        assert (await socket.receive()).type is WSMsgType.CLOSE
        assert socket.close_code == 4001
    await idle(balanced)


async def test_a_client_that_vanishes_frees_the_slot(balanced):
    await balanced.worker("w1", echo)
    socket = await connect(balanced)
    socket._response.connection.transport.abort()
    await idle(balanced)
    await socket.close()


async def test_a_worker_that_vanishes_ends_the_clients_connection(balanced):
    async def vanish(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        request.transport.abort()
        return socket

    await balanced.worker("w1", vanish)
    async with connect(balanced) as socket:
        assert (await socket.receive()).type in {WSMsgType.CLOSED, WSMsgType.CLOSE, WSMsgType.CLOSING}
    await idle(balanced)


async def test_a_handshake_that_the_worker_refuses_is_passed_on(balanced):
    async def refuse(_):
        return web.Response(status=418, text="no sockets here")

    await balanced.worker("w1", refuse)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await connect(balanced)
    assert refused.value.status == 418
    assert refused.value.headers["X-Runpod-Worker-Id"] == "w1"
    await idle(balanced)


async def test_a_websocket_waits_for_a_worker_like_any_request(balanced):
    connecting = asyncio.create_task(connect(balanced))
    await balanced.waiting.wait()
    await balanced.worker("w1", echo)
    socket = await connecting
    await socket.send_str("ab")
    assert await socket.receive_str() == "ba"
    await socket.close()


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        (f"/lb/{ID}/ws", "", 401),
        ("/lb/unknown1234567/ws", "rpa_ADMIN", 404),
        ("/elsewhere", "rpa_ADMIN", 404),
    ],
)
async def test_a_refused_handshake_gets_the_status_of_any_request(balanced, path, key, status):
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await balanced.client.ws_connect(balanced.url + path, headers={"authorization": key})
    assert refused.value.status == status


async def test_no_worker_in_time_is_400(make_balanced):
    balanced = await make_balanced(wait_s=1)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await connect(balanced)
    assert refused.value.status == 400


HANDSHAKE = (
    f"GET /lb/{ID}/ws HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer rpa_RUN\r\nConnection: Upgrade\r\n"
    "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


async def opened(balanced):
    return await asyncio.open_connection(*balanced.url.removeprefix("http://").split(":"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"/lb/{ID}/ws", "http://h:99999/"),
        ("GET", "POST"),
        ("Sec-WebSocket-Key", "X-Other"),
        ("Host: h", "Host: h\r\nContent-Length: 5"),
    ],
)
async def test_what_only_looks_like_a_handshake_is_400_and_reaches_nobody(balanced, old, new):
    """RFC 6455 §4.1: GET, no body, a key."""
    called = []

    async def see(request):
        called.append(request)
        return web.Response()

    await balanced.worker("w1", see)
    reader, writer = await opened(balanced)
    writer.write(HANDSHAKE.replace(old, new).encode() + (b"12345" if "Length" in new else b""))
    async with asyncio.timeout(20):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert called == []
    writer.close()


async def test_a_worker_that_cannot_be_reached_is_502_and_passed_over(balanced):
    """It is the least busy one, so the next handshake would go there again."""
    balanced.unreachable("w1")
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await connect(balanced)
    assert refused.value.status == 502
    assert not balanced.slots.worker("w1").takes_requests


async def test_after_a_refused_handshake_nothing_of_the_client_reaches_the_worker(balanced):
    """What follows would be a request of its own, past the check of keys."""
    received, more = bytearray(), asyncio.Event()

    async def serve(reader, writer):
        received.extend(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 6\r\n\r\nabc")
        await more.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                received.extend(await reader.read(100))
        writer.write(b"def")
        writer.close()

    await balanced.raw_worker(serve)
    reader, writer = await opened(balanced)
    writer.write(HANDSHAKE.encode())
    async with asyncio.timeout(20):
        answer = await reader.readuntil(b"abc")
        writer.write(b"GET /admin HTTP/1.1\r\n\r\n")
        await writer.drain()
        more.set()
        assert answer + await reader.read() == answer + b"def"
    assert b"admin" not in received
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"connection: close" in answer
    writer.close()


async def test_a_refusal_has_the_limit_of_any_answer(make_balanced):
    balanced = await make_balanced(response_bytes=10_000)

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"x" * 1000)
                await writer.drain()

    await balanced.raw_worker(serve)
    reader, writer = await opened(balanced)
    writer.write(HANDSHAKE.encode())
    async with asyncio.timeout(20):
        assert (await reader.read()).count(b"xxxx") <= 2500
    await idle(balanced)
    writer.close()


async def test_a_client_that_reads_nothing_slows_its_worker(balanced):
    """Also when the first bytes come with the answer to the handshake."""
    sent, stuck = 0, asyncio.Event()

    async def serve(reader, writer):
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + b"x" * 60_000)
        with contextlib.suppress(ConnectionError):
            while sent < 200_000_000:
                writer.write(b"x" * 100_000)
                sent += 100_000
                try:
                    async with asyncio.timeout(1):
                        await writer.drain()
                except TimeoutError:
                    stuck.set()
                    return

    await balanced.raw_worker(serve)
    _, writer = await opened(balanced)
    writer.transport.pause_reading()
    writer.write(HANDSHAKE.encode())
    async with asyncio.timeout(30):
        await stuck.wait()
    assert sent < 200_000_000
    writer.transport.abort()
    await idle(balanced)


async def test_a_side_that_reads_nothing_holds_no_slot_for_long(balanced, monkeypatch):
    monkeypatch.setattr(tunnel, "_STALL_S", 0.2)
    monkeypatch.setattr(tunnel, "_LINGER_S", 0.2)
    done = asyncio.Event()

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        await done.wait()

    await balanced.raw_worker(serve)
    reader, writer = await opened(balanced)
    writer.write(HANDSHAKE.encode())
    await reader.readuntil(b"\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(20):
            while True:
                writer.write(b"x" * 1_000_000)
                await writer.drain()
    await idle(balanced)
    done.set()
    writer.close()
