"""The management API called in process: real store, directory, slots; a fake fleet, host, engine and log."""

from __future__ import annotations

import asyncio
import itertools
import json
import struct
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import pytest

from pilotlight.clusters.container_engine import ContainerEngine
from pilotlight.clusters.launchers import LauncherInfo
from pilotlight.core.admission import AdmissionLimits
from pilotlight.core.placement import Gpu, HostResources
from pilotlight.domain.key import Scope
from pilotlight.domain.worker import ProcessIdentity, Stage, Worker, WorkerState
from pilotlight.engines.manifest import EngineFlag, EngineManifest
from pilotlight.errors import EngineEnvironmentError
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.slots import SlotTable
from pilotlight.loops.estimates import Estimates
from pilotlight.management import (
    EndpointService,
    ImageChecker,
    KeyService,
    RegistryLogins,
    WebhookDesk,
    management_app,
)
from pilotlight.models.catalog import ModelFacts
from pilotlight.models.hub import FetchCancelledError
from pilotlight.ports.fleet import Health, StageReport
from pilotlight.sealing import InstallationSecret
from pilotlight.settings import Settings
from pilotlight.stores.memory import MemoryStore

GIB = 1 << 30
START_MS = 1_780_000_000_000
BASE_URL = "http://127.0.0.1:8400"


class FakeClock:
    def __init__(self) -> None:
        self.ms = START_MS

    def now_ms(self) -> int:
        return self.ms

    def monotonic_ns(self) -> int:
        return self.ms * 1_000_000


@dataclass
class FakeFleet:
    """Living workers by id."""

    living: dict[str, Worker] = field(default_factory=dict)
    healths: dict[str, Health] = field(default_factory=dict)

    def worker(self, worker_id: str) -> Worker | None:
        return self.living.get(worker_id)

    def workers(self, endpoint_id: str) -> Sequence[Worker]:
        return [worker for worker in self.living.values() if worker.endpoint_id == endpoint_id]

    def authenticate(self, endpoint_id: str, worker_id: str, secret_hash: str) -> Worker | None:
        return None

    def health(self, endpoint_id: str) -> Health:
        return self.healths.get(endpoint_id, Health())

    async def reported(self, worker_id: str, report: StageReport) -> None:
        raise NotImplementedError

    async def took(self, worker_id: str, *, slots: int) -> None:
        raise NotImplementedError

    async def drain(self, worker_id: str, *, reason: str) -> None:
        raise NotImplementedError

    async def kill(self, worker_id: str, *, reason: str) -> None:
        raise NotImplementedError

    def add(self, worker_id: str, endpoint_id: str, state: WorkerState, **changes: Any) -> Worker:
        worker = Worker(
            id=worker_id,
            endpoint_id=endpoint_id,
            version=1,
            state=state,
            stage=Stage.READY if state is WorkerState.READY else Stage.LOADING_WEIGHTS,
            memory_bytes=3 * GIB,
            process=ProcessIdentity(pid=4711, started_ticks=1, boot_id="b"),
            created_ms=START_MS - 90_000,
            key_hash="0123456789abcdef-worker-key-hash",
        )
        self.living[worker_id] = replace(worker, **changes)
        return self.living[worker_id]


@dataclass(frozen=True)
class Line:
    sequence: int
    ts_ms: int
    text: str
    source: str = "container"

    @property
    def timestamp(self) -> str:
        return f"2026-06-01T12:05:{self.sequence:02d}.000Z"

    @property
    def id(self) -> str:
        return f"{self.timestamp}/{self.sequence:012d}"


