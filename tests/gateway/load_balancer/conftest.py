"""The load balancer behind a real Uvicorn, in front of scripted workers: aiohttp servers on loopback ports."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import replace

import aiohttp
import pytest
import uvicorn
from aiohttp import web

from pilotlight.core.admission import AdmissionLimits
from pilotlight.domain.endpoint import Endpoint, EndpointKind, Revision
from pilotlight.domain.key import ApiKey, Scope, hash_secret
from pilotlight.domain.worker import Address, Registration, Worker, WorkerState
from pilotlight.errors import NotFoundError
from pilotlight.gateway.app import Gateway
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.key_limits import KeyLimits
from pilotlight.gateway.load_balancer import LoadBalancer
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.protocol import GatewayProtocol
from pilotlight.gateway.slots import SlotTable
from pilotlight.gateway.tunnel import WebSocketTunnel
from pilotlight.ports.fleet import Health
from pilotlight.settings import LoadBalancerSettings
from pilotlight.stores.memory import MemoryStore
from pilotlight.system import SystemClock

ID = "lbendpoint1234"
ADMIN, RUN = "rpa_ADMIN", "rpa_RUN"


class StartFailedError(Exception):
    """Held requests fail with this."""


class ShiftedClock(SystemClock):
    """The real clocks plus a shift, so that minutes pass at once."""

    def __init__(self):
        super().__init__()
        self.shift_ms = 0

    def now_ms(self):
        return super().now_ms() + self.shift_ms


class FakeFleet:
    """The workers that exist, and those that may be resumed."""

    def __init__(self):
        self.living = {}
        self.stopped = set()
        self.resumed = []
        self.thaw = None

    def worker(self, worker_id):
        return self.living.get(worker_id)

    def workers(self, endpoint_id):
        return [worker for worker in self.living.values() if worker.endpoint_id == endpoint_id]

    def health(self, endpoint_id):
        return Health()

    def stages(self, worker_id):
        return ()

    async def resume(self, endpoint, worker_id):
        if worker_id not in self.stopped:
            raise NotFoundError(worker_id)
        self.resumed.append(worker_id)
        worker = Worker(id=worker_id, endpoint_id=endpoint.id, version=1, state=WorkerState.STARTING)
        self.living[worker_id] = worker
        return worker


class Balanced:
    """Everything around one load balancer."""

    def __init__(self, **settings):
        self.clock = ShiftedClock()
        self.slots = SlotTable(self.clock, AdmissionLimits(requests=100, bytes=10_000))
        self.store = MemoryStore()
        self.directory = Directory(self.store)
        self.fleet = FakeFleet()
        self.estimate_ms = None
        self.rows = []
        self.start_failed = StartFailedError
        self.waiting = asyncio.Event()
        self.slots.on_demand = lambda _: self.waiting.set()
        self.balancer = LoadBalancer(
            directory=self.directory,
            slots=self.slots,
            fleet=self.fleet,
            outlook=Outlook(fleet=self.fleet, clock=self.clock, estimate=lambda _: self.estimate_ms),
            clock=self.clock,
            settings=LoadBalancerSettings(**settings),
            entropy=bytes,
            record=self.rows.append,
            key_limits=KeyLimits(self.clock),
            start_failed=self.start_failed,
        )
        self.app = Gateway(
            data_path=None,
            openai=None,
            serves_directly=lambda _: False,
            jobs=None,
            management=None,
            balancer=self.balancer,
        )
        self.url = ""
        self.client = None
        self.stack = contextlib.AsyncExitStack()

    async def deploy(self, endpoint_id=ID, kind=EndpointKind.LOAD_BALANCER, **env):
        revision = Revision(endpoint_id=endpoint_id, version=1, model="", command=("x",), env=env)
        await self.store.add_endpoint(
            Endpoint(id=endpoint_id, name=endpoint_id, kind=kind, revision=revision)
        )
        await self.directory.refresh()

    async def fill(self):
        await self.deploy()
        for secret, scope, endpoints in ((ADMIN, Scope.ADMIN, ()), (RUN, Scope.RUN, (ID,))):
            await self.store.add_key(
                ApiKey(
                    id=secret,
                    name=secret,
                    scope=scope,
                    endpoint_ids=frozenset(endpoints),
                    hash=hash_secret(secret),
                )
            )
        await self.directory.refresh()

    async def worker(self, worker_id, handler, *, capacity=10, endpoint_id=ID):
        """A worker whose every route is answered by one handler."""
        application = web.Application(client_max_size=2**26)
        application.router.add_route("*", "/{tail:.*}", handler)
        runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.stack.push_async_callback(runner.cleanup)
        port = site._server.sockets[0].getsockname()[1]
        self.add(worker_id, port, capacity=capacity, endpoint_id=endpoint_id)
        return port

    async def raw_worker(self, serve):
        """Worker `w1`, which speaks in bytes: each connection is given to `serve(reader, writer)`."""
        tasks = set()

        async def serve_one(reader, writer):
            tasks.add(asyncio.current_task())
            try:
                await serve(reader, writer)
            finally:
                writer.transport.abort() if writer.transport.is_closing() else writer.close()

        server = await asyncio.start_server(serve_one, "127.0.0.1", 0)

        async def stop():
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.stack.push_async_callback(stop)
        self.add("w1", server.sockets[0].getsockname()[1])

    def unreachable(self, worker_id):
        """A worker at whose port nobody listens."""
        port = self.stack.enter_context(socket.socket())
        port.bind(("127.0.0.1", 0))
        self.add(worker_id, port.getsockname()[1])

    def add(self, worker_id, port, *, capacity=10, endpoint_id=ID):
        worker = Worker(id=worker_id, endpoint_id=endpoint_id, version=1, state=WorkerState.READY)
        self.fleet.living[worker_id] = worker
        registration = Registration(engine=Address(url=f"http://127.0.0.1:{port}"))
        self.slots.open_worker(endpoint_id, worker_id, capacity=capacity, registration=registration)

    def starting(self, worker_id):
        worker = Worker(id=worker_id, endpoint_id=ID, version=1, state=WorkerState.STARTING)
        self.fleet.living[worker_id] = worker

    def freeze(self, worker_id, *, comes_back):
        """A frozen worker, which comes back or not when the fleet is asked for it."""
        worker = self.fleet.living[worker_id]
        self.fleet.living[worker_id] = replace(worker, state=WorkerState.FROZEN)
        self.slots.close_worker(worker_id, for_good=False)

        async def thaw(thawed):
            assert thawed == worker_id
            if comes_back:
                self.fleet.living[worker_id] = worker
                self.slots.open_worker(ID, worker_id, capacity=10, registration=None)
            else:
                self.drain(worker_id)
            return comes_back

        self.fleet.thaw = thaw

    def drain(self, worker_id):
        self.fleet.living[worker_id] = replace(self.fleet.living[worker_id], state=WorkerState.DRAINING)
        self.slots.close_worker(worker_id)

    def end(self, worker_id):
        """A worker that was scaled down has ended."""
        del self.fleet.living[worker_id]
        self.fleet.stopped.add(worker_id)
        self.slots.drop_worker(worker_id)

    def ask(self, method="GET", path="/", **more):
        return self.client.request(method, f"{self.url}/lb/{ID}{path}", **more)

    @contextlib.asynccontextmanager
    async def serving(self):
        config = uvicorn.Config(
            self.app, port=0, http=GatewayProtocol, ws=WebSocketTunnel, lifespan="off", log_config=None,
            access_log=False, server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.001)
        port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession(
            headers={"authorization": f"Bearer {RUN}"}, timeout=aiohttp.ClientTimeout(total=30)
        ) as self.client:
            yield self
        await self.stack.aclose()
        self.balancer.pool.close()
        server.should_exit = True
        await task


@pytest.fixture
async def make_balanced():
    """Balancers with settings of their own."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(**settings):
            made = Balanced(**settings)
            await made.fill()
            return await stack.enter_async_context(made.serving())

        yield make


@pytest.fixture
async def balanced(make_balanced):
    return await make_balanced()
