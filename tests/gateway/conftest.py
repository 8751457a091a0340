"""The data path behind a real Uvicorn, in front of a scripted engine on a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json

import httpx
import pytest
import uvicorn
from aiohttp import web

from pilotlight.core.admission import AdmissionLimits
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.key import ApiKey, Scope, hash_secret
from pilotlight.domain.worker import Address, Registration
from pilotlight.gateway.app import Gateway
from pilotlight.gateway.data_path import DataPath, StartFailedError
from pilotlight.gateway.data_path.desk import LocalDesk
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.key_limits import KeyLimits
from pilotlight.gateway.load_balancer import LoadBalancer
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.protocol import GatewayProtocol
from pilotlight.gateway.slots import SlotTable
from pilotlight.gateway.upstream import UpstreamPool
from pilotlight.ports.fleet import Health
from pilotlight.settings import LimitSettings, LoadBalancerSettings
from pilotlight.stores.memory import MemoryStore
from pilotlight.system import SystemClock

from ..timeouts import UvLoop  # noqa: TID252

ADMIN, RUN, OTHER, BEAT = "rpa_ADMIN", "rpa_RUN", "rpa_OTHER", "rpa_BEAT"


def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": UvLoop}


class Engine:
    """Answers like vLLM; `script` replaces the answer of a route by a handler of aiohttp's."""

    def __init__(self):
        self.requests = []
        self.script = {}
        self.aborted = asyncio.Event()
        self.started = asyncio.Event()

    async def handle(self, request):
        body = await request.read()
        self.requests.append((request.method, request.path_qs, dict(request.headers), body))
        handler = self.script.get(request.path)
        if handler is not None:
            return await handler(request, body)
        if json.loads(body or b"{}").get("stream"):
            return await self.stream(request, json.loads(body))
        answer = {
            "id": "x", "choices": [{"message": {"content": "hi"}}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 2},
        }  # fmt: skip
        return web.json_response(answer)

    async def stream(self, request, body, *, events=3, then=None):
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            for number in range(events):
                await response.write(b'data: {"choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % number)
                self.started.set()
            if then is not None:
                await then(request)
            if (body.get("stream_options") or {}).get("include_usage"):
                await response.write(
                    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\n\n'
                )
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.aborted.set()
            raise
        return response


class IdleFleet:
    """A fleet of the workers it is given (port `Fleet`); only what the data path asks."""

    def __init__(self):
        self.state = Health()
        self.living = []
        self.steps = ()

    def health(self, endpoint_id):
        return self.state

    def workers(self, endpoint_id):
        return self.living

    def stages(self, worker_id):
        return self.steps


class NotHere:
    """Stands for a part of the gateway that is not under test."""

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def serve_whole(self, request, connection, gone):
        return None


class Rig:
    """Everything around one data path."""

    def __init__(self, folder):
        self.clock = SystemClock()
        self.engine = Engine()
        self.fleet = IdleFleet()
        self.estimate_ms, self.rung = None, None
        self.outlook = Outlook(
            fleet=self.fleet,
            clock=self.clock,
            estimate=lambda _: self.estimate_ms,
            rung=lambda _: self.rung,
        )
        self.records = []
        self.limits = LimitSettings(hold_requests=2, hold_bytes=10_000, body_bytes=5_000, hold_s=30)
        self.slots = SlotTable(self.clock, AdmissionLimits(requests=2, bytes=10_000))
        self.pool = UpstreamPool(idle_s=60)
        self.store = MemoryStore()
        self.directory = Directory(self.store)
        self.address = Address(url=f"unix:{folder}/engine", key="engine-key")
        self.recorded = asyncio.Event()
        counter = itertools.count(1)
        self.key_limits = KeyLimits(self.clock)
        self.desk = LocalDesk(
            directory=self.directory,
            slots=self.slots,
            key_limits=self.key_limits,
            fleet=self.fleet,
            outlook=self.outlook,
            limits=self.limits,
        )
        self.data_path = data_path = DataPath(
            directory=self.directory,
            desk=self.desk,
            pool=self.pool,
            clock=self.clock,
            limits=self.limits,
            entropy=lambda count: next(counter).to_bytes(count, "big"),
            record=self.record,
        )
        self.app = Gateway(
            data_path=data_path,
            openai=NotHere(),
            serves_directly=lambda _: True,
            jobs=NotHere(),
            management=NotHere(),
            balancer=LoadBalancer(
                directory=self.directory,
                slots=self.slots,
                fleet=self.fleet,
                outlook=self.outlook,
                clock=self.clock,
                settings=LoadBalancerSettings(),
                entropy=lambda count: next(counter).to_bytes(count, "big"),
                record=self.record,
                key_limits=KeyLimits(self.clock),
                start_failed=StartFailedError,
            ),
        )

    def record(self, row):
        self.records.append(row)
        self.recorded.set()

    async def row(self):
        """The next row of the request log."""
        async with asyncio.timeout(20):
            await self.recorded.wait()
        self.recorded.clear()
        return self.records[-1]

    def open_worker(self, capacity=2, *, listener=None):
        registration = Registration(engine=self.address, listener=listener)
        self.slots.open_worker("ep", "w1", capacity=capacity, registration=registration)

    async def fill(self):
        revision = Revision(endpoint_id="ep", version=1, model="org/model", env={}, created_ms=5000)
        await self.store.add_endpoint(Endpoint(id="ep", name="ep", revision=revision))
        for name, secret, scope, endpoints, heartbeat_s in (
            ("admin", ADMIN, Scope.ADMIN, (), None),
            ("run", RUN, Scope.RUN, ("ep",), None),
            ("other", OTHER, Scope.RUN, ("elsewhere",), None),
            ("beat", BEAT, Scope.RUN, ("ep",), 0.01),
        ):
            await self.store.add_key(
                ApiKey(
                    id=name,
                    name=name,
                    scope=scope,
                    endpoint_ids=frozenset(endpoints),
                    hash=hash_secret(secret),
                    heartbeat_s=heartbeat_s,
                )
            )
        await self.directory.refresh()


@contextlib.asynccontextmanager
async def serving(app, path):
    """Uvicorn on a Unix socket, as `bootstrap` configures it."""
    config = uvicorn.Config(
        app, uds=str(path), http=GatewayProtocol, proxy_headers=False, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    yield
    server.should_exit = True
    await task


@pytest.fixture
async def rig(tmp_path):
    made = Rig(tmp_path)
    await made.fill()
    application = web.Application(client_max_size=2**26)
    application.router.add_route("*", "/{tail:.*}", made.engine.handle)
    runner = web.AppRunner(application, handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, f"{tmp_path}/engine").start()
    async with serving(made.app, tmp_path / "gateway"):
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "gateway"))
        async with httpx.AsyncClient(
            transport=transport,
            base_url="http://gateway",
            headers={"authorization": f"Bearer {RUN}"},
            timeout=30,
        ) as client:
            made.client = client
            made.socket = tmp_path / "gateway"
            yield made
        made.pool.close()
    await runner.cleanup()