@dataclass
class FakeLogs:
    lines: dict[str, list[Line]] = field(default_factory=dict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def tail(self, worker_id: str, lines: int = 100, *, since_ms: int | None = None) -> list[Line]:
        kept = [line for line in self.lines.get(worker_id, []) if line.ts_ms >= (since_ms or 0)]
        return kept[-lines:] if lines else []

    async def follow(self, worker_id: str, after: int | None = None) -> AsyncIterator[Line]:
        position = after or 0
        while True:
            self.changed.clear()
            for line in list(self.lines.get(worker_id, [])):
                if line.sequence > position:
                    position = line.sequence
                    yield line
            if self.ended.is_set():
                return
            await self.changed.wait()


def cpu_manifest() -> EngineManifest:
    values = ("MAX_MODEL_LEN", "KV_CACHE_MEMORY_BYTES", "NUM_GPU_BLOCKS_OVERRIDE", "TENSOR_PARALLEL_SIZE")
    flags = {
        name: EngineFlag(flag=f"--{name.lower().replace('_', '-')}", kind="value", multi=False, choices=None)
        for name in values
    }
    flags["ENFORCE_EAGER"] = EngineFlag(flag="--enforce-eager", kind="pair", multi=False, choices=None)
    flags["SERVED_MODEL_NAME"] = EngineFlag(
        flag="--served-model-name", kind="value", multi=True, choices=None
    )
    flags["LOAD_FORMAT"] = EngineFlag(
        flag="--load-format", kind="value", multi=False, choices=("auto", "safetensors", "dummy")
    )
    return EngineManifest(
        version="0.32.0",
        torch_version="2.13.0+cpu",
        platform="cpu",
        flags=MappingProxyType(flags),
        architectures=frozenset({"LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"}),
        registered=MappingProxyType({"QUANTIZATION": frozenset({"awq", "gptq"})}),
        quantizations=MappingProxyType({"gptq 4-bit": "", "gptq 8-bit": "no kernel for 8 bits"}),
    )


def write_model(folder: Path, **changes: Any) -> Path:
    """A folder that passes for a tiny Llama of 1,024 weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_hidden_layers": 4,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(2048))
    return folder


def safetensors_bytes(size: int) -> bytes:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


@dataclass
class Management:
    """The whole API with everything around it."""

    http: httpx.AsyncClient
    admin: str
    service: EndpointService
    keys: KeyService
    store: MemoryStore
    directory: Directory
    fleet: FakeFleet
    slots: SlotTable
    logs: FakeLogs
    clock: FakeClock
    app: Any
    wakes: list[str]
    deleted: list[str]
    surroundings: dict[str, Any]
    model: Path
    container_engine: ContainerEngine
    estimates: Estimates

    async def create(self, **body: Any) -> dict[str, Any]:
        answer = await self.http.post("/pilotlight/v1/endpoints", json={"model": str(self.model), **body})
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def run_key(self, *endpoint_ids: str) -> str:
        _, secret = await self.keys.create(scope=Scope.RUN, endpoint_ids=endpoint_ids)
        return secret


def make_entropy() -> Callable[[int], bytes]:
    """Different bytes each time, the same in every run."""
    counter = itertools.count(1)

    def entropy(count: int) -> bytes:
        number = next(counter)
        return bytes((number * 31 + index * 7 + number // 9) % 256 for index in range(count))

    return entropy


@pytest.fixture
def make_model() -> Callable[..., Path]:
    return write_model


@pytest.fixture
def line() -> Callable[..., Line]:
    """A log line by its number, written at that second after 2026-06-01T12:05:00Z."""
    first_ms = 1_780_315_500_000
    return lambda number, source="container": Line(number, first_ms + number * 1000, f"line {number}", source)


class HubStub:
    """Stands in for the hub: knows every model, downloads nothing."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.ended = threading.Event()

    def facts(self, name: str) -> ModelFacts:
        return ModelFacts(
            name=name, kind="hub", path=None, architectures=("LlamaForCausalLM",), weight_bytes=1000
        )

    def fetch(self, repository, *, cache, token, endpoint, on_progress, on_wait, cancelled) -> Path:
        self.asked.append((repository.name, repository.revision, token))
        on_progress(500, 1000)
        on_progress(1000, 1000)
        return cache

    def fetch_until_cancelled(
        self, repository, *, cache, token, endpoint, on_progress, on_wait, cancelled
    ) -> Path:
        on_progress(1, 1000)
        cancelled.wait()
        self.ended.set()
        raise FetchCancelledError("cancelled")


@pytest.fixture
def hub_stub() -> HubStub:
    return HubStub()


@pytest.fixture
def gpu_engine() -> EngineManifest:
    """The same engine, built for GPUs."""
    return replace(cpu_manifest(), platform="cuda", torch_version="2.13.0+cu130")


@pytest.fixture
def gpu_host() -> HostResources:
    gpus = tuple(Gpu(index=index, name="NVIDIA H200", memory_bytes=140 * GIB) for index in range(2))
    return HostResources(memory_bytes_total=128 * GIB, memory_bytes_available=100 * GIB, gpus=gpus)


@pytest.fixture
async def management(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Management]:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "home"
    settings = Settings(home=home)
    clock, fleet, logs, store = FakeClock(), FakeFleet(), FakeLogs(), MemoryStore()
    directory = Directory(store)
    slots = SlotTable(clock, AdmissionLimits(requests=10, bytes=1000))
    wakes: list[str] = []
    deleted: list[str] = []
    surroundings: dict[str, Any] = {
        "manifest": cpu_manifest(),
        "host": HostResources(memory_bytes_total=16 * GIB, memory_bytes_available=12 * GIB, gpus=()),
    }

    def load_manifest(version: str | None) -> EngineManifest:
        if isinstance(surroundings["manifest"], EngineEnvironmentError):
            raise surroundings["manifest"]
        return surroundings.get(version or "manifest", surroundings["manifest"])

    async def launchers() -> list[LauncherInfo]:
        return surroundings.get("launchers", [])

    async def on_deleted(endpoint_id: str) -> None:
        deleted.append(endpoint_id)

    service = EndpointService(
        store=store,
        directory=directory,
        fleet=fleet,
        settings=settings,
        clock=clock,
        entropy=make_entropy(),
        wake=wakes.append,
        manifest_loader=load_manifest,
        host_reader=lambda: surroundings["host"],
        on_deleted=on_deleted,
        base_url=lambda: BASE_URL,
        images=ImageChecker(
            engine=(engine := ContainerEngine(f"unix://{tmp_path}/no-engine.sock")),
            logins=RegistryLogins(InstallationSecret(b"s" * 32)),
            read_host=lambda: surroundings["host"],
            reserve_bytes=settings.workers.memory_reserve_bytes,
            volume_roots=[tmp_path],
        ),
        estimates=(estimates := Estimates(endpoint=directory.endpoint, store=store, workers=fleet.workers)),
    )
    keys = KeyService(store=store, directory=directory, clock=clock, entropy=make_entropy())
    _, admin = await keys.create(name="first", scope=Scope.ADMIN)
    app = management_app(
        service=service,
        keys=keys,
        key_reader=directory,
        records=store,
        slots=slots,
        logs=logs,
        clock=clock,
        home=str(home),
        webhooks=WebhookDesk(
            store=store,
            clock=clock,
            secret=InstallationSecret(bytes(32)).webhook_secret,
            wake=lambda: wakes.append("webhooks"),
        ),
        launchers=launchers,
        body_s=60,
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
        base_url=BASE_URL,
        headers={"Authorization": f"Bearer {admin}"},
    ) as http:
        yield Management(
            http=http,
            admin=admin,
            service=service,
            keys=keys,
            store=store,
            directory=directory,
            fleet=fleet,
            slots=slots,
            logs=logs,
            clock=clock,
            app=app,
            wakes=wakes,
            deleted=deleted,
            surroundings=surroundings,
            model=write_model(tmp_path / "tiny"),
            container_engine=engine,
            estimates=estimates,
        )
    engine.close()
