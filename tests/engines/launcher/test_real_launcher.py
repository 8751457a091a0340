"""vLLM itself: forked from a launcher, started cold, and as it is, side by side."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engines.launcher.conftest import KEY, Connection, Program, ended, engine_environment
from tests.real.conftest import EMBER, ENGINE_HOME

from pilotlight.engines.launching import (
    differences,
    import_environment,
    launcher_command,
    launcher_environment,
    serve_command,
    serve_environment,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300), pytest.mark.xdist_group("launcher")]

OPTIONS = [
    *("--model", str(EMBER), "--served-model-name", "ember"),
    *("--enforce-eager", "--kv-cache-memory-bytes", "16777216"),
]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
START_SECONDS = 120
LONG = "one two three four five " * 8
"""The first prompt of vLLM as it is: a short one ends it on processors with AMX, which it has not asked for yet."""
WATCH = str(Path(__file__).parent / "watch")

NOT_AT_IMPORT = {
    "TORCHINDUCTOR_CACHE_DIR": "only the place of an experimental cache",
    "USER": "the default of that place", "LOGNAME": "the same", "LNAME": "the same", "USERNAME": "the same",
    "CLAUDE_CONFIG_DIR": "huggingface_hub tells its caller's name to the hub",
    "COLUMNS": "the width of help", "LINES": "the same", "PYCHARM_HOSTED": "colours of a log",
    "_PYTHON_HOST_PLATFORM": "builds of Python", "_PYTHON_PROJECT_BASE": "builds of Python",
    "_PYTHON_SYSCONFIGDATA_NAME": "builds of Python", "_NETWORKX_BUILDING_DOCS_": "builds of documents",
    "VLLM_WORKER_MULTIPROC_METHOD": "set by every start",
    # Of this test and of the launcher, met where somebody goes through all variables.
    "PATH": "", "VLLM_API_KEY": "", "PILOTLIGHT_WORKER_ID": "", "PILOTLIGHT_ENGINE_FORK": "", "TEST_WATCH": "",
    "TEST_YIELDS": "", "PILOTLIGHT_ENGINE_PRELOADED": "",
}  # fmt: skip
"""Variables that somebody asks for while vLLM is imported, and that may differ all the same; with the reason."""


class Server:
    """A vLLM server, however started."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pid = 0

    def ask(self, route: str, **body: Any) -> Any:
        """The answer to a request."""
        connection = http.client.HTTPConnection("engine")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.path))
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", route, json.dumps({"model": "ember"} | body), headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        assert answer.status == 200, text
        return json.loads(text)

    def wait(self, prompt: str = "hi") -> Server:
        """Itself, once it answers to this prompt."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.complete(prompt)
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < deadline
                assert Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
                time.sleep(0.05)
            else:
                return self

    def complete(self, prompt: str = "hi") -> Any:
        """Greedy tokens with their probabilities."""
        answer = self.ask("/v1/completions", prompt=prompt, max_tokens=40, temperature=0, logprobs=1)
        (choice,) = answer["choices"]
        return choice["text"], choice["logprobs"]["token_logprobs"]

    def processes(self) -> list[int]:
        """All of its session."""
        numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in numbers if session(pid) == self.pid]

    def processors(self) -> set[str]:
        """Where the threads of the process that computes may run."""
        title = b"VLLM::Worker"
        (worker,) = [pid for pid in self.processes() if title in Path(f"/proc/{pid}/cmdline").read_bytes()]
        lines = [path.read_text().splitlines() for path in Path(f"/proc/{worker}/task").glob("*/status")]
        return {line.split()[1] for text in lines for line in text if line.startswith("Cpus_allowed_list")}


def session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return engine_environment(**OFFLINE, PYTHONPATH=WATCH)


@pytest.fixture(scope="module")
def launcher(folder: Path, environment: dict[str, str]) -> Iterator[Program]:
    path = folder / "launcher.sock"
    watched = {"TEST_WATCH": str(folder / "names"), "TEST_YIELDS": str(folder / "launched.yields")}
    env = launcher_environment(environment | watched)
    command = [*launcher_command(ENGINE_HOME, path, ["LlamaForCausalLM"])]
    program = Program(command, env, path, folder / "launcher.log")
    program.event("listening")
    yield program
    program.close()


@pytest.fixture(scope="module")
def plain(folder: Path, environment: dict[str, str], launcher: Program) -> Iterator[Server]:
    """vLLM as it is; starts while the launcher imports."""
    server = Server(folder / "plain.sock")
    command = [ENGINE_HOME / "bin/python", "-m", "vllm.entrypoints.openai.api_server", *OPTIONS]
    with (folder / "plain.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--uds", server.path], env=environment | {"TEST_YIELDS": str(folder / "plain.yields")},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    server.pid = process.pid
    yield server
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def ready(plain: Server, launcher: Program) -> Program:
    """The launcher, after its imports."""
    launcher.event("ready", START_SECONDS)
    return launcher


def launch(
    launcher: Program, folder: Path, environment: dict[str, str], *more: str
) -> tuple[Connection, Server]:
    connection = launcher.connect()
    greeting = connection.read()
    assert greeting["problem"] == ""
    ours = {name: value for name, value in greeting["environment"].items() if name != "TEST_WATCH"}
    assert differences(ours, environment) == ()
    server = Server(folder / "launched.sock")
    server.path.unlink(missing_ok=True)
    answer = connection.launch(
        *OPTIONS,
        *more,
        "--uds",
        str(server.path),
        environment=environment,
        architectures=["LlamaForCausalLM"],
    )
    server.pid = answer["pid"]
    return connection, server.wait()


def shared_memory(server: Server) -> list[Path]:
    """Files of shared memory that a server's processes have mapped: other engines run beside it."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in server.processes())
    return [path for path in Path("/dev/shm").glob("psm_*") if f" {path.stat().st_ino} " in maps]


