"""WebSockets through the load balancer (serverless-api.md §3: upgrades are forwarded)."""

from __future__ import annotations

import asyncio
import os

import aiohttp
import pytest
from aiohttp import WSMsgType, web

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
