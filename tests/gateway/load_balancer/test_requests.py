"""Requests through the load balancer (serverless-api.md §3): what passes, what is limited, what is refused.

A bare § is one of serverless-api.md.
"""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web

from pilotlight.domain.endpoint import EndpointKind
from pilotlight.domain.key import Priority, Scope
from pilotlight.settings import LoadBalancerSettings

ID = "lbendpoint1234"


async def echo(request):
    return web.json_response(
        {
            "method": request.method,
            "path": request.raw_path,
            "headers": {name.lower(): value for name, value in request.headers.items()},
            "body": (await request.read()).decode(),
        },
        headers={"X-Own": "kept", "Keep-Alive": "timeout=5", "X-Runpod-Worker-Id": "forged"},
    )


def text(content):
    async def answer(_):
        return web.Response(text=content)

    return answer


def test_limits_are_those_of_the_contract():
    """§3: 2 min for a worker, 5 for a pinned one, 5.5 for a request, 30 MB both ways, 8 min unhealthy."""
    settings = LoadBalancerSettings()
    assert (settings.wait_s, settings.pinned_wait_s, settings.request_s) == (120, 300, 330)
    assert (settings.body_bytes, settings.response_bytes) == (30 * 1_048_576, 30 * 1_048_576)
    assert settings.unhealthy_s == 480


async def test_a_key_may_have_limits_of_its_own(balanced):
    """A request counts as one that is under way until its answer is complete."""
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def slow(_):
        arrived.set()
        await go_on.wait()
        return web.Response(text="done")

    await balanced.worker("w1", slow)
    (key,) = [key for key in await balanced.store.keys() if key.scope is Scope.RUN]
    await balanced.store.update_key(replace(key, concurrent_max=1, priority=Priority.HIGH))
    await balanced.directory.refresh()
    first = asyncio.create_task(balanced.client.get(f"{balanced.url}/lb/{ID}/x"))
    await arrived.wait()
    async with balanced.client.get(f"{balanced.url}/lb/{ID}/x") as refused:
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert "1 requests at once" in (await refused.json())["error"]
    go_on.set()
    async with await first as answer:
        assert await answer.text() == "done"
    async with balanced.client.get(f"{balanced.url}/lb/{ID}/x") as answer:
        assert answer.status == 200


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_verb_path_query_headers_and_body_arrive_unchanged(balanced, method):
    """§3: but for hop-by-hop headers; every response names its worker, whatever that says itself."""
    await balanced.worker("w1", echo)
    body = "" if method in {"GET", "OPTIONS"} else "hällo"
    async with balanced.client.request(
        method,
        f"{balanced.url}/lb/{ID}//a%2Fb/./c?x=%20y&x=2",
        data=body or None,
        headers={"X-Mine": "1", "Connection": "X-Hop, keep-alive", "X-Hop": "no", "TE": "trailers"},
    ) as answer:
        seen = await answer.json()
        assert answer.status == 200
        assert answer.headers["X-Own"] == "kept"
        assert "Keep-Alive" not in answer.headers
        assert answer.headers.getall("X-Runpod-Worker-Id") == ["w1"]
        assert len(answer.headers.getall("Date")) == 1
    assert (seen["method"], seen["body"]) == (method, body)
    assert seen["path"].endswith("?x=%20y&x=2")
    assert seen["headers"]["x-mine"] == "1"
    assert not {"x-hop", "te"} & seen["headers"].keys()
    assert seen["headers"]["host"] == balanced.url.removeprefix("http://")
    assert seen["headers"]["x-forwarded-for"] == "127.0.0.1"
    assert seen["headers"]["x-forwarded-proto"] == "http"
    assert seen["headers"]["x-forwarded-prefix"] == f"/lb/{ID}"


async def test_path_and_query_are_not_normalised(balanced):
    """§3. Aiohttp's client would do it before us, so the request is written by hand."""
    await balanced.worker("w1", echo)
    reader, writer = await asyncio.open_connection(*balanced.url.removeprefix("http://").split(":"))
    writer.write(
        f"GET /lb/{ID}//a%2Fb/../c?x=%20y HTTP/1.1\r\nHost: h\r\nAuthorization: rpa_RUN\r\n"
        "Connection: close\r\n\r\n".encode()
    )
    answer = await reader.read()
    assert b'"path": "//a%2Fb/../c?x=%20y"' in answer
    writer.close()


