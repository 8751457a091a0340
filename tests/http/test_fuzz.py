"""Ten thousand broken requests, from fixed seeds: no crash, no leak, no hang, and everybody else is served."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re

import pytest

from .engine import chunk

pytestmark = pytest.mark.asyncio(loop_scope="module")

INPUTS = 1000
"""Per seed; there are ten seeds."""

AT_ONCE = 40

TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b",", b"\r\n\r\n", b"\xff", b"\x80", b"0", b"-1", b"+",
    b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"GET ", b"HEAD ", b"POST ", b"OPTIONS * ", b"CONNECT h:1 ",
    b"Host: i\r\n", b"Content-Length: 0\r\n", b"Content-Length: 5\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n", b"Connection: close\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"Expect: 100-continue\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n",
    b"ffffffffffffffff\r\n", b"//", b"/../", b"%00", b"%2f", b"?", b"#", b"http://h", b"{", b"[", b'"', b'"stream":true,',
]  # fmt: skip


def corpus(site):
    """Correct requests of every road, in every form."""
    requests = [b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n", b"HEAD / HTTP/1.0\r\n\r\n"]
    for route in site.routes.values():
        text = "fuzz"
        requests.append(site.request(route, text))
        requests.append(site.request(route, text, fields=b"Connection: close\r\n"))
        requests.append(site.request(route, text, fields=b"Expect: 100-continue\r\nX-A: 1\r\n"))
        requests.append(site.request(route, text, auth=b"Authorization: Bearer no\r\n"))
        body = route.body(text)
        requests.append(
            b"POST %b HTTP/1.1\r\nHost: h\r\n%bTransfer-Encoding: chunked\r\n\r\n"
            % (route.path.encode(), site.auth)
            + chunk(body[:3])
            + chunk(body[3:])
            + b"0\r\n\r\n"
        )
    return requests


def mutated(data, chance, others):
    """The bytes after one to five random changes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 5)):
        place = chance.randrange(len(changed) + 1)
        end = min(len(changed), place + chance.choice((1, 1, 2, 8, 64)))
        match chance.randrange(9):
            case 0 if place < len(changed):
                changed[place] ^= 1 << chance.randrange(8)
            case 1 if place < len(changed):
                changed[place] = chance.randrange(256)
            case 2:
                del changed[place:end]
            case 3:
                changed[place:place] = changed[place:end]
            case 4:
                changed[place:end] = chance.choice(TOKENS)
            case 5:
                del changed[place:]
            case 6:
                other = chance.choice(others)
                changed[place:] = other[chance.randrange(len(other)) :]
            case 7:
                lines = bytes(changed).split(b"\r\n")
                chance.shuffle(lines)
                changed = bytearray(b"\r\n".join(lines))
            case _:
                changed[place:place] = chance.choice(TOKENS)
    return bytes(changed)


def inputs(site, seed):
    chance = random.Random(seed)
    seeds = corpus(site)
    for number in range(INPUTS):
        if number % 20 == 0:
            yield chance.randbytes(chance.choice((1, 16, 300, 5000)))
        elif number % 5 == 0:
            yield mutated(chance.choice(seeds) + chance.choice(seeds), chance, seeds)
        else:
            yield mutated(chance.choice(seeds), chance, seeds)


@pytest.mark.parametrize("seed", range(10))
async def test_nothing_that_can_be_sent_breaks_the_server(site, seed):
    chance = random.Random(-seed)
    waiting = iter(list(inputs(site, seed)))
    strange = []

    async def send_all():
        for data in waiting:
            wire = await site.open()
            whole = chance.random() < 0.5
            middle = chance.randrange(len(data) + 1)
            await (wire.send(data) if whole else wire.pieces(data[:middle], data[middle:]))
            if chance.random() < 0.1:
                wire.reset()
                continue
            if chance.random() < 0.3:
                # What may go on without the end of the connection gets some time to.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await wire.receive()
            wire.half_close()
            told = await wire.rest()
            wire.close()
            statuses = re.findall(rb"^HTTP/1\.1 (\d\d\d) ", told, re.MULTILINE)
            if (told and not told.startswith(b"HTTP/1.1 ")) or b"500" in statuses:
                strange.append((data, told[:300]))

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(send_all())
    assert not strange, strange[:3]
    await site.all_work()
    await site.is_clean()
