"""The link: frames, their order, and what ends it."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import pytest

from pilotlight.gateway.fronts import link as link_module
from pilotlight.gateway.fronts import messages
from pilotlight.gateway.fronts.link import FRAME_BYTES_MAX, Link

encode = msgspec.msgpack.encode


class End:
    """One end, and what came out of it."""

    def __init__(self, *, then=lambda message: None):
        self.came, self.then = [], then
        self.lost = asyncio.Event()
        self.lost_count = 0
        decoder = msgspec.msgpack.Decoder(list[messages.FromFront])
        self.link = Link(decoder, self._came, self._lost)

    def _came(self, message):
        self.came.append(message)
        self.then(message)

    def _lost(self):
        self.lost_count += 1
        self.lost.set()


async def end_and_socket(**options):
    ours, its = socket.socketpair()
    its.setblocking(False)
    end = End(**options)
    await end.link.open(ours)
    return end, its


def frame(*sent):
    payload = encode(list(sent))
    return len(payload).to_bytes(4, "big") + payload


async def read_until_end(sock):
    data = b""
    while piece := await asyncio.get_running_loop().sock_recv(sock, 65536):
        data += piece
    return data


async def test_what_is_sent_in_one_turn_goes_in_one_frame_and_in_order():
    end, its = await end_and_socket()
    for number in range(3):
        end.link.send(messages.Cancel(number))
    await asyncio.sleep(0)
    end.link.send(msgspec.Raw(encode(messages.Cancel(3))))
    await end.link.close()
    first = frame(*(messages.Cancel(number) for number in range(3)))
    assert await read_until_end(its) == first + frame(messages.Cancel(3))
    assert end.lost_count == 1
    its.close()


async def test_frames_may_come_in_any_pieces():
    sent = [messages.Suspend("worker", 1.5), messages.Cancel(1), messages.Ready()]
    data = frame(*sent[:2]) + frame(sent[2]) + frame()
    for step in (1, 3, len(data)):
        end, its = await end_and_socket()
        for start in range(0, len(data), step):
            its.send(data[start : start + step])
            if step < len(data):
                await asyncio.sleep(0)
        its.close()
        await end.lost.wait()
        assert end.came == sent


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff",
        (FRAME_BYTES_MAX + 1).to_bytes(4, "big"),
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x00",
        frame(messages.Stop()),
        frame([99]),
        frame([1, "not a number"]),
        frame(messages.Cancel(1), [3]),
    ],
    ids=[
        "length",
        "too long",
        "no MessagePack",
        "empty",
        "other direction",
        "unknown",
        "wrong type",
        "short",
    ],
)
async def test_what_cannot_be_read_ends_the_link(garbage):
    end, its = await end_and_socket()
    its.send(frame(messages.Ready()) + garbage)
    await end.lost.wait()
    assert end.came == [messages.Ready()]
    end.link.send(messages.Ready())
    its.close()


async def test_what_cannot_be_obeyed_ends_the_link_and_nothing_more_is_done():
    def then(message):
        raise KeyError(message)

    end, its = await end_and_socket(then=then)
    its.send(frame(messages.Cancel(1), messages.Cancel(2)) + frame(messages.Cancel(3)))
    await end.lost.wait()
    assert (end.came, end.lost_count) == ([messages.Cancel(1)], 1)
    its.close()


async def test_a_link_that_is_ended_while_messages_come_brings_no_more_of_them():
    end, its = await end_and_socket(then=lambda _: end.link.abort())
    its.send(frame(messages.Cancel(1), messages.Cancel(2)) + frame(messages.Cancel(3)))
    await end.lost.wait()
    assert end.came == [messages.Cancel(1)]
    its.close()


async def test_a_side_that_does_not_read_loses_the_link(monkeypatch):
    monkeypatch.setattr(link_module, "UNSENT_BYTES_MAX", 100_000)
    end, its = await end_and_socket()
    while not end.lost.is_set():
        end.link.send(messages.Suspend("w" * 50_000, 1.0))
        await asyncio.sleep(0)
    its.close()


async def test_a_frame_that_is_too_large_is_not_sent(monkeypatch):
    monkeypatch.setattr(link_module, "FRAME_BYTES_MAX", 1000)
    end, its = await end_and_socket()
    end.link.send(messages.Suspend("w" * 1000, 1.0))
    await end.lost.wait()
    assert await read_until_end(its) == b""
    its.close()


async def test_what_cannot_be_encoded_ends_the_link():
    end, its = await end_and_socket()
    end.link.send(object())
    await end.lost.wait()
    its.close()
