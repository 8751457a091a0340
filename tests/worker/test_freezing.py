"""Freezing and thawing one engine: every process of it, every way that ends otherwise, and what meets a freeze.

The engine is the fake one as a real process; nothing of the worker program is replaced.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from pilotlight.worker import freezing
from pilotlight.worker.engine import Engine, spawn
from pilotlight.worker.errors import EngineGoneError
from pilotlight.worker.freezing import Freezer, FreezeRefusedError, Refusal
from pilotlight.worker.log import LogSink

FAKE = ("-m", "pilotlight.testing.fake_engine")

PATIENCE = 30.0
"""Seconds for a token where it is not the time that is tested."""

RUN_FAKE = "import sys; from pilotlight.testing import fake_engine; sys.exit(fake_engine.main(sys.argv[1:]))"

RESTLESS = (
    "import os, sys, time\n"
    "if os.fork() == 0:\n"
    "    number = 0\n"
    "    while os.getppid() != 1:\n"
    "        number += 1\n"
    "        print('restless', number, flush=True)\n"
    "        if os.fork() == 0:\n"
    "            time.sleep(0.02)\n"
    "            os._exit(0)\n"
    "        time.sleep(0.001)\n"
    "    os._exit(0)\n"
)
"""Before the engine: a process of its session that prints numbered lines and forks a short-lived child for each."""

HANGING = (
    "import os, signal\nsignal.signal(signal.SIGCONT, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))\n"
)
"""Before the engine: when it is to go on, it stops again before it does anything else."""

STUCK = (
    "import os, sys\n"
    "if os.fork() == 0:\n"
    "    fifo = os.environ['STUCK_FIFO']\n"
    "    print('stuck', flush=True)\n"
    "    opened = [(os.POSIX_SPAWN_OPEN, 0, fifo, os.O_RDONLY, 0)]\n"
    "    os.posix_spawn('/bin/sleep', ['sleep', '600'], os.environ, file_actions=opened)\n"
    "    os._exit(0)\n"
)
"""Before the engine: a process that waits inside the kernel, for a child that waits for the fifo's other end."""


class Cell:
    """One engine and its freezer."""

    def __init__(self, engine: Engine, folder: Path, lines: list[bytes]) -> None:
        self.engine = engine
        self.folder = folder
        self.lines = lines
        self.in_hand = ""
        self.failures: list[str] = []
        self.woken: list[str] = []
        self.freezer = self.build(None)

    def build(self, sleep_level: int | None) -> Freezer:
        freezer = Freezer(
            self.engine,
            LogSink(),
            sleep_level=sleep_level,
            in_hand=lambda: self.in_hand,
            on_failed=self.failures.append,
            on_woken=self.woken.append,
        )
        freezer.open()
        return freezer

    def states(self) -> set[str]:
        """States of all its processes, as the kernel shows them."""
        found = set()
        for pid in self.engine.processes():
            try:
                found.add(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0].decode())
            except OSError:
                continue
        return found

    async def ask(self, prompt: str = "a b") -> str:
        body = json.dumps({"prompt": prompt}).encode()
        status, answer = await self.engine.ask("POST", "/v1/completions", body=body)
        assert status == 200
        return str(json.loads(answer)["choices"][0]["text"])

    def happened(self, *what: str) -> list[dict[str, Any]]:
        path = self.folder / "engine.jsonl"
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return [entry for entry in entries if entry["what"] in what]

    async def until_line(self, text: bytes) -> None:
        async with asyncio.timeout(20):
            while not any(text in line for line in self.lines):
                await asyncio.sleep(0.005)


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """Starts an engine and waits until it is healthy; all of it is ended after the test."""
    engines: list[Engine] = []
    folder = Path(tempfile.mkdtemp(prefix="pl-"))

    async def run(*program: str, **variables: str) -> Cell:
        key = secrets.token_urlsafe(32)
        environment = {
            "PATH": os.environ["PATH"],
            "VLLM_API_KEY": key,
            "FAKE_ENGINE_RECORD": str(folder / "engine.jsonl"),
            **variables,
        }
        path = folder / "engine.sock"
        command = (sys.executable, *(program or FAKE), "--uds", str(path))
        lines: list[bytes] = []
        engine = Engine(command=command, socket_path=path, key=key, on_line=lines.append)
        engines.append(engine)
        await engine.start(lambda: spawn(command, environment))
        async with asyncio.timeout(20):
            while not await engine.healthy():
                await asyncio.sleep(0.01)
        return Cell(engine, folder, lines)

    yield run
    for engine in engines:
        await engine.stop(term_seconds=0.0)
        assert engine.processes() == {}
    shutil.rmtree(folder)


