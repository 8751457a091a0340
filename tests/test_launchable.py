"""Which launcher an endpoint's engines can be forked from, compared with what real worker programs start."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from pathlib import Path

import pytest

from pilotlight.clusters.launcher import LauncherPlan
from pilotlight.clusters.local import LocalCluster
from pilotlight.clusters.ports import PortBook
from pilotlight.clusters.variables import WorkerVariables
from pilotlight.core.placement import HostResources
from pilotlight.domain.endpoint import Container, Endpoint, EndpointKind, Revision
from pilotlight.domain.ids import short_id
from pilotlight.domain.worker import Worker
from pilotlight.engines.launching import PLACEHOLDERS, differences, fingerprint
from pilotlight.launchable import Launchable, explain_not_launchable
from pilotlight.loops.needs import worker_spec
from pilotlight.settings import load_settings

OWN_PROGRAM = (sys.executable, "-m", "pilotlight.worker")

ENGINE = """#!/bin/sh
cat /proc/self/environ > "$DUMP.new"
mv "$DUMP.new" "$DUMP"
exit 3
"""
"""In the place of the engine's Python: leaves its environment where it is told, and ends."""


TOKENIZER = {
    "flag": "--tokenizer",
    "kind": "value",
    "multi": False,
    "choices": None,
    "value": "text",
    "short": [],
}


class World:
    """A gateway's parts around workers, with an engine that only tells what it was given."""

    def __init__(self, folder: Path, base_env: dict[str, str]) -> None:
        self.folder = folder
        engine = folder / "engine"
        (engine / "bin").mkdir(parents=True)
        (engine / "bin" / "python").write_text(ENGINE)
        (engine / "bin" / "python").chmod(0o755)
        manifest = {
            "format": 2,
            "registered": {},
            "vllm": "0.32.0",
            "torch": "2.13.0+cpu",
            "platform": "cpu",
            "architectures": ["LlamaForCausalLM"],
            "flags": {"TOKENIZER": TOKENIZER},
        }
        (engine / "pilotlight-engine.json").write_text(json.dumps(manifest))
        self.settings = load_settings(home=folder / "home", engine={"home": str(engine)})
        self.cluster = LocalCluster(folder / "logs", log_bytes=100_000, base_env=base_env, close_grace_s=0)
        self.variables = WorkerVariables(
            self.settings,
            "http://127.0.0.1:9",
            ports=PortBook(lambda _: False),
            run_folder=lambda worker_id: folder / worker_id,
            host=lambda: HostResources(memory_bytes_total=1, memory_bytes_available=1),
        )
        self.launchable = Launchable(
            self.settings,
            variables=self.variables.before_launcher,
            cluster=self.cluster,
            socket=lambda name: folder / name,
        )
        self._numbers = itertools.count()

    def endpoint(self, env: dict[str, str] | None = None, **changes: object) -> Endpoint:
        env = {"MODEL_NAME": "pilotlight/ember", **(env or {})}
        fields = {"endpoint_id": "e", "version": 1, "model": "pilotlight/ember", "env": env}
        fields |= {
            name: changes.pop(name) for name in ("command", "container", "engine_url") if name in changes
        }
        return Endpoint(id="e", name="e", revision=Revision(**fields), **changes)  # type: ignore[arg-type]

    def plan(self, endpoint: Endpoint) -> LauncherPlan:
        plan = self.launchable(endpoint)
        assert isinstance(plan, LauncherPlan), plan
        return plan

    async def engine_environment(self, endpoint: Endpoint) -> dict[str, str]:
        """What a worker program of this endpoint gives its engine."""
        worker_id = short_id(os.urandom(14))
        dump = self.folder / f"dump{next(self._numbers)}"
        variables = {**self.variables(endpoint, worker_id, "secret"), "DUMP": str(dump)}
        worker = Worker(id=worker_id, endpoint_id="e", version=1)
        spec = worker_spec(worker, endpoint, env=variables, program=OWN_PROGRAM)
        ended = asyncio.Event()
        await self.cluster.start(spec, lambda _: ended.set())
        while not dump.exists():
            assert not ended.is_set(), [line.text for line in await self.cluster.logs.tail(worker_id)]
            await asyncio.sleep(0.01)
        await self.cluster.kill(worker_id)
        entries = dump.read_text().split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)


@pytest.fixture
async def world(tmp_path, monkeypatch):
    base = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "HF_HUB_CACHE": "/gateway/hub",
        "https_proxy": "http://proxy:3128",
        "no_proxy": "internal",
    }
    monkeypatch.setenv("no_proxy", "internal")
    world = World(tmp_path, base)
    yield world
    await world.cluster.close()


