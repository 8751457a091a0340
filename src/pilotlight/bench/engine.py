"""A plain vLLM server, started with the very flags that our worker would use; a reference for benchmarks."""

from __future__ import annotations

import http.client
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pilotlight.bench.errors import BenchError
from pilotlight.bench.processes import Bench, Child, environment, free_port
from pilotlight.engines.flags import translate
from pilotlight.engines.manifest import load_manifest
from pilotlight.settings import load_settings
from pilotlight.worker.config import engine_environment
from pilotlight.worker.model import look_for_model

MODEL = "pilotlight/ember"
"""The model that every benchmark uses: inside the package, so nothing is fetched."""

ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""Environment of an engine on CPUs that must leave processors to others. By default it computes on all of
them, and each of its steps waits for the last one of its threads, and for whoever has that one's processor:
with two engines on two processors everything takes three times as long, and tokens come in lumps."""

START_S = 600.0
"""Longest start; the very first one on a machine may compile for more than a minute."""

ASK_POLL_S = 0.02
"""Pause between two attempts to reach a server that starts."""


@dataclass(frozen=True, slots=True)
class PlainEngine:
    """A running (or starting) vLLM server on loopback.

    Attributes:
        child: Its process.
        port: TCP port.
        key: The key it asks for.
        spawned: Moment it was started (`time.monotonic`).
    """

    child: Child
    port: int
    key: str
    spawned: float

    @property
    def url(self) -> str:
        """Base URL for `engine_url`."""
        return f"http://127.0.0.1:{self.port}"


def start_plain_engine(
    bench: Bench, endpoint_env: Mapping[str, str], *, key: str | None = None
) -> PlainEngine:
    """Spawn vLLM as a worker of an endpoint with this environment would, on a TCP port.

    Args:
        bench: Where it runs.
        endpoint_env: The endpoint's environment as the management API shows it.
        key: Key it asks for; "" asks for none, None makes one.

    Raises:
        BenchError: The environment cannot be translated.
        EngineEnvironmentError: No engine is installed.
    """
    home = load_settings().engine_home
    manifest = load_manifest(home)
    model, _ = look_for_model({**endpoint_env, "MODEL_NAME": MODEL})
    plan = translate(endpoint_env, manifest, served_names=model.names, run_folder=str(bench.folder))
    if plan.errors or plan.files:
        problem = "; ".join(error.message for error in plan.errors) or "it needs files"
        raise BenchError(f"the endpoint's environment does not fit a plain server: {problem}")
    port = free_port()
    key = secrets.token_urlsafe(32) if key is None else key
    env = engine_environment(
        environment(**endpoint_env),
        worker_id=f"bench-{port}",
        engine_key=key,
        offline=model.local,
        platform=manifest.platform,
    )
    if not key:
        del env["VLLM_API_KEY"]
    python = str(Path(home) / "bin" / "python")
    spawned = time.monotonic()
    child = bench.start(
        "plain vllm",
        [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", model.source, *plan.argv),
            *("--disable-uvicorn-access-log", "--host", "127.0.0.1", "--port", str(port)),
        ],
        env=env,
    )
    return PlainEngine(child, port, key, spawned)


def wait_first_token(engine: PlainEngine) -> float:
    """Ask a starting server for a chat completion until it answers; the moment of its first token.

    Raises:
        BenchError: It ended, or did not answer within `START_S`.
    """
    while engine.child.running:
        try:
            return first_token(engine.port, "/v1/chat/completions", engine.key)
        except ConnectionRefusedError:
            if time.monotonic() - engine.spawned > START_S:
                raise engine.child.error(f"did not answer within {START_S:g} s") from None
            time.sleep(ASK_POLL_S)
    raise engine.child.error("ended before it answered")


def first_token(port: int, path: str, key: str) -> float:
    """Ask for a streamed chat completion and read all of it; the moment of its first token.

    Moments are those of `time.monotonic`.

    Raises:
        ConnectionRefusedError: Nobody listens there.
        BenchError: The answer is not a whole stream.
    """
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is 2 plus 3?"}],
        "stream": True,
        "temperature": 0,
        "max_tokens": 16,
    }
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    try:
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise BenchError(f"{path} answered {answer.status}: {answer.read(2000).decode(errors='replace')}")
        moment = None
        for line in answer:
            # The first event of a chat names the role and holds no text.
            if moment is None and _has_text(line):
                moment = time.monotonic()
            if line.startswith(b"data: [DONE]") and moment is not None:
                return moment
    finally:
        connection.close()
    raise BenchError(f"{path} sent a stream without {'an end' if moment else 'any text'}")


def _has_text(line: bytes) -> bool:
    if not line.startswith(b"data: {"):
        return False
    choices = json.loads(line[6:]).get("choices") or [{}]
    return bool(choices[0].get("delta", {}).get("content"))
