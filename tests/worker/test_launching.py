"""The worker program's side of the protocol with a launcher, and what it does about one that misbehaves.

The real launcher, with a small program in the place of vLLM; what it would never say comes from a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.worker.launchers import Launchers, own_program

from pilotlight.worker import launching
from pilotlight.worker.engine import Engine, find_processes
from pilotlight.worker.launching import Hello, LaunchRefusedError, LaunchRequest, launch, objection

PROGRAM = """
import os, signal, subprocess, sys, time
def run():
    print("began", *sys.argv[1:], os.getcwd(), os.environ["COLOUR"], flush=True)
    how = sys.argv[1]
    if how == "exit":
        sys.exit(int(sys.argv[2]))
    if how == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("child", child.pid, flush=True)
    while True:
        time.sleep(600)
"""

Launch = Callable[..., Any]


@pytest.fixture
async def launchers(tmp_path: Path) -> AsyncIterator[Launchers]:
    async with Launchers(tmp_path, PROGRAM) as launchers:
        yield launchers


class Started:
    """An engine from a launcher, and the lines it printed."""

    def __init__(self, engine: Engine, lines: list[str]) -> None:
        self.engine = engine
        self.lines = lines

    @property
    def pid(self) -> int:
        assert self.engine.pid is not None
        return self.engine.pid

    async def until_said(self, word: str) -> str:
        async with asyncio.timeout(20):
            while not (found := [line for line in self.lines if line.startswith(word)]):
                await asyncio.sleep(0.01)
        return found[0]


@pytest.fixture
async def start(launchers: Launchers, tmp_path: Path) -> AsyncIterator[Launch]:
    """Has an engine launched; ended after the test."""
    started: list[Engine] = []

    async def start(path: Path, *arguments: str, **changes: Any) -> Started:
        request = replace(request_for(launchers, *arguments), **changes)
        lines: list[str] = []
        engine = Engine(
            command=["engine", *arguments],
            socket_path=tmp_path / "engine.sock",
            key=request.key,
            on_line=lambda line: lines.append(line.decode()),
        )
        started.append(engine)
        await engine.start(
            lambda: launch(path, request, deadline=soon(), on_late=lambda: lines.append("late"))
        )
        return Started(engine, lines)

    yield start
    for engine in started:
        await engine.stop(term_seconds=0)


def request_for(launchers: Launchers, *arguments: str) -> LaunchRequest:
    key = secrets.token_urlsafe(32)
    environment = {**launchers.environment(), "VLLM_API_KEY": key, "COLOUR": "green"}
    return LaunchRequest(
        home=launchers.home,
        version="0.32.0",
        arguments=arguments or ("wait",),
        environment=environment,
        key=key,
        folder="/",
        architectures=("LlamaForCausalLM",),
        worker_id="w1",
    )


def soon(seconds: float = 20.0) -> float:
    return asyncio.get_running_loop().time() + seconds


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in {b"Z", b"X"}
    return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_launched_engine_is_what_was_asked_for(launchers: Launchers, start: Launch) -> None:
    """Arguments, folder, environment, log; its own session; found by cookie and key as every engine is."""
    launcher = await launchers.start()
    it = await start(launcher.path, "wait", "a b")
    assert await it.until_said("began") == "began wait a b / green"
    assert os.getsid(it.pid) == it.pid != os.getsid(launcher.pid)
    environ = Path(f"/proc/{it.pid}/environ").read_bytes().split(b"\0")
    assert f"VLLM_API_KEY={it.engine.key}".encode() in environ
    assert f"PILOTLIGHT_WORKER_ID={launchers.worker_id}".encode() in environ
    assert it.engine.processes() == {it.pid: False}
    assert find_processes(None, it.engine.key, reaped=False) == {it.pid: True}
    assert it.engine.alive
    assert it.engine.exit_code is None
    assert await it.engine.stop(term_seconds=0) == ()
    assert not it.engine.alive
    await until(lambda: not Path(f"/proc/{it.pid}").exists())
    assert launcher.alive


@pytest.mark.parametrize(("arguments", "code"), [(("exit", "7"), 7), (("exit", "0"), 0), (("die",), -11)])
async def test_the_launcher_tells_how_an_engine_ended(
    launchers: Launchers, start: Launch, arguments: tuple[str, ...], code: int
) -> None:
    """Its number stays taken until the worker program has looked: what is left of its group is its own."""
    it = await start((await launchers.start()).path, *arguments)
    async with asyncio.timeout(20):
        assert await it.engine.wait() == code
    assert not it.engine.alive
    assert it.engine.exit_code == code
    assert Path(f"/proc/{it.pid}").exists()
    await it.engine.stop(term_seconds=0)
    await until(lambda: not Path(f"/proc/{it.pid}").exists())


async def test_an_engine_s_children_end_with_it(launchers: Launchers, start: Launch) -> None:
    launcher = await launchers.start()
    it = await start(launcher.path, "child")
    child = int((await it.until_said("child")).split()[1])
    assert it.engine.processes() == {it.pid: False, child: False}
    os.kill(it.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        assert await it.engine.wait() == -9
    assert it.engine.processes() == {child: False}
    await it.engine.stop(term_seconds=0)
    assert not alive(child)
    assert launcher.alive


async def test_sigterm_is_obeyed(launchers: Launchers, start: Launch) -> None:
    it = await start((await launchers.start()).path)
    await it.until_said("began")
    await it.engine.stop(term_seconds=20)
    assert it.engine.exit_code == -15


async def test_a_launcher_that_ends_leaves_the_engine_which_is_still_watched_and_ended(
    launchers: Launchers, start: Launch
) -> None:
    launcher = await launchers.start()
    it = await start(launcher.path, "child")
    child = int((await it.until_said("child")).split()[1])
    await launcher.kill()
    assert it.engine.alive
    assert it.engine.processes() == {it.pid: False, child: False}
    ending = asyncio.create_task(it.engine.wait())
    os.kill(it.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        # Nobody is left who could say how.
        assert await ending is None
    await it.engine.stop(term_seconds=0)
    assert not alive(child)


async def test_an_engine_without_launcher_is_ended_whole(launchers: Launchers, start: Launch) -> None:
    launcher = await launchers.start()
    it = await start(launcher.path, "child")
    child = int((await it.until_said("child")).split()[1])
    await launcher.kill()
    await it.engine.stop(term_seconds=0)
    assert not alive(it.pid)
    assert not alive(child)


async def test_who_hangs_up_ends_the_engine(
    launchers: Launchers, start: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is how a launcher learns that a worker program was killed."""
    # How the engine ended will be told to nobody.
    monkeypatch.setattr(launching, "STATUS_SECONDS", 0.0)
    launcher = await launchers.start()
    it = await start(launcher.path, "child")
    child = int((await it.until_said("child")).split()[1])
    it.engine._process._connection.close()
    await until(lambda: not Path(f"/proc/{it.pid}").exists())
    assert not alive(child)
    assert launcher.alive