VLLM_SETTINGS = {
    "VLLM_LOGGING_LEVEL": "DEBUG",
    "VLLM_STARTUP_TIMEOUT": "77.5",
    "VLLM_RUNPOD_MAX_MODEL_LEN": "128",
    "VLLM_API_KEY": "theirs",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": "/elsewhere",
    "HF_TOKEN": "hf_secret",
    "MAX_MODEL_LEN": "None",
    "NO_PROXY": "hub.internal",
    "HTTPS_PROXY": "http://other:1",
}


@pytest.mark.parametrize(
    ("env", "changes"),
    [
        ({}, {}),
        ({}, {"flashboot": False, "concurrency": 2}),
        ({"HF_HOME": "/models/hf"}, {}),
        ({"BASE_PATH": "/volume", "HF_HUB_ENABLE_HF_TRANSFER": "1"}, {}),
        (VLLM_SETTINGS, {}),
        ({"VLLM_EXTRA_ARGS": "--tokenizer org/other", "HF_HUB_OFFLINE": "0"}, {}),
        ({"WORKER_MODE": "http"}, {"kind": EndpointKind.LOAD_BALANCER, "command": OWN_PROGRAM}),
    ],
    ids=["plain", "settings", "hf home", "volume", "variables", "asks the hub", "load balancer"],
)
async def test_a_launcher_agrees_with_the_engines_of_real_worker_programs(world, env, changes):
    endpoint = world.endpoint(env, **changes)
    plan = world.plan(endpoint)
    engine = await world.engine_environment(endpoint)
    assert differences(plan.environment, engine) == ()
    assert fingerprint(world.settings.engine_home.resolve(), "0.32.0", engine) == plan.fingerprint
    assert plan.socket == world.folder / plan.fingerprint


def test_only_what_counts_at_import_parts_endpoints(world):
    """Requests, sizes and secrets may differ; where models lie may not."""
    plain = world.plan(world.endpoint())
    same = world.plan(world.endpoint({"MAX_MODEL_LEN": "9", "HF_TOKEN": "hf_secret", "AWS_SECRET": "s"}))
    other = world.plan(world.endpoint({"HF_HOME": "/elsewhere"}))
    assert plain.fingerprint == same.fingerprint != other.fingerprint
    assert plain.environment == same.environment, "whoever comes first decides nothing for the others"
    assert "s" not in same.environment.values()


def test_a_launcher_shows_no_key_and_no_workers_id(world):
    """What finds the processes of workers must never take it for one."""
    environment = world.plan(world.endpoint()).environment
    shown = {name: environment[name] for name in PLACEHOLDERS}
    assert shown == {name: "-" * length for name, length in PLACEHOLDERS.items()}
    assert set(shown["PILOTLIGHT_WORKER_ID"]).isdisjoint(short_id(bytes(range(256))))


def test_a_launcher_imports_the_classes_that_the_models_name(world):
    plan = world.plan(world.endpoint())
    assert plan.classes() == ("LlamaForCausalLM",)
    assert plan.command(["A", "B"])[-2:] == ("--preload", "A,B")
    absent = world.plan(world.endpoint({"MODEL_NAME": "nobody/has-it"}))
    assert absent.classes() == ()


@pytest.mark.parametrize(
    ("named", "classes"),
    [
        (["LlamaForCausalLM", 5, "A,B", ""], ("LlamaForCausalLM",)),
        ("LlamaForCausalLM", ()),
        (5, ()),
        (None, ()),
    ],
)
def test_what_a_model_names_that_is_no_class_is_left_out(world, named, classes):
    """Configurations come from strangers, and a launcher is there for all endpoints."""
    folder = world.folder / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": named}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert world.plan(world.endpoint({"MODEL_NAME": str(folder)})).classes() == classes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"engine_url": "http://127.0.0.1:1"}, "not started here"),
        ({"container": Container(image="org/worker")}, "containers"),
        ({"kind": EndpointKind.QUEUE, "command": OWN_PROGRAM}, "not our own program"),
        ({"kind": EndpointKind.LOAD_BALANCER, "command": ("python", "server.py")}, "not our own program"),
        ({"env": {"ENGINE_VERSION": "0.1.0"}}, "installed are"),
        ({"env": {"VLLM_STARTUP_TIMEOUT": "soon"}}, "VLLM_STARTUP_TIMEOUT"),
    ],
)
def test_what_cannot_be_launched_says_why(world, changes, reason):
    assert reason in world.launchable(world.endpoint(**changes))


def test_nothing_is_launched_in_the_place_of_another_engine(world):
    assert "llama-server" in explain_not_launchable(world.endpoint(), engine_command=("llama-server",))


def test_without_an_engine_there_is_no_launcher_until_there_is_one(world):
    manifest = world.settings.engine_home / "pilotlight-engine.json"
    content = manifest.read_text()
    assert isinstance(world.launchable(world.endpoint()), LauncherPlan)
    manifest.unlink()
    assert "pilotlight-engine.json" in world.launchable(world.endpoint())
    manifest.write_text(content.replace("0.32.0", "0.33.0"))
    assert world.plan(world.endpoint()).version == "0.33.0"
