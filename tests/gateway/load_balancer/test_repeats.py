"""Which requests reach a worker twice: those that an old connection swallowed, and no others.

serverless-api.md §3 has no retry; a GET or OPTIONS may be sent again when the worker closed an idle connection
in the moment in which it was used (RFC 9112 §9.3.1).
"""

from __future__ import annotations

import functools

import aiohttp
import pytest

ID = "lbendpoint1234"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
STAY, CLOSE = True, False


class Counting:
    """Counts connections and requests; answers each request with the next bytes, then stays or closes."""

    def __init__(self, *script):
        self.script = list(script)
        self.connections = 0
        self.requests = []

    async def serve(self, reader, writer):
        self.connections += 1
        while head := await reader.readuntil(b"\r\n\r\n"):
            self.requests.append(head.split(b" ", 1)[0])
            answer, stays = self.script.pop(0)
            writer.write(answer)
            if not stays:
                writer.close()
                return


async def follow(balanced, *script):
    """Start a worker that follows a script."""
    worker = Counting(*script)
    await balanced.raw_worker(worker.serve)
    # However slowly this test runs, what was kept is used.
    balanced.balancer.pool._idle_s = 60
    return worker


@pytest.fixture
def counting(balanced):
    """Start a worker that follows a script: `await counting((bytes, STAY or CLOSE), …)`."""
    return functools.partial(follow, balanced)


async def status_of(balanced, method="GET", **more):
    async with balanced.ask(method, **more) as answer:
        await answer.read()
        return answer.status


@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
async def test_a_request_that_an_old_connection_swallowed_is_sent_once_more(balanced, counting, method):
    worker = await counting((OK, STAY), (b"", CLOSE), (OK, STAY))
    assert await status_of(balanced, method) == 200
    assert await status_of(balanced, method) == 200
    assert (len(worker.requests), worker.connections) == (3, 2)


async def test_it_is_not_sent_a_third_time(balanced, counting):
    worker = await counting((OK, STAY), (b"", CLOSE), (b"", CLOSE), (OK, STAY))
    assert await status_of(balanced) == 200
    assert await status_of(balanced) == 502
    assert (len(worker.requests), worker.connections) == (3, 2)


BEGUN = [
    b"H",
    b"HTTP/1.1 200 OK\r\ncontent-le",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n",
    b"no HTTP at all\r\n\r\n",
]


@pytest.mark.parametrize("begun", BEGUN)
async def test_one_byte_of_an_answer_and_it_is_not_sent_again(balanced, counting, begun):
    """The worker has it, and may have done what it asks for."""
    worker = await counting((OK, STAY), (begun, CLOSE), (OK, STAY))
    assert await status_of(balanced) == 200
    assert await status_of(balanced) == 502
    assert (len(worker.requests), worker.connections) == (2, 1)


async def test_an_answer_that_breaks_off_in_its_body_is_not_asked_for_again(balanced, counting):
    worker = await counting(
        (OK, STAY), (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", CLOSE), (OK, STAY)
    )
    assert await status_of(balanced) == 200
    with pytest.raises(aiohttp.ClientPayloadError):
        await status_of(balanced)
    assert (len(worker.requests), worker.connections) == (2, 1)


@pytest.mark.parametrize("begun", [b"", *BEGUN])
async def test_a_new_connection_that_breaks_is_the_end_of_it(balanced, counting, begun):
    worker = await counting((begun, CLOSE), (OK, STAY))
    assert await status_of(balanced) == 502
    assert (len(worker.requests), worker.connections) == (1, 1)


async def test_a_connection_that_is_closed_at_once_is_502(balanced):
    async def refuse(reader, writer):
        writer.close()

    await balanced.raw_worker(refuse)
    assert await status_of(balanced) == 502


async def test_silence_on_an_old_connection_is_504_and_not_asked_again(make_balanced):
    balanced = await make_balanced(request_s=1)
    worker = await follow(balanced, (OK, STAY), (b"", STAY), (OK, STAY))
    assert await status_of(balanced) == 200
    assert await status_of(balanced) == 504
    assert (len(worker.requests), worker.connections) == (2, 1)


@pytest.mark.parametrize(
    ("method", "body"), [("POST", None), ("PUT", b"x"), ("PATCH", b"x"), ("DELETE", None), ("GET", b"x")]
)
async def test_what_may_not_be_sent_twice_never_meets_an_old_connection(balanced, counting, method, body):
    worker = await counting((OK, STAY), (b"", CLOSE), (OK, STAY))
    assert await status_of(balanced) == 200
    assert await status_of(balanced, method, data=body) == 502
    assert worker.requests == [b"GET", method.encode()]
    assert worker.connections == 2