async def test_a_launcher_that_still_imports_is_waited_for(launchers: Launchers, start: Launch) -> None:
    launcher = await launchers.start(imports_until="go")
    starting = asyncio.create_task(start(launcher.path))
    await asyncio.wait({starting}, timeout=2 * launching.LATE_SECONDS)
    assert not starting.done()
    launchers.touch("go")
    it = await starting
    assert it.lines[0] == "late"
    await it.until_said("began")


async def test_who_gives_up_waiting_leaves_nothing(launchers: Launchers) -> None:
    launcher = await launchers.start(imports_until="go")
    request = request_for(launchers)
    starting = asyncio.create_task(launch(launcher.path, request, deadline=soon(), on_late=lambda: None))
    await asyncio.wait({starting}, timeout=0.1)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    launchers.touch("go")
    await launcher.until("ready")
    assert find_processes(None, request.key, reaped=False) == {}


async def refusal(path: Path, request: LaunchRequest, seconds: float = 20.0) -> str:
    with pytest.raises(LaunchRefusedError) as refused:
        await launch(path, request, deadline=soon(seconds), on_late=lambda: None)
    assert find_processes(None, request.key, reaped=False) == {}
    return str(refused.value)


async def test_a_launcher_that_ends_while_it_imports_is_noticed(launchers: Launchers) -> None:
    launcher = await launchers.start(imports_until="never")
    asking = asyncio.create_task(refusal(launcher.path, request_for(launchers)))
    await asyncio.wait({asking}, timeout=0.1)
    await launcher.kill()
    assert "ended before it greeted" in await asking


async def test_a_launcher_that_ends_in_the_middle_of_a_fork_leaves_nothing(launchers: Launchers) -> None:
    launcher = await launchers.start(dies_at_fork=True)
    assert "ended before it had forked" in await refusal(launcher.path, request_for(launchers))


async def test_what_a_launcher_refuses_is_told(launchers: Launchers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "LISTEN_SECONDS", 0.1)
    launcher = await launchers.start()
    request = request_for(launchers)
    assert "no launcher at" in await refusal(launchers.folder / "nothing.sock", request)
    assert "folder must be an absolute path" in await refusal(launcher.path, replace(request, folder="x"))
    short = {**request.environment, "VLLM_API_KEY": "k" * 44}
    reason = await refusal(launcher.path, replace(request, environment=short, key="k" * 44))
    assert "VLLM_API_KEY must have 1 to 43 bytes" in reason
    odd = {**request.environment, "COLOUR": os.fsdecode(b"gr\xfcn")}
    reason = await refusal(launcher.path, replace(request, environment=odd))
    assert reason == "arguments or variables hold bytes that are not UTF-8"
    threads = await launchers.start(with_thread=True)
    assert "refuses: 1 threads run beside the first" in await refusal(threads.path, request)


