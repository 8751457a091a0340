"""Requests that are read without the parser say exactly what the parser would have said of them."""

import contextlib

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.gateway.repeated import KnownFields

BLOCK = b"Host: x\r\nAuthorization: Bearer k\r\nContent-Length: 4"


class Parsed:
    """What httptools makes of bytes."""

    def __init__(self, data):
        self.headers, self.url, self.body, self.begun, self.complete = [], b"", b"", 0, 0
        parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(httptools.HttpParserUpgrade):
            parser.feed_data(data)
        self.method = parser.get_method()
        self.version = parser.get_http_version()

    def on_message_begin(self):
        self.begun += 1

    def on_url(self, url):
        self.url += url

    def on_header(self, name, value):
        self.headers.append((name.lower(), value))

    def on_body(self, body):
        self.body += body

    def on_message_complete(self):
        self.complete += 1


def learnt(data):
    known = KnownFields()
    known.learn(data, Parsed(data).headers)
    return known


def request(line=b"POST /v2/e/run?x=1 HTTP/1.1", block=BLOCK, body=b"body"):
    return line + b"\r\n" + block + b"\r\n\r\n" + body


def test_a_request_with_the_fields_of_an_earlier_one_is_read():
    known = learnt(request())
    found = known.read(request(b"GET /v2/other/status/1-e1?ttl=5%20 HTTP/1.1", body=b"next"))
    assert (found.method, found.path, found.query) == ("GET", "/v2/other/status/1-e1", "ttl=5%20")
    assert found.fields.headers == {b"host": b"x", b"authorization": b"Bearer k", b"content-length": b"4"}
    assert found.body == b"next"
    bare = learnt(request(b"GET /v2/e/health HTTP/1.1", b"Host: x", b""))
    assert bare.read(request(b"GET /v2/e/health HTTP/1.1", b"Host: x", b"")).body == b""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n",
        b"\r\n\r\n",
        b"POST /v2/e/run HTTP/1.1\r\n\r\n",
        request()[:-1],
        request() + b"G",
        request() + request(),
        b"\r\n" + request(),
        request(block=BLOCK.replace(b"Bearer k", b"Bearer l")),
        request(block=BLOCK + b"\r\nX-A: 1"),
        request(b"POST /v2/e/run HTTP/1.0"),
        request(b"POST /v2/e/run HTTP/1.1 "),
        request(b"POST  /v2/e/run HTTP/1.1"),
        request(b"POST\t/v2/e/run HTTP/1.1"),
        request(b"POST /v2/e/run"),
        request(b"post /v2/e/run HTTP/1.1"),
        request(b"HEAD /v2/e/health HTTP/1.1"),
        request(b"PUT /v2/e/run HTTP/1.1"),
        request(b"POST http://x/v2/e/run HTTP/1.1"),
        request(b"POST /v2/e/r%75n HTTP/1.1"),
        request(b"POST /v2/e/run#x HTTP/1.1"),
        request(b"POST /v2/e/run?a=\xc3\xa4 HTTP/1.1"),
        request(b"POST /v2/e/run?a?b HTTP/1.1"),
        request(b"POST /pilotlight/v1/keys HTTP/1.1"),
        request(b"POST /v2/e/run\r\nX: HTTP/1.1"),
    ],
)
def test_whatever_is_not_exactly_that_goes_to_the_parser(data):
    assert learnt(request()).read(data) is None


@pytest.mark.parametrize(
    "block",
    [
        b"Host: x\r\nTransfer-Encoding: chunked",
        b"Host: x\r\nExpect: 100-continue\r\nContent-Length: 4",
        b"Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket",
        b"Host: x\r\nConnection: close\r\nContent-Length: 4",
        b"Host: x\r\nConnection: keep-alive, x-y\r\nContent-Length: 4",
        b"Host: x\r\nX-Long: " + b"l" * 2048,
    ],
)
def test_fields_that_change_how_a_message_is_read_are_not_learnt(block):
    data = request(block=block, body=b"")
    assert learnt(data).read(data) is None


def test_fields_that_the_parser_reads_otherwise_are_not_learnt():
    data = request()
    for headers in ([], [(b"host", b"y")], [*Parsed(data).headers, (b"x", b"1")]):
        known = KnownFields()
        known.learn(data, headers)
        assert known.read(data) is None
    known = KnownFields()
    doubled = request(block=b"Content-Length: 4\r\nContent-Length: 5")
    known.learn(doubled, [(b"content-length", b"4"), (b"content-length", b"5")])
    assert known.read(doubled) is None


def test_a_connection_remembers_only_so_much():
    known = KnownFields()
    requests = [request(block=b"Host: x%d" % number, body=b"") for number in range(20)]
    for data in requests:
        known.learn(data, Parsed(data).headers)
    assert sum(known.read(data) is not None for data in requests) == 8


names = st.sampled_from([b"Host", b"content-length", b"X-A", b"Connection", b"x_b", b" X", b"Te", b"Cookie:"])
values = st.sampled_from(
    [b"4", b" 4", b"0", b"x", b"keep-alive", b"a: b", b"", b" \t", b"\xff", b"a\nB: c", b"a\r b"]
)
lines = st.tuples(names, st.sampled_from([b":", b": ", b":\t", b" :"]), values).map(b"".join)
ends = st.sampled_from([b"\r\n", b"\n", b"\r\n "])


@given(
    st.lists(st.tuples(lines, ends), max_size=4),
    st.sampled_from(
        [b"GET /v2/e/status/1 HTTP/1.1", b"POST /v2/e/run?a=b HTTP/1.1", b"GET /v2/a//b HTTP/1.1"]
    ),
    st.sampled_from([b"", b"body", b"\r\n\r\n", b"bodies", b"GET / HTTP/1.1\r\n\r\n"]),
)
def test_nothing_is_read_that_the_parser_reads_otherwise(fields, line, body):
    """The heads are learnt as `GatewayProtocol` learns them: when the parser found one message in them."""
    data = line + b"\r\n" + b"".join(text + end for text, end in fields) + b"\r\n" + body
    try:
        parsed = Parsed(data)
    except httptools.HttpParserError:
        return
    if parsed.begun != 1:
        return
    known = KnownFields()
    known.learn(data, parsed.headers)
    found = known.read(data)
    if found is not None:
        target = f"{found.path}?{found.query}" if found.query else found.path
        assert (found.method.encode(), target.encode()) == (parsed.method, parsed.url)
        assert (found.body, found.fields.headers) == (parsed.body, dict(parsed.headers))
        assert (parsed.complete, parsed.version) == (1, "1.1")
