"""Real launchers for tests, with a small program of the test in the place of vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pilotlight.engines.launching import launcher_command, launcher_environment
from pilotlight.engines.manifest import MANIFEST_FORMAT, MANIFEST_NAME
from pilotlight.worker.config import WorkerConfig, planned_environment

_TARGET = """
import os, signal, threading, time
while (path := os.environ.get("TEST_IMPORTS_UNTIL")) and not os.path.exists(path):
    time.sleep(0.01)
if os.environ.get("TEST_WITH_THREAD"):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
forks = 0
def forked():
    global forks
    forks += 1
    # The first is the launcher's own trial.
    if forks == 2:
        os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("TEST_DIES_AT_FORK"):
    os.register_at_fork(after_in_parent=forked)
"""


FAKE_ENGINE = """
def run():
    if os.environ.get("TEST_FORKED") == "fails":
        print("something of the fork does not work")
        raise SystemExit(3)
    if os.environ.get("TEST_FORKED") == "hangs":
        threading.Event().wait()
    import sys
    from pilotlight.testing.fake_engine import main
    raise SystemExit(main(sys.argv[1:]))
"""
"""The fake engine to be forked; `TEST_FORKED` in its environment makes it misbehave, as only forked ones do."""

_PLAIN = """
import sys
from pilotlight.testing.fake_engine import main
raise SystemExit(main(sys.argv[1:]))
"""


def own_program() -> str:
    """The Python of this process, as /proc shows it."""
    return os.fsdecode(Path("/proc/self/cmdline").read_bytes().partition(b"\0")[0])


def make_home(folder: Path) -> Path:
    """An engine's environment with a Python that is the one of these tests, under another name."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", folder)
    describe(folder)
    return folder


def describe(home: Path, platform: str = "cpu") -> None:
    """Writes an engine's manifest."""
    manifest = {
        "format": MANIFEST_FORMAT, "vllm": "0.32.0", "torch": "2.13.0", "platform": platform, "flags": {},
        "architectures": [], "registered": {},
    }  # fmt: skip
    (home / MANIFEST_NAME).write_text(json.dumps(manifest))


class Launcher:
    """One launcher; as its gateway, this holds its standard input."""

    def __init__(self, process: asyncio.subprocess.Process, path: Path) -> None:
        self.process = process
        self.path = path
        self.pid = process.pid

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def until(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(20):
            while line := await self.process.stdout.readline():
                said: dict[str, Any] = json.loads(line)
                if said["event"] == event:
                    return said
        raise AssertionError(f"the launcher ended without saying {event}")

    async def kill(self) -> None:
        if self.alive:
            self.process.kill()
        await self.process.wait()


class Launchers:
    """Starts launchers and ends them.

    Args:
        tmp_path: The test's folder.
        program: Source of a module; its function `run` stands for vLLM.
        variables: More of what a worker program has in its environment.
    """

    worker_id = "w1"

    def __init__(self, tmp_path: Path, program: str = FAKE_ENGINE, **variables: str) -> None:
        self.home = make_home(tmp_path / "launchable")
        self.site = tmp_path / "site"
        self._program = program
        self._variables = variables
        # Socket paths are limited to 107 bytes, which tmp_path may exceed.
        self.folder = Path(tempfile.mkdtemp(prefix="pl-"))
        self._started: list[Launcher] = []

    async def __aenter__(self) -> Self:
        self.site.mkdir()
        (self.site / "launchable.py").write_text(_TARGET + self._program)
        entry_point = self.site / "vllm" / "entrypoints" / "openai" / "api_server.py"
        entry_point.parent.mkdir(parents=True)
        entry_point.write_text(_PLAIN)
        metadata = self.site / "vllm-0.32.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for launcher in self._started:
            await launcher.kill()
        shutil.rmtree(self.folder)

    def variables(self) -> dict[str, str]:
        """What a worker program needs of its environment so that these launchers suit it."""
        return {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "PILOTLIGHT_ENGINE_HOME": str(self.home),
            "PYTHONPATH": str(self.site),
            # Without it, Python would set it at its start, in a launcher and in a worker program alike.
            "LC_CTYPE": "C.UTF-8",
            **self._variables,
        }

    def environment(self, **variables: str) -> dict[str, str]:
        """The environment of an engine of such a worker program."""
        own = {
            **self.variables(),
            "MODEL_NAME": "org/model",
            "RUNPOD_POD_ID": self.worker_id,
            "RUNPOD_WEBHOOK_GET_JOB": "http://h/job-take/$ID?x",
            **variables,
        }
        config = WorkerConfig.from_environment(own, python=sys.executable)
        return planned_environment(
            config, config.environment, engine_key="none", offline=True, platform="cpu"
        )

    def touch(self, name: str) -> None:
        """Ends the imports of launchers that wait for it."""
        (self.folder / name).touch()

    async def start(
        self,
        *,
        imports_until: str = "",
        with_thread: bool = False,
        dies_at_fork: bool = False,
        **variables: str,
    ) -> Launcher:
        """A launcher that listens; ready only where it is not told to wait.

        Args:
            imports_until: A file that ends its imports; "" = they end by themselves.
            with_thread: It has a thread that no fork would survive.
            dies_at_fork: It is killed in the moment after it has forked an engine.
            variables: Differences of its environment.
        """
        path = self.folder / f"{len(self._started)}.sock"
        odd = {
            "TEST_IMPORTS_UNTIL": str(self.folder / imports_until) if imports_until else "",
            "TEST_WITH_THREAD": "1" if with_thread else "",
            "TEST_DIES_AT_FORK": "1" if dies_at_fork else "",
        }
        process = await asyncio.create_subprocess_exec(
            *launcher_command(self.home, path),
            "--target",
            "launchable:run",
            env=launcher_environment(self.environment(**variables)) | odd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        launcher = Launcher(process, path)
        self._started.append(launcher)
        await launcher.until("listening" if imports_until else "ready")
        return launcher