def test_a_launched_engine_is_like_a_plain_one(ready, plain, folder, environment):
    connection, launched = launch(ready, folder, environment)
    processes = launched.processes()
    assert len(processes) >= 3
    for pid in processes:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert f"VLLM_API_KEY={KEY}".encode() in entries
        assert f"PILOTLIGHT_WORKER_ID={environment['PILOTLIGHT_WORKER_ID']}".encode() in entries
    plain.wait(LONG)
    assert launched.complete() == plain.complete()
    assert launched.processors() == plain.processors()
    assert (folder / "plain.yields").exists()
    assert not (folder / "launched.yields").exists()
    shared = shared_memory(launched)
    assert shared
    os.kill(launched.pid, signal.SIGTERM)
    assert connection.read() == {"ended": 0}
    connection.close()
    assert all(ended(pid) for pid in processes)
    assert not any(path.exists() for path in shared)


def test_options_and_variables_pass_through(ready, folder, environment):
    connection, server = launch(
        ready, folder, environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, "--max-model-len", "128"
    )
    assert len(server.processors()) == 1
    (model,) = json.loads(get(server, "/v1/models"))["data"]
    assert model["max_model_len"] == 128
    connection.close()
    assert ended(server.pid)


def get(server: Server, route: str) -> bytes:
    connection = http.client.HTTPConnection("engine")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(server.path))
    connection.request("GET", route, headers={"Authorization": f"Bearer {KEY}"})
    return connection.getresponse().read()


def test_what_is_read_at_import_is_known(ready, folder):
    names = set((folder / "names").read_text().split())
    assert {"HF_HOME", "VLLM_LOGGING_LEVEL"} <= names
    unknown = names - import_environment(dict.fromkeys(names, "x")).keys() - NOT_AT_IMPORT.keys()
    assert unknown == set()


def test_what_must_not_happen_before_a_fork_is_seen():
    script = """
import torch
from pilotlight_engine.forking import trial
from pilotlight_engine.imports import single_threaded, tensor_operations
with tensor_operations() as small:
    torch.tensor(1.0) + torch.zeros(8)
with tensor_operations() as large:
    torch.ones(2000)
trial()
print(len(small), len(large), repr(single_threaded()))
torch.set_num_threads(2)
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
torch.ones(10_000_000).add_(1)
trial()
print(single_threaded())
"""
    env = serve_environment(engine_environment())
    command = [ENGINE_HOME / "bin/python", "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=START_SECONDS)
    first, second = done.stdout.splitlines()
    assert first == "0 1 ''"
    assert "threads run beside the first" in second


def test_a_cold_start_forks_too(plain, folder, environment):
    server = Server(folder / "cold.sock")
    with (folder / "cold.log").open("wb") as log:
        process = subprocess.Popen(
            [*serve_command(ENGINE_HOME), *OPTIONS, "--uds", server.path],
            env=serve_environment(environment), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    server.pid = process.pid
    try:
        assert server.wait().complete() == plain.wait(LONG).complete()
        assert server.processors() == plain.processors()
        process.terminate()
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "as it is" not in (folder / "cold.log").read_text()


def test_in_doubt_a_cold_start_is_vllms_own(environment):
    command = [*serve_command(ENGINE_HOME), "--help"]
    env = serve_environment(environment | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"})
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line == "pilotlight_engine: vLLM is started as it is: VLLM_WORKER_MULTIPROC_METHOD is spawn\n"
        while b"vllm.entrypoints.openai.api_server" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            os.sched_yield()
        process.kill()
