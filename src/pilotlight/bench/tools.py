"""Programs from outside that a benchmark needs: where they are, how they start, what they print.

Two kinds: what the system's package manager installs (`find_tools`, `Nginx`, wrk's report), and proxies in
environments of their own (`VllmRouter`, `LiteLlm`; `bench.environments`).
"""

from __future__ import annotations

import json
import os
import pwd
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pilotlight.bench.errors import BenchError
from pilotlight.bench.processes import Bench, Child, children_of, environment, free_port
from pilotlight.cli.root import UsageError

HARNESS = Path(str(files("pilotlight.bench"))) / "harness"

_ADMIN_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")
"""Where distributions put nginx, and many an ordinary user's path does not look."""

_ROUTER_START_S = 120.0
_LITELLM_START_S = 300.0
"""It imports for twenty seconds on a fast machine."""


def find_tools(*names: str) -> dict[str, str]:
    """Paths of these programs.

    Raises:
        UsageError: Some are not installed; names all of them and the command that installs them.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_ADMIN_FOLDERS])
    found = {name: shutil.which(name, path=path) for name in names}
    missing = [name for name, where in found.items() if where is None]
    if missing:
        raise UsageError(
            f"this benchmark needs {' and '.join(missing)}, not found on this machine; on Debian and Ubuntu: "
            f"apt-get install {' '.join(missing)}"
        )
    return {name: where for name, where in found.items() if where is not None}


class Nginx:
    """nginx with one worker in front of one engine; ended with its `Bench`.

    Args:
        bench: Where it runs.
        program: Path of nginx.
        engine: Where it passes everything: `127.0.0.1:PORT`, or `unix:PATH` of a socket.
        key: The engine's key, sent with every request instead of the client's; None leaves that alone.

    Attributes:
        port: Where it listens.
        pids: Master and worker.
    """

    def __init__(self, bench: Bench, program: str, engine: str, *, key: str | None = None) -> None:
        self.port = free_port()
        folder = bench.folder / f"nginx-{self.port}"
        folder.mkdir(mode=0o755)
        text = (HARNESS / "nginx.conf").read_text(encoding="ascii")
        values = {
            "ENGINE": engine,
            "LISTEN_PORT": str(self.port),
            "KEY_HEADER": "" if key is None else f'proxy_set_header Authorization "Bearer {key}";',
            # Started by root, its worker would be somebody else, who may not reach an engine's socket.
            "USER": "" if os.geteuid() else f"user {pwd.getpwuid(0).pw_name};",
        }
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        (folder / "nginx.conf").write_text(text, encoding="ascii")
        self._child: Child = bench.start(
            f"nginx {self.port}", [program, "-c", str(folder / "nginx.conf"), "-p", str(folder)]
        )
        self._child.wait_port(self.port)

    @property
    def pids(self) -> list[int]:
        """Master and worker."""
        return [self._child.pid, *children_of(self._child.pid)]


class VllmRouter:
    """vLLM's Rust router in front of engines; ended with its `Bench`.

    Args:
        bench: Where it runs.
        python: Of the environment in which it is installed.
        engine_ports: Ports of its engines on loopback.
        policy: How it chooses between them.

    Attributes:
        port: Where it listens.
        pids: Its one process.

    Raises:
        BenchError: It did not start.
    """

    def __init__(self, bench: Bench, python: Path, engine_ports: Sequence[int], policy: str) -> None:
        self.port = free_port()
        child = bench.start(
            f"vllm-router {policy}",
            [
                *_WITH_ALL_DESCRIPTORS,
                *(str(python.parent / "vllm-router"), "--host", "127.0.0.1", "--port", str(self.port)),
                *("--prometheus-port", str(free_port()), "--log-level", "warning", "--policy", policy),
                *("--worker-urls", *(f"http://127.0.0.1:{port}" for port in engine_ports)),
            ],
        )
        # It listens once it has found all its engines healthy.
        child.wait_port(self.port, _ROUTER_START_S)
        self.pids = [child.pid]


class LiteLlm:
    """LiteLLM's proxy with one worker in front of one engine; ended with its `Bench`.

    Args:
        bench: Where it runs.
        python: Of the environment in which it is installed.
        engine_port: Port of its engine on loopback.
        model: The model's name.

    Attributes:
        port: Where it listens.
        key: The key that it asks for.
        pids: Its processes.

    Raises:
        BenchError: It did not start.
    """

    def __init__(self, bench: Bench, python: Path, engine_port: int, model: str) -> None:
        self.port = free_port()
        self.key = f"sk-{secrets.token_hex(32)}"
        engine = {"api_base": f"http://127.0.0.1:{engine_port}/v1", "api_key": "none"}
        config = {
            "model_list": [{"model_name": model, "litellm_params": {"model": f"openai/{model}", **engine}}],
            "general_settings": {"master_key": self.key},
        }
        # The other proxies write no access log either.
        quiet = {"level": "WARNING"}
        logs = {
            "version": 1,
            "disable_existing_loggers": False,
            "loggers": {"uvicorn.access": quiet, "uvicorn.error": quiet},
        }
        paths = [bench.folder / name for name in ("litellm.json", "litellm-logs.json")]
        for path, content in zip(paths, (config, logs), strict=True):
            path.write_text(json.dumps(content), encoding="utf-8")
        self._child = bench.start(
            "litellm",
            [
                *(str(python.parent / "litellm"), "--host", "127.0.0.1", "--port", str(self.port)),
                *("--num_workers", "1", "--config", str(paths[0]), "--log_config", str(paths[1])),
            ],
            # Its price list comes with it; without this it is fetched at each start.
            env=environment(LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_LOG="ERROR"),
        )
        self._child.wait_port(self.port, _LITELLM_START_S)

    @property
    def pids(self) -> list[int]:
        """The process that listens, and what it has started."""
        return [self._child.pid, *children_of(self._child.pid)]


_WITH_ALL_DESCRIPTORS = ("/bin/sh", "-c", 'ulimit -n "$(ulimit -H -n)"; exec "$0" "$@"')
"""Put before a program that does not raise its limit of open files itself."""


@dataclass(frozen=True, slots=True)
class WrkResult:
    """What wrk saw.

    Attributes:
        requests: Answered requests.
        requests_per_s: Per second.
        latency_ms_p50: Median latency, at as many connections as there were.
        latency_ms_p99: 99th percentile.
        failed: Answers with another status than 2xx or 3xx, and socket errors.
    """

    requests: int
    requests_per_s: float
    latency_ms_p50: float
    latency_ms_p99: float
    failed: int


_WRK_UNITS_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


def parse_wrk(text: str) -> WrkResult:
    """The figures of wrk's report with `--latency`.

    Raises:
        BenchError: It is not such a report.
    """

    def find(pattern: str) -> re.Match[str]:
        match = re.search(pattern, text, re.MULTILINE)
        if match is None:
            raise BenchError(f"wrk printed no {pattern!r}:\n{text}")
        return match

    def latency(percent: int) -> float:
        match = find(rf"^\s+{percent}%\s+([\d.]+)(us|ms|s|m)\s*$")
        return float(match[1]) * _WRK_UNITS_MS[match[2]]

    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    return WrkResult(
        requests=int(find(r"^\s*(\d+) requests in")[1]),
        requests_per_s=float(find(r"^Requests/sec:\s+([\d.]+)")[1]),
        latency_ms_p50=latency(50),
        latency_ms_p99=latency(99),
        failed=(int(bad[1]) if bad else 0) + (sum(map(int, errors.groups())) if errors else 0),
    )
