"""What a connection may count on: order, persistence, ends, bodies on demand, and what is passed on (RFC 9110, 9112)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random

import pytest

from .engine import STREAM_HEAD, chunk, event, say_back
from .wire import ClosedError, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROUTES = ("chat", "stream", "run", "keys", "lb")
every_route = pytest.mark.parametrize("name", ROUTES)

HEALTH = b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n"


async def is_healthy(wire):
    answer = await wire.answer("GET")
    assert (answer.status, answer.json()) == (200, {"status": "ok"}), answer


# Order.


async def test_answers_come_in_the_order_of_the_requests(site):
    """RFC 9112 §9.3.2, for every pair of roads: whoever is faster must wait."""
    for order in itertools.permutations(ROUTES, 2):
        wire = await site.open()
        asked = [(site.routes[name], site.text()) for name in (*order, *order)]
        await wire.send(b"".join(site.request(route, text) for route, text in asked) + HEALTH)
        for route, text in asked:
            site.answers(route, text, await wire.answer())
        await is_healthy(wire)
        wire.close()


@every_route
async def test_many_requests_at_once_are_answered_one_by_one(site, name):
    route = site.routes[name]
    wire = await site.open()
    texts = [site.text() for _ in range(30)]
    await wire.send(b"".join(site.request(route, text) for text in texts))
    for text in texts:
        site.answers(route, text, await wire.answer())
    await site.serves(wire, route)


async def test_requests_in_pieces_of_any_size_are_answered_one_by_one(site):
    order = random.Random(1)
    for size in (1, 7, 64, 1000):
        wire = await site.open()
        asked = [(site.routes[name], site.text()) for name in order.choices(ROUTES, k=5)]
        data = b"".join(site.request(route, text) for route, text in asked)
        await wire.pieces(*(data[begin : begin + size] for begin in range(0, len(data), size)))
        for route, text in asked:
            site.answers(route, text, await wire.answer())
        wire.close()


@every_route
async def test_a_request_behind_a_stream_waits_for_its_end(site, name):
    release = asyncio.Event()

    async def slowly(seen, writer):
        if b'"stream"' not in seen.body:
            await say_back(seen, writer)
            return
        writer.write(STREAM_HEAD + chunk(event(f"{seen.said}-0")))
        await release.wait()
        writer.write(chunk(event(f"{seen.said}-1") + event(f"{seen.said}-2")) + chunk(b"data: [DONE]\n\n"))
        writer.write(b"0\r\n\r\n")

    site.engine.script = slowly
    stream, route = site.routes["stream"], site.routes[name]
    wire = await site.open()
    first, second = site.text(), site.text()
    await wire.send(site.request(stream, first) + site.request(route, second))
    await wire.has(f"{first}-0".encode())
    # Whoever would answer out of order has had the time for it.
    await site.serves(await site.open(), site.routes["run"])
    assert wire.pending.count(b"HTTP/1.1 ") == 1, wire.pending
    release.set()
    site.answers(stream, first, await wire.answer())
    site.answers(route, second, await wire.answer())


@every_route
@pytest.mark.parametrize(
    "worse",
    [
        pytest.param(b"POST /x HTTP/1.1\r\nBad Field: 1\r\n\r\n", id="field"),
        pytest.param(b"\0\0\0\0", id="zeros"),
        pytest.param(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n", id="length"),
    ],
)
async def test_what_is_broken_behind_a_request_does_not_break_its_answer(site, name, worse):
    route, text = site.routes[name], site.text()
    wire = await site.open()
    await wire.send(site.request(route, text) + worse)
    site.answers(route, text, await wire.answer())
    with contextlib.suppress(ClosedError):
        answer = await wire.answer()
        assert (answer.status, answer.closes) == (400, True), answer
    assert not await wire.rest(), wire.pending


# Persistence.


async def test_a_connection_serves_any_number_of_requests(site):
    order = random.Random(2)
    wire = await site.open()
    for name in order.choices(ROUTES, k=60):
        await site.serves(wire, site.routes[name])


@every_route
@pytest.mark.parametrize("option", [b"close", b"Close", b"keep-alive, close", b"x, close ,y"])
async def test_close_is_kept_and_nothing_after_it_is_read(site, name, option):
    """RFC 9112 §9.6."""
    route, text = site.routes[name], site.text()
    wire = await site.open()
    request = site.request(route, text, fields=b"Connection: " + option + b"\r\n")
    await wire.send(request + site.request(route, site.text()))
    answer = await wire.answer()
    site.answers(route, text, answer)
    assert answer.closes, answer
    assert not await wire.rest(), wire.pending
    assert len(site.engine.seen) <= 1, site.engine.seen


@every_route
async def test_close_in_a_second_field_is_kept(site, name):
    route, text = site.routes[name], site.text()
    wire = await site.open()
    await wire.send(site.request(route, text, fields=b"Connection: keep-alive\r\nConnection: close\r\n"))
    answer = await wire.last()
    site.answers(route, text, answer)
    assert answer.closes, answer


@every_route
async def test_an_old_client_gets_one_answer_that_it_can_read(site, name):
    """RFC 9112 §6.1, §9.3: no chunks, no host needed, and the end of the connection after it."""
    route, text = site.routes[name], site.text()
    wire = await site.open()
    await wire.send(site.request(route, text, line=b"POST %b HTTP/1.0", host=b""))
    answer = await wire.last()
    site.answers(route, text, answer)
    assert not answer.all("transfer-encoding"), answer


@every_route
async def test_an_old_client_may_keep_its_connection(site, name):
    """Or not; but an answer without a length ends with the connection."""
    route, text = site.routes[name], site.text()
    wire = await site.open()
    keep = b"Connection: keep-alive\r\n"
    for _ in range(2):
        await wire.send(site.request(route, text, line=b"POST %b HTTP/1.0", fields=keep))
        answer = await wire.answer()
        site.answers(route, text, answer)
        assert not answer.all("transfer-encoding"), answer
        kept = "keep-alive" in [value.lower() for value in answer.all("connection")]
        if not kept:
            assert not await wire.rest()
            return
        assert answer.all("content-length"), answer


# HEAD, OPTIONS, and what every answer says.


async def asked(site, line, *, auth=None, fields=b""):
    auth = site.auth if auth is None else auth
    wire = await site.open()
    await wire.send(line.encode() + b" HTTP/1.1\r\nHost: h\r\n" + auth + fields + b"\r\n" + HEALTH)
    answer = await wire.answer(line.partition(" ")[0])
    if not answer.closes:
        await is_healthy(wire)
    wire.close()
    return answer


def models(site):
    return site.routes["chat"].path.removesuffix("chat/completions") + "models"


async def test_head_is_get_without_a_body(site):
    """RFC 9110 §9.3.2. Where GET changes something, such as taking a job, HEAD may be refused instead."""
    lb, run = site.routes["lb"].path, site.routes["run"].path.removesuffix("run")
    differ = []
    for path in ("/", "/health", "/nowhere", "/pilotlight/v1/endpoints", models(site), run + "health", lb):
        get, head = await asked(site, f"GET {path}"), await asked(site, f"HEAD {path}")
        assert not head.body
        if get.status != head.status and "HEAD" in ",".join(head.all("allow") or ["HEAD"]):
            differ.append(f"{path}: {get.status} and {head.status}")
    assert not differ, differ


async def test_head_and_get_alternate_on_a_connection(site):
    """On both sides of the gateway: what is known of one answer says nothing of the other."""
    for path in ("/health", models(site), site.routes["lb"].path):
        wire = await site.open()
        for method in ("GET", "HEAD", "GET", "GET", "HEAD", "HEAD", "GET"):
            await wire.send(f"{method} {path} HTTP/1.1\r\nHost: h\r\n".encode() + site.auth + b"\r\n")
            answer = await wire.answer(method)
            assert bool(answer.body) is (method == "GET"), (path, answer)


async def test_head_of_a_refusal_has_no_body(site):
    for name, auth in itertools.product(ROUTES, (None, b"", b"Authorization: Bearer no\r\n")):
        answer = await asked(site, f"HEAD {site.routes[name].path}", auth=auth)
        assert not answer.body


async def test_options_are_answered(site):
    for path in ("*", "/", "/nowhere", *(site.routes[name].path for name in ROUTES)):
        answer = await asked(site, f"OPTIONS {path}")
        assert answer.status < 500 or answer.status == 501, (path, answer)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
async def test_a_method_that_is_not_allowed_is_told_what_is(site, method):
    """RFC 9110 §15.5.6."""
    for name in ("run", "keys"):
        answer = await asked(site, f"{method} {site.routes[name].path}")
        assert answer.status == 405, (name, answer)
        assert "POST" in ",".join(answer.all("allow")), (name, answer)


@every_route
async def test_who_is_not_known_is_told_how_to_say_who_he_is(site, name):
    """RFC 9110 §15.5.2: 401 names a scheme."""
    for auth in (b"", b"Authorization: Bearer no\r\n", b"Authorization: Basic eDp5\r\n"):
        wire = await site.open()
        await wire.send(site.request(site.routes[name], site.text(), auth=auth))
        answer = await wire.answer()
        assert answer.status == 401, answer
        assert answer.all("www-authenticate"), answer
    assert not site.engine.seen


@every_route
async def test_every_answer_says_when_it_was_made_and_how_long_it_is(site, name):
    """RFC 9110 §6.6.1; one length or chunks, never both, and nothing is said twice."""
    route = site.routes[name]
    wire = await site.open()
    for text, auth in ((site.text(), None), (site.text(), b""), (site.text(), None)):
        await wire.send(site.request(route, text, auth=auth))
        answer = await wire.answer()
        assert len(answer.all("date")) == 1, answer
        assert len(answer.all("content-length")) + len(answer.all("transfer-encoding")) == 1, answer
        assert len(answer.all("content-type")) == 1, answer
        assert len(answer.all("connection")) <= 1, answer
        assert answer.version == "1.1"
        if answer.closes:
            wire = await site.open()


# Bodies on demand (RFC 9110 §10.1.1).


def expecting(site, route, text, **more):
    """Head and body of a request that waits for 100."""
    request = site.request(route, text, fields=b"Expect: 100-continue\r\n", **more)
    head, _, body = request.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", body


@every_route
async def test_a_client_that_waits_is_told_to_go_on(site, name):
    route = site.routes[name]
    wire = await site.open()
    for _ in range(3):
        text = site.text()
        head, body = expecting(site, route, text)
        await wire.send(head)
        await wire.has(b"\r\n\r\n")
        assert wire.pending.lower() == b"http/1.1 100 continue\r\n\r\n", wire.pending
        assert not site.engine.seen
        await wire.send(body)
        answer = await wire.answer()
        assert answer.interim == [100]
        site.answers(route, text, answer)
        site.engine.reset()
    await site.serves(wire, route)


@every_route
async def test_a_client_that_waits_may_send_chunks(site, name):
    route, text = site.routes[name], site.text()
    body = route.body(text)
    fields = b"Expect: 100-CONTINUE\r\nTransfer-Encoding: chunked\r\n"
    wire = await site.open()
    await wire.send(b"POST %b HTTP/1.1\r\nHost: h\r\n%b%b\r\n" % (route.path.encode(), site.auth, fields))
    await wire.has(b"\r\n\r\n")
    await wire.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    answer = await wire.answer()
    assert answer.interim == [100]
    site.answers(route, text, answer)
    await site.serves(wire, route)


@every_route
async def test_a_client_that_does_not_wait_after_all_is_served(site, name):
    route, text = site.routes[name], site.text()
    wire = await site.open()
    await wire.send(b"".join(expecting(site, route, text)))
    answer = await wire.answer()
    assert answer.interim in ([], [100])
    site.answers(route, text, answer)
    await site.serves(wire, route)


@every_route
async def test_an_old_client_is_told_nothing_in_between(site, name):
    route, text = site.routes[name], site.text()
    wire = await site.open()
    await wire.send(b"".join(expecting(site, route, text, line=b"POST %b HTTP/1.0")))
    answer = await wire.last()
    assert answer.interim == []
    site.answers(route, text, answer)


@every_route
@pytest.mark.parametrize("why", ["key", "endpoint", "length"])
async def test_a_client_that_waits_is_refused_before_it_sends(site, name, why):
    """It never sends a body for nothing; if the connection stays, the body may follow."""
    route, text = site.routes[name], site.text()
    statuses = {"key": {401}, "endpoint": {404, 401}, "length": {413, 400} if name == "run" else {413}}[why]
    head, body = expecting(
        site,
        route,
        text,
        auth=b"Authorization: Bearer no\r\n" if why == "key" else None,
        line=b"POST /v2/nowhere/openai/v1/completions HTTP/1.1" if why == "endpoint" else b"POST %b HTTP/1.1",
    )
    if why == "length":
        head = head.replace(b"Content-Length: %d" % len(body), b"Content-Length: 50000000")
    wire = await site.open()
    await wire.send(head)
    answer = await wire.answer()
    assert answer.interim == [], answer
    assert answer.status in statuses, answer
    if answer.closes:
        assert not await wire.rest()
    else:
        assert why != "length", "a body of 50 MB would have to be read to its end"
        await wire.send(body)
        await site.serves(wire, route)
    assert len(site.engine.begun) <= 1, site.engine.begun


async def test_nobody_waits_where_there_is_no_body(site):
    for path in ("/health", models(site), site.routes["lb"].path):
        answer = await asked(site, f"GET {path}", fields=b"Expect: 100-continue\r\n")
        assert answer.status == 200, answer


# Half-closed connections.


@every_route
async def test_a_client_that_says_no_more_gets_all_or_nothing(site, name):
    """It may have gone altogether, which looks the same."""
    route, text = site.routes[name], site.text()
    wire = await site.open()
    await wire.send(site.request(route, text))
    wire.half_close()
    with contextlib.suppress(ClosedError):
        site.answers(route, text, await wire.answer())
    assert not await wire.rest(), wire.pending
    await site.is_clean()


@every_route
async def test_half_a_request_of_a_half_closed_connection_is_none(site, name):
    route = site.routes[name]
    request = site.request(route, site.text())
    cuts = (
        1,
        request.index(b"Host"),
        request.index(b"\r\n\r\n") + 2,
        request.index(b"\r\n\r\n") + 4,
        len(request) - 1,
    )
    for warm, cut in itertools.product((False, True), cuts):
        wire = await (site.warm(route) if warm else site.open())
        site.engine.reset()
        await wire.send(request[:cut])
        wire.half_close()
        with contextlib.suppress(ClosedError):
            answer = await wire.answer()
            assert answer.status == 400, answer
        assert not await wire.rest(), wire.pending
        assert not site.engine.seen
        wire.close()
    await site.is_clean()


# What is passed on (RFC 9110 §7.6.1).


@pytest.mark.parametrize("name", ["chat", "stream", "lb"])
async def test_what_concerns_this_connection_only_is_not_passed_on(site, name):
    route, text = site.routes[name], site.text()
    fields = (
        b"Connection: X-Mine, Keep-Alive, TE\r\nX-Mine: 1\r\nKeep-Alive: timeout=5\r\nTE: trailers\r\n"
        b"Proxy-Connection: keep-alive\r\nX-Yours: 2\r\n"
    )
    wire = await site.open()
    await wire.send(site.request(route, text, fields=fields))
    site.answers(route, text, await wire.answer())
    (seen,) = site.engine.seen
    for gone in ("x-mine", "keep-alive", "te", "proxy-connection", "expect", "upgrade"):
        assert not seen.all(gone), (gone, seen)
    assert not any(b"x-mine" in value.lower() for value in seen.all("connection")), seen
    assert len(seen.all("host")) == 1, seen
    assert len(seen.all("content-length")) + len(seen.all("transfer-encoding")) == 1, seen


@pytest.mark.parametrize("name", ["chat", "stream", "lb"])
@pytest.mark.parametrize("named", [b"content-length", b"host, content-length", b"Transfer-Encoding, x"])
async def test_a_client_cannot_take_the_framing_away(site, name, named):
    route, text = site.routes[name], site.text()
    wire = await site.open()
    await wire.send(site.request(route, text, fields=b"Connection: " + named + b"\r\n"))
    site.answers(route, text, await wire.answer())
    await site.serves(wire, route)


@pytest.mark.parametrize("name", ["chat", "stream"])
async def test_the_clients_key_is_not_passed_on(site, name):
    await site.serves(await site.open(), site.routes[name])
    (seen,) = site.engine.seen
    assert site.key.encode() not in b"\n".join(value for _, value in seen.headers)


# Heads like earlier ones, which may be read by other code.


@every_route
async def test_a_request_may_be_cut_anywhere(site, name):
    route = site.routes[name]
    wire = await site.warm(route)
    size = len(site.request(route, site.text()))
    for cut in range(1, size, 3 if name == "keys" else 1):
        text = site.text()
        request = site.request(route, text)
        await wire.pieces(request[:cut], request[cut:])
        site.answers(route, text, await wire.answer())
        if cut % 10 == 0:
            await site.serves(wire, route)


@pytest.mark.parametrize("name", ["chat", "run", "lb"])
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(b"", id="chunks"),
        pytest.param(b"Connection: Upgrade\r\nUpgrade: h2c\r\n", id="upgrade"),
    ],
)
async def test_chunks_may_be_cut_anywhere(site, name, fields):
    """Also where an empty line ends the head, and within what looks like one in a chunk."""
    route = site.routes[name]
    wire = await site.open()
    for cut in itertools.count(1, 2):
        text = site.text()
        body = route.body(text).replace(b'": "', b'":\r\n\r\n"')
        request = b"POST %b HTTP/1.1\r\nHost: h\r\n%b%bTransfer-Encoding: chunked\r\n\r\n%b%b0\r\n\r\n" % (
            route.path.encode(), site.auth, fields, chunk(body[:20]) if body[20:] else b"", chunk(body[20:] or body),
        )  # fmt: skip
        if cut >= len(request):
            break
        await wire.pieces(request[:cut], request[cut:])
        site.answers(route, text, await wire.answer())


async def test_requests_in_single_bytes_are_answered_one_by_one(site):
    wire = await site.open()
    for name in ROUTES:
        route, text, other = site.routes[name], site.text(), site.text()
        body = route.body(text)
        request = b"POST %b HTTP/1.1\r\nHost: h\r\n%bTransfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n" % (
            route.path.encode(),
            site.auth,
            chunk(body),
        )
        data = request + site.request(route, other)
        await wire.pieces(*(data[place : place + 1] for place in range(len(data))))
        site.answers(route, text, await wire.answer())
        site.answers(route, other, await wire.answer())


@every_route
async def test_bodies_of_any_length_follow_the_same_fields(site, name):
    route = site.routes[name]
    wire = await site.warm(route)
    longest = 150 if name == "keys" else 60_000
    for size in (1, 9, 10, 11, 99, 100, 150, 1000, 16_000, 60_000, 7, 60_000, 1, 1):
        text = "x" * min(size, longest) + site.text()
        await wire.send(site.request(route, text))
        site.answers(route, text, await wire.answer())


async def test_fields_alternate_on_a_connection(site):
    """More of them than anybody would remember, again and again."""
    wire = await site.open()
    blocks = [b"X-A: %d\r\n" % number for number in range(20)]
    for fields, name in itertools.product(blocks * 2, ("chat", "run", "lb")):
        route, text = site.routes[name], site.text()
        await wire.send(site.request(route, text, fields=fields))
        site.answers(route, text, await wire.answer())
    route, text = site.routes["lb"], site.text()
    await wire.send(site.request(route, text, fields=b"X-A: last\r\n"))
    site.answers(route, text, await wire.answer())
    assert site.engine.seen[-1].all("x-a") == [b"last"]


@every_route
@pytest.mark.parametrize("flip", [0x01, 0x20])
async def test_a_head_that_differs_in_one_bit_is_read_like_the_first_of_a_connection(site, name, flip):
    """Two connections, one of them warm, are asked the same and answer the same."""
    route, text = site.routes[name], site.text()
    request = site.request(route, text)
    length = request.index(b"Content-Length: ") + len(b"Content-Length: ")
    digits = range(length, request.index(b"\r", length))
    last = site.request(route, text, fields=b"Connection: close\r\n")
    head = request.index(b"\r\n\r\n") + 4
    differ = []
    # What makes a key takes time; the head of a stream is that of a chat.
    step = 5 if name in {"keys", "stream"} else 1
    for place in sorted(set(range(0, head, step)) - set(digits)):
        broken = bytearray(request)
        broken[place] ^= flip
        told = []
        for wire in (await site.open(), await site.warm(route)):
            await wire.send(bytes(broken) + last)
            statuses = [
                line[9:12] for line in (await wire.rest()).split(b"\r\n") if line.startswith(b"HTTP/1.")
            ]
            told.append(statuses)
            wire.close()
        if told[0] != told[1]:
            differ.append((bytes(broken[max(0, place - 20) : place + 20]), told))
    assert not differ, differ


async def test_another_key_among_the_same_fields_is_another_key(site):
    for name in ROUTES:
        route = site.routes[name]
        wire = await site.warm(route)
        wrong = site.auth[:-3] + (b"x" if site.auth[-3:-2] != b"x" else b"y") + b"\r\n"
        await wire.send(site.request(route, site.text(), auth=wrong))
        assert (await wire.answer()).status == 401
    seen = len(site.engine.seen)
    await until(lambda: len(site.engine.seen) == seen, "nothing more")