async def test_a_launcher_of_another_environment_is_not_asked(launchers: Launchers) -> None:
    """The names of the variables are told, and not their values."""
    launcher = await launchers.start(HF_HOME="/elsewhere", OMP_NUM_THREADS="3")
    reason = await refusal(launcher.path, request_for(launchers))
    assert reason == "the launcher was started with another HF_HOME, OMP_NUM_THREADS"


def test_who_may_be_asked(tmp_path: Path) -> None:
    home = tmp_path / "engine"
    home.mkdir()
    (tmp_path / "link").symlink_to(home)
    request = LaunchRequest(
        home=home,
        version="0.32.0",
        arguments=(),
        environment={"HF_HOME": "/h"},
        key="k",
        folder="/",
        architectures=(),
        worker_id="w",
    )
    good = Hello(1, 7, f"{tmp_path}/link/bin/python", "0.32.0", {"HF_HOME": "/h"})
    assert objection(good, request) == ""

    def said(**changes: object) -> str:
        return objection(msgspec.structs.replace(good, **changes), request)

    assert "protocol 2" in said(protocol=2)
    assert "refuses: CUDA" in said(problem="CUDA")
    assert "vLLM 0.31.0, not 0.32.0" in said(vllm="0.31.0")
    assert "vLLM unknown" in said(vllm="")
    assert "another HF_HOME" in said(environment={})
    assert "/usr/bin/python" in said(program="/usr/bin/python")
    assert "nobody knows what" in said(program="")


@pytest.fixture
def short() -> Iterator[Path]:
    """Socket paths are limited to 107 bytes, which tmp_path may exceed."""
    folder = Path(tempfile.mkdtemp(prefix="pl-"))
    yield folder
    shutil.rmtree(folder)


HELLO = {
    "protocol": 1, "pid": 1, "program": own_program(), "vllm": "0.32.0", "environment": {}, "problem": ""
}  # fmt: skip


@pytest.mark.parametrize(
    ("says", "answers", "reason"),
    [
        (b"SSH-2.0\n", b"", "makes no sense"),
        (b"[1]\n", b"", "makes no sense"),
        (b'{"protocol": "x"}\n', b"", "makes no sense"),
        (b"{" * (2 << 20), b"", "more than 1048576 bytes"),
        (b"", b"", "did not greet in time"),
        (None, b"", "ended before it greeted"),
        (HELLO, b"\xff\n", "makes no sense"),
        (HELLO, b'{"pid": 0}\n', "names no process"),
        (HELLO, b'{"pid": 1}\n', "names process 1, which is not the engine"),
        (HELLO, b'{"pid": 4194305}\n', "cannot be asked"),
        (HELLO, b'{"problem": "no room"}\n', "refuses: no room"),
        (HELLO, None, "ended before it had forked"),
        (HELLO, b"", "did not fork an engine in time"),
    ],
)
async def test_a_launcher_that_makes_no_sense_is_left_alone(
    short: Path, launchers: Launchers, says: Any, answers: bytes | None, reason: str
) -> None:
    """None hangs up, b"" keeps silent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            for saying in (says, answers):
                if saying is None:
                    break
                writer.write(json.dumps(saying).encode() + b"\n" if isinstance(saying, dict) else saying)
                await writer.drain()
                if saying is says and isinstance(says, dict):
                    await reader.readline()
                else:
                    await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(serve, short / "l.sock")
    request = replace(request_for(launchers), environment={}, home=Path(own_program()).parent.parent)
    async with server:
        silent = b"" in {says, answers} if not isinstance(says, dict) else answers == b""
        assert reason in await refusal(short / "l.sock", request, 0.3 if silent else 20.0)


async def test_a_launcher_for_which_too_many_wait_is_passed_over(short: Path) -> None:
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(short / "l.sock"))
        listener.listen(0)
        waiting = sockets.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(str(short / "l.sock"))
        with pytest.raises(LaunchRefusedError, match="too many wait for the launcher"):
            await launching._connect(short / "l.sock")


async def test_a_launcher_of_another_user_is_not_trusted(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(short / "l.sock"))
    listener.listen()
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with listener, pytest.raises(LaunchRefusedError, match=f"belongs to user {own}, not to {own + 1}"):
        await launching._connect(short / "l.sock")