@pytest.mark.parametrize(
    "headers",
    [{"authorization": "Bearer rpa_RUN"}, {"authorization": "rpa_RUN"}, {"authorization": "bearer  rpa_RUN"}],
)
async def test_a_key_may_come_in_any_of_its_forms(balanced, headers):
    """§3, §2.1: as on the data plane, the bare form, too; it reaches the worker as it came."""
    await balanced.worker("w1", echo)
    async with balanced.ask(headers=headers) as answer:
        assert answer.status == 200
        assert (await answer.json())["headers"]["authorization"] == headers["authorization"]


async def test_the_callers_key_is_forwarded_unless_the_endpoint_says_no(balanced):
    """§3, §12 item 39: forwarded by default, so that user servers can inspect it."""
    await balanced.worker("w1", echo)
    async with balanced.ask() as answer:
        assert (await answer.json())["headers"]["authorization"] == "Bearer rpa_RUN"
    await balanced.deploy("secretive12345", FORWARD_AUTHORIZATION="false")
    await balanced.worker("w2", echo, endpoint_id="secretive12345")
    async with balanced.client.get(
        f"{balanced.url}/lb/secretive12345/", headers={"authorization": "Bearer rpa_ADMIN"}
    ) as answer:
        assert "authorization" not in (await answer.json())["headers"]


async def test_a_host_named_after_the_endpoint_needs_no_prefix(balanced):
    """§3: https://{endpoint_id}.HOST/{path}."""
    await balanced.worker("w1", echo)
    async with balanced.client.get(f"{balanced.url}/v2/x", headers={"host": f"{ID}.example.org"}) as answer:
        seen = await answer.json()
    assert seen["path"] == "/v2/x"
    assert seen["headers"]["host"] == f"{ID}.example.org"
    assert "x-forwarded-prefix" not in seen["headers"]
    async with balanced.client.get(
        f"{balanced.url}/health", headers={"host": "unknown1234567.example.org"}
    ) as answer:
        assert await answer.json() == {"status": "ok"}, "any other host is the gateway's own"


@pytest.mark.parametrize("kind", [EndpointKind.QUEUE, EndpointKind.VLLM])
@pytest.mark.parametrize("path", ["/", "/foo", "/health", "/v2/queueendpoint1/run"])
async def test_a_host_named_after_a_queue_endpoint_is_refused(balanced, kind, path):
    """§3, §2.14: 400 `not allowed for QB API`, and not what the gateway has at that path itself."""
    await balanced.deploy("queueendpoint1", kind)
    headers = {"host": "queueendpoint1.example.org", "authorization": "Bearer rpa_ADMIN"}
    # The second one needs no parser.
    for _ in range(2):
        async with balanced.client.get(balanced.url + path, headers=headers) as answer:
            assert (answer.status, await answer.json()) == (400, {"error": "not allowed for QB API"})
    assert not balanced.waiting.is_set()


async def test_a_host_named_after_a_queue_endpoint_tells_strangers_nothing(balanced):
    """§10: 401 before anything is said of an endpoint."""
    await balanced.deploy("queueendpoint1", EndpointKind.QUEUE)
    headers = {"host": "queueendpoint1.example.org", "authorization": "Bearer rpa_WRONG"}
    async with balanced.client.get(f"{balanced.url}/foo", headers=headers) as answer:
        assert (answer.status, await answer.json()) == (401, {"error": "unauthorized"})


async def test_head_has_the_length_and_no_body(balanced):
    await balanced.worker("w1", text("x" * 1000))
    for _ in range(2):
        async with balanced.ask("HEAD") as answer:
            assert (answer.status, answer.headers["content-length"], await answer.read()) == (
                200,
                "1000",
                b"",
            )


