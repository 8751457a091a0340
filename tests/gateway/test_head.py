"""Heads that repeat: what the lane reads is what the parser reads, and nothing else is read by it."""

from __future__ import annotations

import asyncio
import json

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.gateway.head import lane_of
from pilotlight.gateway.protocol import GatewayProtocol

from .conftest import OTHER, RUN

CHAT = "/v2/ep/openai/v1/chat/completions"


class Parsed:
    """What httptools makes of a message."""

    def __init__(self, data):
        self.fields, self.body, self.complete = [], b"", False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_header(self, name, value):
        self.fields.append((name.lower(), value))

    def on_body(self, body):
        self.body += body

    def on_message_complete(self):
        self.complete = True


def head(*lines, line="POST /x HTTP/1.1"):
    return "\r\n".join([line, *lines]).encode() + b"\r\n\r\n"


def lane(*lines):
    data = head(*lines)
    return lane_of(data, Parsed(data).fields, "head")


@pytest.mark.parametrize("name", ["Content-Length", "content-length", "CONTENT-LENGTH"])
@pytest.mark.parametrize("space", ["", " ", "   "])
def test_a_head_is_known_again_whatever_its_length(name, space):
    known = lane("Host: h", f"{name}:{space}5", "Accept: */*")
    for length in (0, 7, 123456789):
        again = head("Host: h", f"{name}:{space}{length}", "Accept: */*")
        at, read = known.read(again + b"body")
        assert (again + b"body")[at:] == b"body"
        assert read == length


@pytest.mark.parametrize(
    "lines",
    [
        ("Host: h",),
        ("Host: h", "Content-Length: 1", "Transfer-Encoding: chunked"),
        ("Host: h", "Content-Length: 1", "Expect: 100-continue"),
        ("Host: h", "Content-Length: 1", "Connection: close"),
        ("Host: h", "Content-Length: 1", "Connection: keep-alive, x"),
        ("Host: h", "Content-Length: 1", "Upgrade: websocket"),
        ("Host: h", "Content-Length: 1", "TE: trailers"),
    ],
)
def test_what_takes_a_parser_has_no_lane(lines):
    data = head(*lines)
    fields = [tuple(part.strip() for part in line.lower().split(":", 1)) for line in lines]
    assert lane_of(data, [(name.encode(), value.encode()) for name, value in fields], "head") is None


@pytest.mark.parametrize(
    "data",
    [
        head("Host: h", "Content-Length: 5", "Accept: text/html"),
        head("Host: i", "Content-Length: 5", "Accept: */*"),
        head("Host: h", "Content-Length: +5", "Accept: */*"),
        head("Host: h", "Content-Length: 5 ", "Accept: */*"),
        head("Host: h", "Content-Length: 5,5", "Accept: */*"),
        head("Host: h", "Content-Length: ", "Accept: */*"),
        head("Host: h", "Content-Length: 1234567890123456", "Accept: */*"),
        head("Host: h", "Content-Length: 5", "Accept: */*", "X: y"),
        head("Host: h", "Content-Length: 5", "X: y", "Accept: */*"),
        head("Host: h", "Content-Length: 5", "Accept: */*", line="POST /y HTTP/1.1"),
        b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 5",
        b"",
    ],
)
def test_anything_else_is_left_to_the_parser(data):
    known = lane("Host: h", "Content-Length: 1", "Accept: */*")
    assert known.read(data) is None


@given(st.integers(0, 2000), st.binary(max_size=2000), st.integers(0, 3))
def test_the_lane_and_the_parser_agree(length, body, spaces):
    known = lane("Host: h", f"Content-Length:{' ' * spaces}1")
    data = head("Host: h", f"Content-Length:{' ' * spaces}{length}")
    at, read = known.read(data + body)
    parsed = Parsed(data + body[:length])
    assert (data + body)[at : at + read] == parsed.body
    assert parsed.complete is (len(body) >= length)


async def asked(reader):
    """The status and body of the next answer."""
    lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    length = next(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


def request(text, *, key=RUN, more=""):
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]})
    return (
        f"POST {CHAT} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {key}\r\n{more}content-length: {len(body)}\r\n\r\n{body}"
    ).encode()


@pytest.fixture
def laned(monkeypatch):
    """Heads that were known."""
    heads = []
    enter = GatewayProtocol._enter_lane

    def counted(self, road, head, data, at, length):
        heads.append(length)
        enter(self, road, head, data, at, length)

    monkeypatch.setattr(GatewayProtocol, "_enter_lane", counted)
    return heads


async def test_requests_that_repeat_their_head_take_the_lane_and_get_their_own_answers(rig, laned):
    rig.open_worker()
    reader, writer = await asyncio.open_unix_connection(rig.socket)
    for number in range(5):
        writer.write(request("x" * number))
        assert (await asked(reader))[0] == 200
    assert len(laned) == 4
    sent = [json.loads(body)["messages"][0]["content"] for _, _, _, body in rig.engine.requests]
    assert sent == ["x" * number for number in range(5)]
    writer.close()


@pytest.mark.parametrize("cut", [1, 60, 130, 150, 180, -40, -1])
async def test_a_body_may_come_in_pieces_and_the_next_request_with_its_end(rig, laned, cut):
    """Wherever the bytes are cut, the answers come in order."""
    rig.open_worker()
    reader, writer = await asyncio.open_unix_connection(rig.socket)
    writer.write(request("first"))
    await asked(reader)
    second, third = request("second" * 10), request("third")
    writer.write(second[:cut])
    await writer.drain()
    await asyncio.sleep(0.01)
    writer.write(second[cut:] + third)
    assert [(await asked(reader))[0] for _ in range(2)] == [200, 200]
    sent = [json.loads(body)["messages"][0]["content"] for _, _, _, body in rig.engine.requests]
    assert sent == ["first", "second" * 10, "third"]
    writer.close()


async def test_a_known_head_is_asked_again_when_something_has_changed(rig, laned):
    """A key that was removed, and an endpoint that is gone, count from the next request on."""
    rig.open_worker()
    reader, writer = await asyncio.open_unix_connection(rig.socket)
    for _ in range(2):
        writer.write(request("x"))
        assert (await asked(reader))[0] == 200
    assert laned
    await rig.store.delete_key("run")
    await rig.directory.refresh()
    writer.write(request("x"))
    assert (await asked(reader))[0] == 401
    writer.close()


async def test_a_head_of_somebody_else_is_somebody_elses(rig, laned):
    rig.open_worker()
    reader, writer = await asyncio.open_unix_connection(rig.socket)
    statuses = []
    for key in (RUN, RUN, OTHER, RUN, OTHER, OTHER):
        writer.write(request("x", key=key))
        statuses.append((await asked(reader))[0])
    assert statuses == [200, 200, 403, 200, 403, 403]
    writer.close()


async def test_heads_that_never_repeat_are_not_learnt_for_ever(rig, laned):
    rig.open_worker()
    reader, writer = await asyncio.open_unix_connection(rig.socket)
    for number in range(12):
        writer.write(request("x", more=f"x-number: {number}\r\n"))
        assert (await asked(reader))[0] == 200
    for _ in range(3):
        writer.write(request("x"))
        assert (await asked(reader))[0] == 200
    assert not laned
    writer.close()