Start = Callable[..., Any]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a thaw that nobody bounds."""
    monkeypatch.setattr(freezing, "THAW_SECONDS", PATIENCE)


async def refused(freezer: Freezer) -> Refusal:
    with pytest.raises(FreezeRefusedError) as caught:
        await freezer.freeze()
    return caught.value.reason


async def test_every_process_stands_still_and_goes_on_where_it_was(start: Start) -> None:
    """Also those that are forked while the others are being stopped; no line of the log is lost."""
    cell = await start("-c", RESTLESS + RUN_FAKE)
    await cell.until_line(b"restless 9")
    for _ in range(3):
        frozen = await cell.freezer.freeze()
        assert cell.freezer.frozen
        assert cell.states() == {"T"}
        assert (frozen.memory_bytes > 10_000_000, frozen.slept) == (True, False)
        await cell.freezer.thaw(PATIENCE)
        assert not cell.freezer.frozen
        assert await cell.ask() == "a b"
    printed = [int(line.split()[1]) for line in cell.lines if line.startswith(b"restless")]
    assert printed == list(range(1, len(printed) + 1))


async def test_a_process_that_cannot_be_stopped_leaves_the_engine_hot(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freezing, "STOP_SECONDS", 0.1)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    cell = await start("-c", STUCK + RUN_FAKE, STUCK_FIFO=str(fifo))
    await cell.until_line(b"stuck")
    async with asyncio.timeout(20):
        while "D" not in cell.states():
            await asyncio.sleep(0.005)
    with pytest.raises(FreezeRefusedError, match="state D") as caught:
        await cell.freezer.freeze()
    assert caught.value.reason is Refusal.UNABLE
    assert "T" not in cell.states()
    assert await cell.ask() == "a b"
    with fifo.open("wb"):
        monkeypatch.undo()
        await cell.freezer.freeze()
    assert cell.states() == {"T"}


async def test_idle_connections_to_a_frozen_engine_are_closed(start: Start) -> None:
    """vllm-worker.md §7: the engine would close them after the thaw, mostly the one that is just used again."""

    def sockets() -> int:
        return sum(
            entry.readlink().name.startswith("socket:")
            for entry in Path("/proc/self/fd").iterdir()
            if entry.is_symlink()
        )

    cell = await start()
    await cell.ask()
    gc.collect()
    before = sockets()
    await cell.freezer.freeze()
    assert sockets() == before - 1


async def test_freezing_and_thawing_twice(start: Start) -> None:
    """The second freeze is refused; a thaw of what is hot is done already."""
    cell = await start()
    assert await cell.freezer.thaw(PATIENCE) == 0
    await cell.freezer.freeze()
    assert await refused(cell.freezer) is Refusal.FROZEN
    first, second = await asyncio.gather(cell.freezer.thaw(PATIENCE), cell.freezer.thaw(PATIENCE))
    assert (first > 0, second) == (True, 0)
    assert len(cell.happened("request")) == 1


async def test_refused_while_something_is_in_hand_or_nothing_is_served(start: Start) -> None:
    cell = await start()
    cell.in_hand = "1 job"
    assert await refused(cell.freezer) is Refusal.BUSY
    cell.in_hand = ""
    cell.freezer.close()
    assert await refused(cell.freezer) is Refusal.NOT_SERVING
    assert cell.happened("request") == []
    assert cell.freezer.freezes == 0


@pytest.mark.parametrize("looks", [1, 2])
async def test_a_freeze_that_work_overtakes_gives_itself_up(start: Start, looks: int) -> None:
    """The look before the engine is stopped sees it, or the one after."""
    cell = await start(VLLM_SERVER_DEV_MODE="1")
    answers = iter([""] * looks)
    cell.freezer = Freezer(
        cell.engine,
        LogSink(),
        sleep_level=1,
        in_hand=lambda: next(answers, "1 job"),
        on_failed=cell.failures.append,
        on_woken=cell.woken.append,
    )
    cell.freezer.open()
    freeze = asyncio.create_task(refused(cell.freezer))
    await asyncio.sleep(0)
    await cell.freezer.awake("job")
    assert await freeze is Refusal.BUSY
    assert "T" not in cell.states()
    assert await cell.ask() == "a b"
    assert [entry["what"] for entry in cell.happened("sleep", "wake_up")] == ["sleep", "wake_up"]
    assert (cell.failures, cell.woken) == ([], [])


async def test_work_that_comes_to_a_frozen_engine_thaws_it_once(start: Start) -> None:
    cell = await start()
    await cell.freezer.freeze()
    # Also when there is nothing to freeze for any more: a job may come to a worker that was told to end.
    cell.freezer.close()
    await asyncio.gather(cell.freezer.awake("job"), cell.freezer.awake("request"))
    assert cell.woken == ["job"]
    assert await cell.ask() == "a b"
    await cell.freezer.until_hot()


async def test_an_engine_that_does_not_answer_after_the_thaw_has_failed(start: Start) -> None:
    cell = await start(FAKE_ENGINE_WARM_UP="hang")
    await cell.freezer.freeze()
    with pytest.raises(EngineGoneError, match="no token within 1 s"):
        await cell.freezer.thaw(1)
    assert len(cell.failures) == 1
    # Nobody waits for it a second time, and nobody is sent there.
    for attempt in (cell.freezer.thaw(PATIENCE), cell.freezer.awake("job")):
        with pytest.raises(EngineGoneError):
            await attempt
    assert len(cell.failures) == 1
    assert len(cell.happened("request")) == 1
    assert await cell.freezer.leave() is False


async def test_an_engine_that_was_killed_while_frozen_is_gone(start: Start) -> None:
    cell = await start()
    await cell.freezer.freeze()
    os.kill(cell.engine.pid, signal.SIGKILL)
    await cell.engine.wait()
    with pytest.raises(EngineGoneError, match="not running"):
        await cell.freezer.thaw(PATIENCE)
    assert len(cell.failures) == 1


async def test_an_engine_that_breaks_off_its_first_answer_has_failed(start: Start) -> None:
    cell = await start(FAKE_ENGINE_WARM_UP="die")
    await cell.freezer.freeze()
    with pytest.raises(EngineGoneError):
        await cell.freezer.thaw(PATIENCE)
    assert len(cell.failures) == 1


async def test_what_was_begun_is_finished_when_the_asker_is_gone(start: Start) -> None:
    cell = await start()
    for change in (cell.freezer.freeze, lambda: cell.freezer.thaw(PATIENCE)):
        asker = asyncio.create_task(change())
        await asyncio.sleep(0)
        asker.cancel()
        await asyncio.gather(asker, return_exceptions=True)
        assert asker.cancelled()
    # The second waited for the first, and this one for both.
    assert await cell.freezer.thaw(PATIENCE) == 0
    assert cell.freezer.freezes == 1
    assert len(cell.happened("request")) == 1


async def test_whoever_ends_the_engine_gives_up_what_is_under_way(start: Start) -> None:
    """Then an engine that stands still is killed as it is, and one that is hot may end by itself."""
    cell = await start()
    assert await cell.freezer.leave() is True
    assert await refused(cell.freezer) is Refusal.NOT_SERVING
    cell.freezer.open()
    freeze = asyncio.create_task(cell.freezer.freeze())
    while not cell.freezer.freezes:
        await asyncio.sleep(0)
    assert await cell.freezer.leave() is False
    with pytest.raises(EngineGoneError, match="the worker ends"):
        await freeze
    await cell.engine.stop(term_seconds=0.0)
    assert cell.happened("sigterm") == []


@pytest.mark.parametrize(
    ("level", "steps"),
    [
        (1, ["sleep", "wake_up []"]),
        (
            2,
            ["sleep", "wake_up ['weights']", "collective_rpc", "wake_up ['kv_cache']", "reset_prefix_cache"],
        ),
    ],
)
async def test_an_engine_with_sleep_mode_sleeps_first_and_wakes_up_after(
    start: Start, level: int, steps: list[str]
) -> None:
    """At level 2 the weights are read again, or its answers would be nonsense."""
    cell = await start(VLLM_SERVER_DEV_MODE="1")
    freezer = cell.build(level)
    assert (await freezer.freeze()).slept
    assert cell.states() == {"T"}
    await freezer.thaw(PATIENCE)
    assert await cell.ask() == "a b"
    entries = cell.happened("sleep", "wake_up", "collective_rpc", "reset_prefix_cache")
    assert [f"{each['what']} {each['tags']}" if "tags" in each else each["what"] for each in entries] == steps
    assert entries[0]["level"] == level


@pytest.mark.parametrize(
    ("variables", "steps"),
    [
        ({"VLLM_SERVER_DEV_MODE": "1", "FAKE_ENGINE_SLEEPLESS": "1"}, ["sleep", "wake_up"]),
        # Without the routes it did nothing, so there is nothing to undo.
        ({}, []),
    ],
)
async def test_a_sleep_that_fails_leaves_the_engine_hot(
    start: Start, variables: dict[str, str], steps: list[str]
) -> None:
    cell = await start(**variables)
    freezer = cell.build(1)
    with pytest.raises(
        FreezeRefusedError, match=r"told to sleep and answered with status (500|404)"
    ) as caught:
        await freezer.freeze()
    assert caught.value.reason is Refusal.UNABLE
    assert [entry["what"] for entry in cell.happened("sleep", "wake_up")] == steps
    assert await cell.ask() == "a b"
    assert not freezer.frozen


async def test_an_engine_that_slept_and_hangs_has_failed_without_waiting_for_the_wake_up(
    start: Start,
) -> None:
    """Waking up may take long, a sign of life may not."""
    cell = await start("-c", HANGING + RUN_FAKE, VLLM_SERVER_DEV_MODE="1")
    freezer = cell.build(1)
    await freezer.freeze()
    with pytest.raises(EngineGoneError, match=r"did not say within 0\.2 s that it is healthy"):
        await freezer.thaw(0.2)
    assert cell.happened("wake_up") == []
