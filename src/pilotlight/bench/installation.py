"""A Pilotlight of its own for a benchmark: `pilotlight up` in a temporary folder with default settings."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from pilotlight.bench.errors import BenchError
from pilotlight.bench.processes import Bench, environment
from pilotlight.client.api import PilotlightClient
from pilotlight.client.discovery import KEY_FILE
from pilotlight.client.models import Start
from pilotlight.settings import load_settings

_UP = "from pilotlight.cli import main; main()"


class Installation:
    """A running gateway; ended with its `Bench`.

    Args:
        bench: Where it runs.
        name: Of its data folder; another installation of that name must have ended, and is continued.
        settings: Environment variables beside the defaults.

    Attributes:
        url: Base URL.
        port: TCP port on loopback.
        pid: The one process that is gateway and loops; workers are not in it.
        client: A client with an admin key.
    """

    def __init__(self, bench: Bench, name: str = "pilotlight", **settings: str) -> None:
        home = bench.folder / name
        home.mkdir(mode=0o700, exist_ok=True)
        engine_home = str(load_settings().engine_home)
        self.child = bench.start(
            name,
            # Not the script beside our interpreter, which may be installed elsewhere or not at all.
            [sys.executable, "-c", _UP, "up", "--port", "0", "--json"],
            env=environment(PILOTLIGHT_HOME=str(home), PILOTLIGHT_ENGINE__HOME=engine_home, **settings),
            stdout=True,
        )
        self.url: str = json.loads(self.child.read_line())["url"]
        self.port = urlsplit(self.url).port or 80
        self.pid = self.child.pid
        self._admin_key = (home / KEY_FILE).read_text(encoding="ascii").strip()
        self.client = PilotlightClient(self.url, self._admin_key)
        bench.close_at_end(self.client.close)

    def deploy(self, **spec: Any) -> str:
        """The id of a new endpoint; fields as `POST /pilotlight/v1/endpoints` takes them."""
        return self.client.create_endpoint(spec)["id"]

    def run_key(self, *endpoint_ids: str) -> str:
        """The secret of a key that may only call these endpoints, as a user's program would have it."""
        key = self.client.create_key(name="bench", scope="run", endpoint_ids=list(endpoint_ids)).get("key")
        assert key is not None, "the secret comes with the creation"
        return key

    def requests(self, endpoint_id: str, *, limit: int = 1000) -> list[dict[str, Any]]:
        """Rows of the request log, oldest first; they are written about once a second."""
        answer = httpx.get(
            f"{self.url}/pilotlight/v1/requests",
            params={"endpoint": endpoint_id, "limit": limit},
            headers={"authorization": f"Bearer {self._admin_key}"},
            trust_env=False,
            timeout=30,
        )
        answer.raise_for_status()
        rows: list[dict[str, Any]] = answer.json()["requests"]
        return sorted(rows, key=lambda row: row["arrival_ms"])

    def wait(self, what: str, met: Callable[[], bool], *, timeout_s: float) -> None:
        """Return when the condition is met.

        Raises:
            BenchError: It was not, or the gateway ended.
        """
        deadline = time.monotonic() + timeout_s
        while not met():
            if not self.child.running:
                raise self.child.error("has ended")
            if time.monotonic() > deadline:
                raise BenchError(f"waited {timeout_s:g} s in vain for: {what}")
            time.sleep(0.05)

    def launcher_pids(self) -> list[int]:
        """Processes of launchers, whatever they are doing."""
        return [one["pid"] for one in self.client.launchers() if one["pid"] is not None]

    def wait_launcher(self, *, timeout_s: float = 120) -> None:
        """Return when a launcher has imported everything."""
        self.wait(
            "a launcher to have imported everything",
            lambda: any(one["state"] == "ready" for one in self.client.launchers()),
            timeout_s=timeout_s,
        )

    def worker_ids(self, endpoint_id: str) -> list[str]:
        """Living workers of an endpoint."""
        return [worker["id"] for worker in self.client.workers(endpoint_id)]

    def wait_frozen(self, endpoint_id: str, *, timeout_s: float = 60) -> None:
        """Return when the endpoint's one worker is frozen."""
        self.wait(
            f"the worker of endpoint {endpoint_id} to be frozen",
            lambda: self.client.endpoint(endpoint_id)["workers"] == {"frozen": 1},
            timeout_s=timeout_s,
        )

    def start_after(self, endpoint_id: str, earlier: Sequence[Start]) -> Start:
        """The start that came after the latest of these, once it is on record."""
        found: list[Start] = []

        def newer() -> bool:
            found[:] = self.client.starts(endpoint_id, limit=1)
            return bool(found) and found[0]["stages"][0] not in [start["stages"][0] for start in earlier]

        self.wait(f"a start of endpoint {endpoint_id} to be recorded", newer, timeout_s=10)
        return found[0]

    def wait_no_workers(self, endpoint_id: str, *, timeout_s: float = 60) -> None:
        """Return when the endpoint is at zero and its last worker's processes are gone."""
        self.wait(
            f"endpoint {endpoint_id} to have no workers",
            lambda: not self.client.endpoint(endpoint_id)["workers"],
            timeout_s=timeout_s,
        )