async def test_bodies_stream_both_ways_at_once(balanced):
    """§3: without buffering. The worker answers each piece when it comes; nobody waits for the other's end."""

    async def upper(request):
        answer = web.StreamResponse()
        await answer.prepare(request)
        async for piece in request.content.iter_any():
            await answer.write(piece.upper())
        return answer

    await balanced.worker("w1", upper)
    first, pieces = asyncio.Event(), []

    async def body():
        yield b"one "
        await first.wait()
        yield b"two"

    async with balanced.ask("POST", data=body()) as answer:
        async for piece in answer.content.iter_any():
            pieces.append(piece)
            first.set()
    assert b"".join(pieces) == b"ONE TWO"
    assert pieces[0] == b"ONE "


async def test_a_large_body_and_a_large_answer_pass_whole(balanced):
    async def swap(request):
        return web.Response(body=(await request.read())[::-1])

    await balanced.worker("w1", swap)
    payload = bytes(range(256)) * 40_000
    async with balanced.ask("POST", data=io.BytesIO(payload)) as answer:
        assert await answer.read() == payload[::-1]


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_413(make_balanced, announced):
    """§3: 413 payload too large, whether its length was announced or found out."""
    balanced = await make_balanced(body_bytes=100_000)
    await balanced.worker("w1", echo)

    async def pieces():
        for _ in range(20):
            yield b"x" * 10_000

    async with balanced.ask("POST", data=b"x" * 200_000 if announced else pieces()) as answer:
        assert (answer.status, await answer.json()) == (413, {"error": "payload too large"})
    assert balanced.slots.worker("w1").occupied == 0


async def test_an_answer_over_the_limit_is_cut_and_stays_incomplete(make_balanced):
    """§3: 30 MB of response; the status has been sent by then."""
    balanced = await make_balanced(response_bytes=100_000)

    async def endless(request):
        answer = web.StreamResponse()
        await answer.prepare(request)
        for _ in range(100):
            await answer.write(b"x" * 10_000)
        return answer

    await balanced.worker("w1", endless)
    async with balanced.ask() as answer:
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()
    assert balanced.rows[-1].outcome == "failed"


async def test_an_announced_answer_over_the_limit_is_502(make_balanced):
    """§3."""
    balanced = await make_balanced(response_bytes=1000)
    await balanced.worker("w1", text("x" * 1001))
    async with balanced.ask() as answer:
        assert (answer.status, await answer.json()) == (502, {"error": "bad gateway"})


async def test_no_routable_worker_in_time_is_400(make_balanced):
    """§3: `no workers available`; waiting is demand, which starts one."""
    balanced = await make_balanced(wait_s=1)
    balanced.estimate_ms = 21_400
    async with balanced.ask() as answer:
        assert (answer.status, await answer.json()) == (400, {"error": "no workers available"})
        assert answer.headers["retry-after"] == "22"
    assert balanced.waiting.is_set()
    assert balanced.rows[-1].outcome == "expired"


async def test_an_endpoint_that_gives_up_starting_tells_those_who_wait(balanced):
    asking = asyncio.create_task(balanced.client.get(f"{balanced.url}/lb/{ID}/"))
    await balanced.waiting.wait()
    balanced.slots.fail_held(ID, balanced.start_failed("no"), retry_ms=balanced.clock.now_ms() + 60_000)
    async with await asking as answer:
        assert (answer.status, await answer.json()) == (400, {"error": "no workers available"})
    async with balanced.ask() as answer:
        assert (answer.status, await answer.json()) == (400, {"error": "no workers available"})
        assert int(answer.headers["retry-after"]) > 0


async def test_a_request_waits_for_a_worker_and_then_reaches_it(balanced):
    asking = asyncio.create_task(balanced.client.post(f"{balanced.url}/lb/{ID}/x", data="hello"))
    await balanced.waiting.wait()
    await balanced.worker("w1", echo)
    async with await asking as answer:
        assert (await answer.json())["body"] == "hello"


