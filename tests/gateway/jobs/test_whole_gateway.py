"""The job road as a part of the whole gateway: whose a request is, and the end (serverless-api.md §1, §2.1)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest

from pilotlight.domain.endpoint import RESERVED_ENDPOINT_IDS, EndpointKind
from pilotlight.gateway.app import Gateway
from pilotlight.gateway.asgi import send_json
from pilotlight.gateway.key_limits import KeyLimits
from pilotlight.gateway.load_balancer import LoadBalancer
from pilotlight.settings import LoadBalancerSettings
from pilotlight.system import SystemClock

from .conftest import ADMIN, ENDPOINT, Platform, job_openai, serving


class NeverError(Exception):
    """What requests that are held would fail with."""


@dataclass
class Whole:
    """A gateway around a platform; its management API answers with the path that reached it."""

    app: Gateway
    client: httpx.AsyncClient

    async def ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {ADMIN}"}
        return await self.client.request(method, path, headers=headers, **arguments)


@pytest.fixture
async def whole(platform: Platform) -> AsyncIterator[Whole]:
    async def management(scope: Any, receive: Any, send: Any) -> None:
        await send_json(send, 200, msgspec.json.encode({"managed": scope["path"]}))

    road = job_openai(platform)
    app = Gateway(
        data_path=None,
        openai=road,
        serves_directly=lambda _: False,
        jobs=platform.app,
        management=management,
        balancer=LoadBalancer(
            directory=platform.directory,
            slots=platform.slots,
            fleet=platform.fleet,
            outlook=platform.outlook,
            clock=platform.clock,
            settings=LoadBalancerSettings(),
            entropy=bytes,
            record=platform.records.append,
            key_limits=KeyLimits(SystemClock()),
            start_failed=NeverError,
        ),
    )
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=50) as client:
        yield Whole(app, client)


@pytest.mark.parametrize("word", sorted(RESERVED_ENDPOINT_IDS))
async def test_reserved_words_are_routed_first(whole, word):
    """§1, §13 item 16: below them everything is REST v2's, also what looks like a job."""
    for method, path in (
        ("GET", ""),
        ("GET", "/x"),
        ("GET", "/health"),
        ("POST", "/run"),
        ("POST", "/x/run"),
    ):
        answer = await whole.ask(method, f"/v2/{word}{path}")
        assert (answer.status_code, answer.json()) == (200, {"managed": f"/v2/{word}{path}"})


async def test_any_other_word_is_an_endpoint(whole):
    """§1."""
    assert (await whole.ask("GET", f"/v2/{ENDPOINT}/health")).status_code == 200
    answer = await whole.ask("GET", "/v2/serverless1/health")
    assert (answer.status_code, answer.json()["error"]) == (404, "endpoint not found")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "//v1//models//", "/v1/models/?x=1"])
async def test_slashes_of_openai_routes(platform, whole, path):
    """§2.1: doubled and trailing ones are ignored, and workers see neither."""
    await platform.reshape(kind=EndpointKind.QUEUE)
    platform.fleet.add(capacity=1)
    call = asyncio.create_task(whole.ask("GET", f"/v2//{ENDPOINT}/openai{path}"))
    job = (await platform.take()).json()
    assert job["input"] == {"openai_route": "/v1/models"}
    await platform.done(job["id"], {"output": {"data": []}})
    assert (await call).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/run"), ("POST", "/runsync"), ("GET", "/status/x"), ("GET", "/status-sync/x"),
        ("GET", "/stream/x"), ("POST", "/cancel/x"), ("POST", "/retry/x"), ("POST", "/purge-queue"),
        ("GET", "/health"), ("GET", "/requests"), ("POST", "/batch"), ("GET", "/batch/x"),
    ],
)  # fmt: skip
async def test_a_gateway_that_stops_refuses_in_the_words_of_the_route(whole, method, path):
    """§2.14: `{"error", "detail"}`, never a `status`; with Retry-After. Also on a connection in use, on which
    requests like earlier ones need no parser."""
    for _ in range(2):
        assert (await whole.ask(method, f"/v2/{ENDPOINT}{path}?wait=1000", content=b"{}")).status_code != 503
    whole.app.closing = True
    for _ in range(2):
        answer = await whole.ask(method, f"/v2/{ENDPOINT}{path}?wait=1000", content=b"{}")
        text = "the gateway is stopping"
        assert (answer.status_code, answer.json()) == (503, {"error": text, "detail": text})
        assert answer.headers["retry-after"] == "5"


async def test_a_gateway_that_stops_tells_openais_clients_in_theirs(whole):
    """§2.14, §2.15: an error object, as everywhere on these routes."""
    whole.app.closing = True
    answer = await whole.ask("POST", f"/v2/{ENDPOINT}/openai/v1/chat/completions", json={})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["message"] == "the gateway is stopping"
    assert "detail" not in answer.json()


async def test_workers_may_post_while_the_gateway_stops(platform, whole):
    """worker-protocol.md §7.2: their results would be lost."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    await platform.take()
    whole.app.closing = True
    answer = await whole.client.post(
        f"/v2/{ENDPOINT}/job-done/w1/{job_id}?gpu=x",
        json={"output": 1},
        headers={"authorization": "secret-w1"},
    )
    assert answer.status_code == 200
    assert (await platform.status(job_id))["status"] == "COMPLETED"
