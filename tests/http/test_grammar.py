"""What is a request and what is not, on every hot path, fresh and warmed connections alike (RFC 9110, 9112).

A connection is warm when requests with the same fields were answered on it before: those may be read by other
code. Every vector is written so that a second reading of its bytes would show as a second answer, a wrong text
in the answer, or a request at the engine.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest

from .conftest import Route, Site
from .wire import ClosedError, Wire

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROUTES = ("chat", "stream", "run", "keys", "lb")


class Vectors(dict):
    """Vectors by name, each for `pytest.mark.parametrize`."""

    def params(self):
        return [pytest.param(value, id=name) for name, value in self.items()]


def filled(site: Site, route: Route, template: bytes) -> tuple[bytes, str]:
    """The template as a request of the route, and the text that its body carries."""
    text = site.text()
    body = route.body(text)
    more = site.request(route, site.text())
    raw = (
        template.replace(b"{path}", route.path.encode())
        .replace(b"{auth}", site.auth)
        .replace(b"{n}", b"%d" % len(body))
        .replace(b"{n+1}", b"%d" % (len(body) + 1))
        .replace(b"{n-1}", b"%d" % (len(body) - 1))
        .replace(b"{x}", b"%x" % len(body))
        .replace(b"{X}", b"%X" % len(body))
        .replace(b"{first}", body[:1])
        .replace(b"{others}", body[1:])
        .replace(b"{x-1}", b"%x" % (len(body) - 1))
        .replace(b"{body}", body)
        .replace(b"{more}", more)
    )
    return raw, text


async def each(site: Site, template: bytes, check) -> None:
    """Check a template on every road, fresh and warm; tell all that fails together."""
    failed = []
    for name, warm in itertools.product(ROUTES, (False, True)):
        route = site.routes[name]
        wire = await (site.warm(route) if warm else site.open())
        raw, text = filled(site, route, template)
        site.engine.reset()
        await wire.send(raw)
        try:
            await check(site, wire, route, text)
            assert not site.engine.faults, site.engine.faults
        except AssertionError as error:
            failed.append(f"{name}, {'warm' if warm else 'fresh'}: {str(error).splitlines()[0][:400]}")
        wire.close()
    site.engine.reset()
    assert not failed, "\n".join(["", *failed])


async def is_refused(site: Site, wire: Wire, _route: Route, _text: str) -> None:
    """At most one answer, which says what is wrong and that the connection ends; it does; nothing is done."""
    with contextlib.suppress(ClosedError):
        answer = await wire.answer()
        assert 400 <= answer.status < 500 or answer.status in {501, 505}, answer
        assert answer.closes, f"it does not say that it closes: {answer}"
    assert not await wire.rest(), f"more than one answer: {wire.pending[:500]!r}"
    assert not site.engine.seen, site.engine.seen


async def is_served(site: Site, wire: Wire, route: Route, text: str) -> None:
    """Answered, and so is what comes after it on the same connection."""
    site.answers(route, text, await wire.answer())
    await site.serves(wire, route)


async def is_refused_or_served(site: Site, wire: Wire, route: Route, text: str) -> None:
    """Either of them, and nothing between."""
    with contextlib.suppress(ClosedError):
        answer = await wire.answer()
        if answer.status in {200, 201}:
            site.answers(route, text, answer)
        else:
            assert 400 <= answer.status < 500 or answer.status == 501, answer
        if not answer.closes:
            await site.serves(wire, route)
            return
    assert not await wire.rest(), wire.pending


LINES = Vectors(
    no_version=b"POST {path}",
    no_target=b"POST HTTP/1.1",
    no_method=b"{path} HTTP/1.1",
    empty_method=b" {path} HTTP/1.1",
    method_of_two_words=b"PO ST {path} HTTP/1.1",
    zero_in_method=b"PO\0ST {path} HTTP/1.1",
    quote_in_method=b'P"ST {path} HTTP/1.1',
    colon_after_method=b"POST: {path} HTTP/1.1",
    long_method=b"P" * 5000 + b" {path} HTTP/1.1",
    target_without_slash=b"POST x{path} HTTP/1.1",
    blank_in_target=b"POST {path} {path} HTTP/1.1",
    tab_in_target=b"POST {path}\tx HTTP/1.1",
    zero_in_target=b"POST {path}?\0 HTTP/1.1",
    delete_in_target=b"POST {path}?\x7f HTTP/1.1",
    carriage_return_in_target=b"POST {path}\rx HTTP/1.1",
    authority_as_target=b"POST h:80 HTTP/1.1",
    two=b"POST {path} HTTP/2.0",
    three=b"POST {path} HTTP/3.0",
    nine_tenths=b"POST {path} HTTP/0.9",
    lower_case_version=b"POST {path} http/1.1",
    short_version=b"POST {path} HTTP/1",
    cut_version=b"POST {path} HTTP/1.",
    long_version=b"POST {path} HTTP/1.10",
    longer_version=b"POST {path} HTTP/01.1",
    version_with_comma=b"POST {path} HTTP/1,1",
    version_with_blank=b"POST {path} HTTP /1.1",
    word_after_version=b"POST {path} HTTP/1.1 x",
    letter_after_version=b"POST {path} HTTP/1.1x",
    other_protocol=b"POST {path} RTSP/1.0",
    another_protocol=b"POST {path} ICE/1.0",
    carriage_return_after_version=b"POST {path} HTTP/1.1\r",
)


@pytest.mark.parametrize("line", LINES.params())
async def test_a_line_that_is_no_request_line_is_refused(site, line):
    await each(site, line + b"\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}{more}", is_refused)


@pytest.mark.parametrize(
    "line",
    Vectors(
        unknown_method=b"BREW {path} HTTP/1.1",
        lower_case_method=b"post {path} HTTP/1.1",
        star=b"POST * HTTP/1.1",
        another_path=b"POST /nowhere HTTP/1.1",
    ).params(),
)
async def test_what_is_asked_of_nobody_is_declined(site, line):
    """The body is no request, whether the connection goes on or not."""
    template = line + b"\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}"

    async def check(site, wire, route, _text):
        answer = await wire.answer()
        if route.name == "lb" and b"BREW" in line and not answer.closes:
            assert answer.json()["method"] == "BREW"
        else:
            assert answer.status in {400, 404, 405, 501}, answer
        if not answer.closes:
            await site.serves(wire, route)

    await each(site, template, check)


FIELDS = Vectors(
    no_host=b"",
    two_hosts=b"Host: h\r\nHost: i\r\n",
    the_same_host_twice=b"Host: h\r\nHost: h\r\n",
    host_list=b"Host: h, i\r\n",
    host_of_two_words=b"Host: h i\r\n",
    host_with_slash=b"Host: h/i\r\n",
    host_with_user=b"Host: u@h\r\n",
    host_with_port_of_letters=b"Host: h:http\r\n",
    host_with_two_ports=b"Host: h:80:80\r\n",
    blank_before_colon=b"Host: h\r\nX-A : 1\r\n",
    tab_before_colon=b"Host: h\r\nX-A\t: 1\r\n",
    blank_before_colon_of_host=b"Host : h\r\n",
    blank_before_first_field=b" X-A: 1\r\nHost: h\r\n",
    tab_before_first_field=b"\tX-A: 1\r\nHost: h\r\n",
    blank_line_of_blanks=b" \r\nHost: h\r\n",
    no_colon=b"Host: h\r\nX-A\r\n",
    no_name=b"Host: h\r\n: 1\r\n",
    blank_in_name=b"Host: h\r\nX A: 1\r\n",
    zero_in_name=b"Host: h\r\nX\0A: 1\r\n",
    bracket_in_name=b"Host: h\r\nX(A: 1\r\n",
    letter_beyond_ascii_in_name=b"Host: h\r\nX\xe4A: 1\r\n",
    delete_in_name=b"Host: h\r\nX\x7fA: 1\r\n",
    zero_in_value=b"Host: h\r\nX-A: 1\x002\r\n",
    zero_in_host=b"Host: h\0\r\n",
    carriage_return_in_value=b"Host: h\r\nX-A: 1\r2\r\n",
    carriage_return_hides_a_field=b"Host: h\r\nX-A: 1\rTransfer-Encoding: chunked\r\n",
    carriage_returns_alone=b"Host: h\rX-A: 1\r",
    two_carriage_returns=b"Host: h\r\r\n",
    line_feed_before_carriage_return=b"Host: h\n\rX-A: 1\r\n",
)


@pytest.mark.parametrize("fields", FIELDS.params())
async def test_fields_that_are_none_are_refused(site, fields):
    template = b"POST {path} HTTP/1.1\r\n" + fields + b"{auth}Content-Length: {n}\r\n\r\n{body}{more}"
    await each(site, template, is_refused)


LENGTHS = Vectors(
    plus=b"Content-Length: +{n}",
    minus=b"Content-Length: -{n}",
    minus_nought=b"Content-Length: -0",
    hexadecimal=b"Content-Length: 0x{x}",
    fraction=b"Content-Length: {n}.0",
    exponent=b"Content-Length: {n}e0",
    underscore=b"Content-Length: 0_{n}",
    word=b"Content-Length: many",
    empty=b"Content-Length:",
    blank_within=b"Content-Length: {n} {n}",
    other_digits=b"Content-Length: \xd9\xa5",
    semicolon=b"Content-Length: {n};",
    vertical_tab=b"Content-Length: {n}\x0b",
    form_feed=b"Content-Length: \x0c{n}",
    zero=b"Content-Length: {n}\0",
    quoted=b'Content-Length: "{n}"',
    two_differ=b"Content-Length: {n}\r\nContent-Length: {n-1}",
    two_differ_otherwise=b"Content-Length: 0\r\nContent-Length: {n}",
    list_differs=b"Content-Length: {n}, {n-1}",
    list_with_nought=b"Content-Length: 0, {n}",
    second_is_no_number=b"Content-Length: {n}\r\nContent-Length: x",
    two_to_the_64_more=b"Content-Length: 18446744073709551616",
    huge=b"Content-Length: " + b"9" * 30,
    very_huge=b"Content-Length: " + b"9" * 3000,
    underscore_in_name=b"Content_Length: {n}\r\nContent-Length: x",
    blank_before_colon=b"Content-Length : {n}",
    folded=b"Content-Length:\r\n {n-1}\r\nX-A: 1\r\n\t2\r\nContent-Length: {n}",
    after_carriage_return=b"X-A: 1\rContent-Length: 0\r\nContent-Length: {n}",
    after_line_feed=b"X-A: 1\nContent-Length: 0\r\nContent-Length: {n}",
)


@pytest.mark.parametrize("length", LENGTHS.params())
async def test_a_length_that_is_none_is_refused(site, length):
    """RFC 9112 §6.3: 400, and the connection ends."""
    template = b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}" + length + b"\r\n\r\n{body}{more}"
    await each(site, template, is_refused)


CODINGS = Vectors(
    unknown=b"xchunked",
    identity=b"identity",
    identity_first=b"identity, chunked",
    identity_last=b"chunked, identity",
    chunked_twice=b"chunked, chunked",
    compressed=b"gzip",
    compressed_and_chunked=b"gzip, chunked",
    chunked_and_compressed=b"chunked, gzip",
    empty=b"",
    quoted=b'"chunked"',
    parameter=b"chunked;q=1",
    vertical_tab_before=b"\x0bchunked",
    vertical_tab_after=b"chunked\x0b",
    zero_after=b"chunked\0",
    beyond_ascii=b"chun\xeb\xebd",
    long_s=b"chunked\xc5\xbf",
    two_words=b"chunked x",
    lines_that_differ=b"chunked\r\nTransfer-Encoding: identity",
    lines_that_differ_otherwise=b"identity\r\nTransfer-Encoding: chunked",
    lines_that_agree=b"chunked\r\nTransfer-Encoding: chunked",
    folded=b"\r\n chunked\r\nTransfer-Encoding: identity",
)


@pytest.mark.parametrize("coding", CODINGS.params())
async def test_a_coding_that_is_not_understood_is_refused(site, coding):
    """RFC 9112 §6.1, §6.3: 400 or 501, and the connection ends."""
    template = (
        b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Transfer-Encoding: " + coding + b"\r\n\r\n"
        b"{x}\r\n{body}\r\n0\r\n\r\n{more}"
    )
    await each(site, template, is_refused)


@pytest.mark.parametrize(
    "fields",
    Vectors(
        length_first=b"Content-Length: {n}\r\nTransfer-Encoding: chunked",
        coding_first=b"Transfer-Encoding: chunked\r\nContent-Length: {n}",
        nought=b"Content-Length: 0\r\nTransfer-Encoding: chunked",
        no_number=b"Content-Length: x\r\nTransfer-Encoding: chunked",
        unknown_coding=b"Content-Length: {n}\r\nTransfer-Encoding: xchunked",
        hidden_coding=b"Content-Length: {n}\r\nTransfer-Encoding : chunked",
        tab_hides_coding=b"Content-Length: {n}\r\nTransfer-Encoding:\tchunked",
        other_case=b"Content-Length: {n}\r\ntRANSFER-eNCODING: CHUNKED",
        folded_coding=b"Content-Length: {n}\r\nTransfer-Encoding:\r\n chunked",
        coding_in_folded_value=b"Content-Length: {n}\r\nX-A: 1\r\n Transfer-Encoding: chunked",
    ).params(),
)
async def test_a_length_and_a_coding_together_are_refused(site, fields):
    """RFC 9112 §6.1: either may be a mistake, and one of two readings is an attack."""
    template = (
        b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}" + fields + b"\r\n\r\n{x}\r\n{body}\r\n0\r\n\r\n{more}"
    )
    await each(site, template, is_refused)


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
@pytest.mark.parametrize("connection", [b"", b"Connection: keep-alive\r\n"])
async def test_chunks_of_an_old_client_are_the_last_of_its_connection(site, version, connection):
    """RFC 9112 §6.1: with HTTP/1.0 such framing is faulty, whatever it says of keeping the connection."""
    template = (
        b"POST {path} %b\r\nHost: h\r\n{auth}%bTransfer-Encoding: chunked\r\n\r\n" % (version, connection)
        + b"{x}\r\n{body}\r\n0\r\n\r\n"
    )

    async def check(site, wire, route, text):
        if version == b"HTTP/1.1":
            await is_served(site, wire, route, text)
            return
        answer = await wire.last()
        if answer is not None and answer.status in {200, 201}:
            site.answers(route, text, answer)
        else:
            assert answer is None or answer.status == 400, answer

    await each(site, template, check)


CHUNKS = Vectors(
    letters=b"xyz\r\n{body}\r\n0\r\n\r\n",
    empty=b"\r\n{body}\r\n0\r\n\r\n",
    minus=b"-{x}\r\n{body}\r\n0\r\n\r\n",
    plus=b"+{x}\r\n{body}\r\n0\r\n\r\n",
    prefix=b"0x{x}\r\n{body}\r\n0\r\n\r\n",
    underscore=b"0_{x}\r\n{body}\r\n0\r\n\r\n",
    blank_before=b" {x}\r\n{body}\r\n0\r\n\r\n",
    tab_before=b"\t{x}\r\n{body}\r\n0\r\n\r\n",
    zero_after=b"{x}\0\r\n{body}\r\n0\r\n\r\n",
    comma=b"{x},0\r\n{body}\r\n0\r\n\r\n",
    two_to_the_64_more=b"10000000000000001\r\n{body}\r\n0\r\n\r\n",
    two_to_the_68=b"100000000000000000{x}\r\n{body}\r\n0\r\n\r\n",
    all_ones=b"ffffffffffffffffff\r\n{body}\r\n0\r\n\r\n",
    hundred_digits=b"f" * 100 + b"\r\n{body}\r\n0\r\n\r\n",
    data_is_longer=b"{x-1}\r\n{body}\r\n0\r\n\r\n",
    no_end_of_data=b"{x}\r\n{body}0\r\n\r\n",
    line_feed_after_data=b"{x}\r\n{body}\n0\r\n\r\n",
    carriage_return_after_data=b"{x}\r\n{body}\r0\r\n\r\n",
    two_letters_after_data=b"{x}\r\n{body}XX0\r\n\r\n",
    line_feed_after_size=b"{x}\n{body}\r\n0\r\n\r\n",
    carriage_return_after_size=b"{x}\r{body}\r\n0\r\n\r\n",
    line_feeds_alone=b"{x}\n{body}\n0\n\n",
    line_feed_in_extension=b"{x};a\n{body}\r\n0\r\n\r\n",
    line_feed_hides_a_chunk=b"{x};a=b\n2\r\n{body}\r\n0\r\n\r\n",
    carriage_return_in_extension=b"{x};a\rb\r\n{body}\r\n0\r\n\r\n",
    zero_in_extension=b"{x};a\0b\r\n{body}\r\n0\r\n\r\n",
    line_feed_after_last=b"{x}\r\n{body}\r\n0\n\r\n",
    nothing_after_last=b"{x}\r\n{body}\r\n0\r\nGET / HTTP/1.1\r\n\r\n",
    blank_before_colon_of_trailer=b"{x}\r\n{body}\r\n0\r\nX-A : 1\r\n\r\n",
    zero_in_trailer=b"{x}\r\n{body}\r\n0\r\nX-A: \0\r\n\r\n",
    huge_extension=b"{x};" + b"a" * 300_000 + b"\r\n{body}\r\n0\r\n\r\n",
    huge_trailer=b"{x}\r\n{body}\r\n0\r\nX-A: " + b"a" * 300_000 + b"\r\n\r\n",
)


@pytest.mark.parametrize("chunks", CHUNKS.params())
async def test_chunks_that_are_none_are_refused(site, chunks):
    template = (
        b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Transfer-Encoding: chunked\r\n\r\n" + chunks + b"{more}"
    )
    await each(site, template, is_refused)


ONE_CHUNK = b"{x}\r\n{body}\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "template",
    Vectors(
        plain=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        empty_line_before=b"\r\nPOST {path} HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        other_case=b"POST {path} HTTP/1.1\r\nhOST: h\r\n{auth}cONTENT-lENGTH: {n}\r\n\r\n{body}",
        no_blanks=b"POST {path} HTTP/1.1\r\nHost:h\r\n{auth}Content-Length:{n}\r\n\r\n{body}",
        more_blanks=b"POST {path} HTTP/1.1\r\nHost: \t h \t\r\n{auth}Content-Length: \t {n} \t\r\n\r\n{body}",
        leading_zeros=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: 0000{n}\r\n\r\n{body}",
        empty_value=b"POST {path} HTTP/1.1\r\nHost: h\r\nX-A:\r\nX-B: \r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        beyond_ascii=b"POST {path} HTTP/1.1\r\nHost: h\r\nX-A: \xe4\xff\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        odd_name=b"POST {path} HTTP/1.1\r\nHost: h\r\n!#$%&'*+-.^_`|~9: 1\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        repeated=b"POST {path} HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nX-A: 2\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        port=b"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:8400\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        address=b"POST {path} HTTP/1.1\r\nHost: [::1]:8400\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        absolute=b"POST http://h{path} HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        absolute_port=b"POST HTTP://h:80{path} HTTP/1.1\r\nHost: i\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        query=b"POST {path}?a=/../b%20&c=? HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        long_line=b"POST {path}?"
        + b"a" * 1900
        + b" HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        long_field=b"POST {path} HTTP/1.1\r\nHost: h\r\nCookie: "
        + b"a" * 8000
        + b"\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        many_fields=b"POST {path} HTTP/1.1\r\nHost: h\r\n"
        + b"X-A: 1\r\n" * 100
        + b"{auth}Content-Length: {n}\r\n\r\n{body}",
        upgrade_that_is_not_taken=b"POST {path} HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        upgrade_as_curl_asks_for_it=b"POST {path} HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        upgrade_and_chunks=b"POST {path} HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n{auth}Transfer-Encoding: chunked\r\n\r\n"
        + ONE_CHUNK,
        upgrades=b"\r\nPOST {path} HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, x\r\nUpgrade: h2c\r\nUpgrade: x/1\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        one_chunk=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Transfer-Encoding: chunked\r\n\r\n" + ONE_CHUNK,
        other_case_of_coding=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}transfer-encoding: CHUNKED\r\n\r\n"
        + ONE_CHUNK,
        two_chunks=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Transfer-Encoding: chunked\r\n\r\n1\r\n{first}\r\n{x-1}\r\n{others}\r\n0\r\n\r\n",
        capital_digits=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Transfer-Encoding: chunked\r\n\r\n000{X}\r\n{body}\r\n000\r\n\r\n",
        extensions=b'POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Transfer-Encoding: chunked\r\n\r\n{x};a;b=c;d="e;f"\r\n{body}\r\n0;a\r\n\r\n',
        trailer=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Transfer-Encoding: chunked\r\nTrailer: X-A\r\n\r\n{x}\r\n{body}\r\n0\r\nX-A: 1\r\nX-B: 2\r\n\r\n",
    ).params(),
)
async def test_what_is_correct_is_served(site, template):
    await each(site, template, is_served)


@pytest.mark.parametrize(
    "template",
    Vectors(
        empty_lines_before=b"\r\n\r\n\r\nPOST {path} HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        line_feeds_alone=b"POST {path} HTTP/1.1\nHost: h\n{auth}Content-Length: {n}\n\n{body}",
        line_feed_in_head=b"POST {path} HTTP/1.1\r\nHost: h\nX-A: 1\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        blanks_in_line=b"POST  {path}  HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        tabs_in_line=b"POST\t{path}\tHTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        blank_after_line=b"POST {path} HTTP/1.1 \r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        fragment=b"POST {path}#x HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        beyond_ascii_in_query=b"POST {path}?\xe4 HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        later_version=b"POST {path} HTTP/1.2\r\nHost: h\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        folded=b"POST {path} HTTP/1.1\r\nHost: h\r\nX-A: 1\r\n 2\r\n\t3\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        empty_host=b"POST {path} HTTP/1.1\r\nHost:\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        length_twice=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}\r\nContent-Length: {n}\r\n\r\n{body}",
        length_list=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Content-Length: {n}, {n}\r\n\r\n{body}",
        empty_items_of_coding=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Transfer-Encoding: , chunked ,\r\n\r\n" + ONE_CHUNK,
        blank_after_size=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Transfer-Encoding: chunked\r\n\r\n{x} \r\n{body}\r\n0\r\n\r\n",
        length_in_trailer=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Transfer-Encoding: chunked\r\n\r\n{x}\r\n{body}\r\n0\r\nContent-Length: 3\r\n\r\n",
        coding_in_trailer=b"POST {path} HTTP/1.1\r\nHost: h\r\n{auth}Transfer-Encoding: chunked\r\n\r\n{x}\r\n{body}\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
        websocket=b"POST {path} HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
        unknown_expectation=b"POST {path} HTTP/1.1\r\nHost: h\r\nExpect: miracles\r\n{auth}Content-Length: {n}\r\n\r\n{body}",
    ).params(),
)  # fmt: skip
async def test_what_may_be_forgiven_is_refused_or_served(site, template):
    """RFC 9112 §2.2, §3, §5.2 let a server choose; what it must not do is to read two things out of it."""
    await each(site, template, is_refused_or_served)


@pytest.mark.parametrize(
    "raw",
    Vectors(
        preface_of_http_2=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        hello_of_tls=bytes.fromhex("16030100f8010000f40303") + bytes(range(200)) + b"\r\n\r\n",
        request_of_1991=b"GET /health\r\n\r\n",
        request_of_socks=b"\x05\x01\x00\r\n\r\n",
        line_of_zeros=bytes(100) + b"\r\n\r\n",
        answer=b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        mail=b"EHLO h\r\n\r\n",
    ).params(),
)
async def test_another_protocol_is_refused(site, raw):
    await each(site, raw, is_refused)


async def test_no_tunnel_is_opened(site):
    for line in (b"CONNECT h:443 HTTP/1.1", b"CONNECT {path} HTTP/1.1"):

        async def check(site, wire, _route, _text):
            answer = await wire.answer("GET")
            assert 400 <= answer.status < 600, answer
            assert len(site.engine.seen) == 0, site.engine.seen

        await each(site, line + b"\r\nHost: h\r\n{auth}\r\n", check)
