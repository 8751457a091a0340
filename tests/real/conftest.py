"""What is served besides the built-in model: variants made once per content, and endpoints that serve them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.conftest import LiveInstallation, await_engine

ROOT = Path(__file__).resolve().parents[2]
ENGINE_HOME = Path(os.environ.get("PILOTLIGHT_ENGINE_HOME") or ROOT / ".venv-engine")
EMBER = ROOT / "src" / "pilotlight" / "models" / "ember"
MADE_FROM = (
    *("make_variants.py", "ember/quantization.py", "ember/adapters.py"),
    *("ember/training.py", "ember/tokenization.py"),
)
SMALL = {"ENFORCE_EAGER": "true", "NUM_GPU_BLOCKS_OVERRIDE": "256"}
"""What makes a start short."""


class Served:
    """An endpoint with a ready worker, and the ways to ask it."""

    def __init__(self, api: httpx.Client, endpoint: dict) -> None:
        self.api = api
        self.endpoint = endpoint
        self.path = f"/v2/{endpoint['id']}"

    def call(self, route: str, body: dict) -> httpx.Response:
        """Asks an OpenAI route through the data path."""
        return self.api.post(f"{self.path}/openai{route}", json=body)

    def openai(self, route: str, body: dict) -> dict:
        """The body that an OpenAI route answers with."""
        answer = self.call(route, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, content: str, **fields: object) -> dict:
        """The only choice of a chat, greedy unless the fields say otherwise."""
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **fields}
        (choice,) = self.openai("/v1/chat/completions", body)["choices"]
        return choice

    def job(self, job_input: dict) -> dict:
        """A finished job, failed or not."""
        answer = self.api.post(f"{self.path}/runsync", json={"input": job_input})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def native(self, content: str | list, **fields: object) -> dict:
        """The only item of a native job, a chat for messages and a completion for a prompt."""
        job = self.job({"prompt" if isinstance(content, str) else "messages": content, **fields})
        assert job["status"] == "COMPLETED", job
        (item,) = job["output"]
        return item

    def refusal(self, job_input: dict) -> dict:
        """What a job that must fail says."""
        job = self.job(job_input)
        assert job["status"] == "FAILED", job
        return json.loads(job["error"])["error"]

    def metric(self, name: str) -> float:
        """The sum of the engine's samples of one metric."""
        lines = self.api.get(f"{self.path}/openai/metrics").text.splitlines()
        found = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        assert found, f"the engine has no metric {name}"
        return sum(float(line.rpartition(" ")[2]) for line in found)


@pytest.fixture(scope="session")
def variants(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `tools/make_variants.py` makes; kept from run to run until what it is made from changes."""
    sources = [*(ROOT / "tools" / name for name in MADE_FROM), EMBER / "model.safetensors"]
    content = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sources))
    cache = getattr(request.config, "cache", None)
    shelf = cache.mkdir("ember-variants") if cache else tmp_path_factory.mktemp("ember-variants")
    folder = shelf / content.hexdigest()[:16]
    if not folder.exists():
        scratch = tmp_path_factory.mktemp("making") / "variants"
        command = [ENGINE_HOME / "bin/python", ROOT / "tools/make_variants.py", "--output", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        # Beside its place first: the temporary folder may be on another disk, where a move is no single step.
        beside = shelf / f".{folder.name}-{os.getpid()}"
        subprocess.run(["cp", "-r", scratch, beside], check=True)
        with contextlib.suppress(OSError):
            beside.rename(folder)
    return folder


@pytest.fixture(scope="module")
def serve(installation: LiveInstallation) -> Iterator[Callable[..., Served]]:
    """Deploys a model with an environment and waits for its worker; gone after the module."""
    deployed: list[dict] = []

    def start(model: str | Path, name: str, **env: str) -> Served:
        endpoint = installation.deploy(str(model), name, idle_timeout_s=3600, max=1, env=SMALL | env)
        deployed.append(endpoint)
        await_engine(installation, endpoint)
        return Served(installation.api, endpoint)

    yield start
    for endpoint in deployed:
        installation.api.delete(f"/v2/serverless/{endpoint['id']}").raise_for_status()


@pytest.fixture(scope="session")
def ember(real: LiveInstallation) -> Served:
    """The built-in model as it comes."""
    return Served(real.api, real.endpoint)
