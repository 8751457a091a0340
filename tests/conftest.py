"""The one real installation that every test with a real engine shares: vLLM starts once for all of them."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, settings

from .containers import Podman, running_podman
from .postgresql import PostgresqlServer, postgresql_server
from .timeouts import GRACE_S

STDERR = pytest.StashKey[int]()
START_TIMEOUT_S = 420
"""A cold engine on a busy two-core machine; the tests wait for the start and not for this."""


# How long an example takes is the machine's business; everything else is as it was, in CI as Hypothesis has it there.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_configure(config):
    # A copy: while a test runs, the descriptor itself leads to what is captured of that test.
    config.stash[STDERR] = os.dup(2)


def pytest_unconfigure(config):
    os.close(config.stash[STDERR])


def pytest_timeout_set_timer(item, settings):
    faulthandler.dump_traceback_later(settings.timeout + GRACE_S, exit=True, file=item.config.stash[STDERR])


def pytest_timeout_cancel_timer(item):
    faulthandler.cancel_dump_traceback_later()


class LiveInstallation:
    """`pilotlight up` as a process of its own, and a client with its admin key."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home = home
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PILOTLIGHT_", "RUNPOD_"))
        } | {"PILOTLIGHT_HOME": str(home), **environment}
        self.log = (home / "up.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pilotlight", "up", "--json", "--port", "0"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (home / "up.log").read_text()
        self.facts = json.loads(line)
        self.url = self.facts["url"]
        self.key = (home / "cli.key").read_text().strip()
        self.headers = {"authorization": f"Bearer {self.key}"}
        self.api = httpx.Client(
            base_url=self.url,
            headers=self.headers,
            timeout=httpx.Timeout(10, read=START_TIMEOUT_S),
            trust_env=False,
        )

    def deploy(self, model: str, name: str, **settings: object) -> dict:
        answer = self.api.post("/pilotlight/v1/endpoints", json={"model": model, "name": name, **settings})
        assert answer.status_code == 201, answer.text
        return answer.json()

    def stop(self) -> None:
        self.api.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=30)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()
            self.log.close()


@contextlib.contextmanager
def live_installation(**environment: str) -> Iterator[LiveInstallation]:
    """A fresh installation in a folder with a short path, as Unix sockets need it."""
    with tempfile.TemporaryDirectory(prefix="pl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        installation = LiveInstallation(Path(folder), environment)
        try:
            yield installation
        finally:
            installation.stop()


@pytest.fixture
def live() -> Iterator[LiveInstallation]:
    """A fresh installation for one test."""
    with live_installation() as installation:
        yield installation


@pytest.fixture(scope="session")
def installation() -> Iterator[LiveInstallation]:
    """The installation that all tests with a real engine share; nothing runs in it at first."""
    with live_installation() as installation:
        yield installation


def await_engine(installation: LiveInstallation, endpoint: dict) -> None:
    """Starts a worker of the endpoint and returns when it answers; else tells all there is to know."""
    answer = installation.api.get(f"/v2/{endpoint['id']}/openai/health")
    if answer.status_code != 200:
        worker = installation.api.get(f"/v2/serverless/{endpoint['id']}/workers").text
        log = (installation.home / "up.log").read_text()
        pytest.fail(f"the engine did not start: {answer.text}\n{worker}\n{log}")


@pytest.fixture(scope="session")
def real(installation: LiveInstallation) -> LiveInstallation:
    """That installation with a ready worker of the built-in model, `real.endpoint`; never a second one, since
    tests compare what its engine's metrics say."""
    installation.endpoint = installation.deploy(
        "pilotlight/ember", "ember", idle_timeout_s=3600, max=1, execution_timeout_ms=600_000
    )
    await_engine(installation, installation.endpoint)
    return installation


@pytest.fixture(scope="session")
def ember_url(real: LiveInstallation) -> str:
    """OpenAI base URL of the built-in model."""
    return real.endpoint["openai_url"]


@pytest.fixture(scope="session")
def ember_headers(real: LiveInstallation) -> dict[str, str]:
    """Headers with a key for it."""
    return dict(real.headers)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresqlServer]:
    """A PostgreSQL server of our own, one per session, with a migrated database to copy."""
    with postgresql_server() as server:
        server.make_template()
        yield server


@pytest.fixture
def postgresql_url(postgresql: PostgresqlServer) -> Iterator[str]:
    """The url of a fresh, migrated database."""
    url = postgresql.new_database()
    yield url
    postgresql.drop_database(url)


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """A real container engine, one service per session; the storage with its images is shared by all."""
    with running_podman() as podman:
        yield podman