async def test_a_refused_connection_is_502(balanced):
    """§3: 502 `bad gateway`, with the worker's name."""
    balanced.unreachable("w1")
    async with balanced.ask() as answer:
        assert (answer.status, await answer.json()) == (502, {"error": "bad gateway"})
        assert answer.headers["X-Runpod-Worker-Id"] == "w1"
    assert not balanced.slots.worker("w1").takes_requests


async def test_a_connection_that_breaks_before_the_answer_is_502_and_not_tried_again(balanced):
    """§3: no queue, no retry."""
    calls = []

    async def vanish(request):
        calls.append(await request.read())
        request.transport.abort()

    await balanced.worker("w1", vanish)
    async with balanced.ask("POST", data="once") as answer:
        assert (answer.status, await answer.json()) == (502, {"error": "bad gateway"})
    assert calls == [b"once"]
    assert balanced.slots.worker("w1").occupied == 0


async def test_a_request_over_its_time_is_504(make_balanced):
    """§3: 504 `request timeout`, with the worker's name, as every response has it."""
    balanced = await make_balanced(request_s=1)

    async def never(_):
        await asyncio.Event().wait()

    await balanced.worker("w1", never)
    async with balanced.ask("POST", data="x") as answer:
        assert (answer.status, await answer.json()) == (504, {"error": "request timeout"})
        assert answer.headers["X-Runpod-Worker-Id"] == "w1"
    assert balanced.slots.worker("w1").occupied == 0


@pytest.mark.parametrize(
    ("path", "key", "status", "error"),
    [
        (f"/lb/{ID}/", "", 401, "unauthorized"),
        (f"/lb/{ID}/", "rpa_WRONG", 401, "unauthorized"),
        ("/lb/queueendpoint1/x", "rpa_ADMIN", 400, "not allowed for QB API"),
        ("/lb/otherbalancer1/x", "rpa_RUN", 403, "access denied"),
        ("/lb/nothing1234567/x", "rpa_ADMIN", 404, "endpoint not found"),
    ],
)
async def test_what_is_refused_reaches_no_worker(balanced, path, key, status, error):
    """§3: the table of answers; §10 for the rest."""
    await balanced.deploy("queueendpoint1", EndpointKind.QUEUE)
    await balanced.deploy("otherbalancer1")
    headers = {"authorization": f"Bearer {key}"} if key else {"authorization": ""}
    async with balanced.client.get(balanced.url + path, headers=headers) as answer:
        assert (answer.status, await answer.json()) == (status, {"error": error})
    assert not balanced.waiting.is_set()


async def test_a_client_that_leaves_ends_its_request_at_the_worker(balanced):
    begun, ended = asyncio.Event(), asyncio.Event()

    async def slow(request):
        answer = web.StreamResponse()
        await answer.prepare(request)
        try:
            while True:
                await answer.write(b"x" * 1000)
                begun.set()
                await asyncio.sleep(0.01)
        finally:
            ended.set()

    await balanced.worker("w1", slow)
    answer = await balanced.client.get(f"{balanced.url}/lb/{ID}/")
    await begun.wait()
    answer.close()
    await asyncio.wait_for(ended.wait(), 20)
    async with asyncio.timeout(20):
        while balanced.slots.worker("w1").occupied or not balanced.rows:
            await asyncio.sleep(0.01)
    assert balanced.rows[-1].outcome == "disconnected"


async def test_a_client_that_leaves_while_it_waits_frees_its_place(balanced):
    asking = asyncio.create_task(balanced.client.get(f"{balanced.url}/lb/{ID}/"))
    await balanced.waiting.wait()
    asking.cancel()
    async with asyncio.timeout(20):
        while (await balanced.slots.traffic(ID, overdue_before_ms=0)).held:
            await asyncio.sleep(0.01)


async def test_every_request_leaves_a_row(balanced):
    await balanced.worker("w1", echo)
    async with balanced.ask("GET", "/some/path?secret=1"):
        pass
    async with asyncio.timeout(20):
        while not balanced.rows:
            await asyncio.sleep(0.01)
    (row,) = balanced.rows
    assert (row.route, row.status, row.outcome, row.worker_id) == ("/some/path", 200, "ok", "w1")
