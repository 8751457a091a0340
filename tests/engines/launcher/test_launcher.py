"""The launcher's protocol, with a small program in place of vLLM."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.engines.launcher.conftest import COOKIE, KEY, SECONDS, ended, engine_environment, kill

from pilotlight.engines.launching import DISTRIBUTION, MESSAGE_BYTES_MAX, PROTOCOL


def environ(pid):
    """The environment of a process as others see it."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(entry.decode().split("=", 1) for entry in entries if entry)


def test_greeting(launcher):
    connection = launcher.connect()
    greeting = connection.read()
    assert greeting.pop("environment")["PILOTLIGHT_ENGINE_FORK"] == "1"
    assert greeting == {
        "protocol": PROTOCOL,
        "pid": launcher.process.pid,
        "program": sys.executable,
        "vllm": "",
        "problem": "",
    }
    assert launcher.path.stat().st_mode & 0o777 == 0o600
    connection.close()


def test_who_comes_before_everything_is_imported_waits(start, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    program = start(TEST_GATE=str(gate))
    connection = program.connect()
    gate.write_text("open")
    assert connection.read()["problem"] == ""
    assert program.event("ready")["memory_bytes"] > 0
    connection.close()


def test_an_engine_is_what_was_asked_for(connection, tmp_path):
    env = engine_environment(COLOUR="green", TEXT="two\nlines = é")
    answer = connection.launch("report", "--model", "x y", environment=env, folder=str(tmp_path))
    said = connection.said()
    assert said["argv"] == ["report", "--model", "x y"]
    ours = {"PYTHONPATH", "PILOTLIGHT_ENGINE_FORK", "VLLM_WORKER_MULTIPROC_METHOD"}
    assert {name: value for name, value in said["environment"].items() if name not in ours} == env
    assert said["environment"]["PYTHONPATH"].startswith(str(DISTRIBUTION))
    assert said["environment"]["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    assert said["folder"] == str(tmp_path)
    assert said["descriptors"].pop("0") == "/dev/null"
    assert sorted(said["descriptors"]) == ["1", "2"]
    assert said["session"] == said["group"] == answer["pid"]
    assert said["ignored"] == [signal.SIGPIPE, signal.SIGXFSZ]
    assert said["umask"] == "0077", "as of every engine that a worker program spawns"
    assert not said["segfault_is_handled"]
    assert connection.read() == {"ended": 0}


def test_what_libraries_handle_they_handle_in_engines(start):
    program = start(PYTHONFAULTHANDLER="1")
    connection = program.connect()
    connection.read()
    connection.launch("report")
    assert connection.said()["segfault_is_handled"]
    connection.close()


def test_engines_of_one_launcher_draw_different_numbers(launcher):
    drawn = []
    for _ in range(2):
        connection = launcher.connect()
        connection.read()
        connection.launch("report")
        drawn.append(connection.said()["random"])
        connection.close()
    assert all(one != other for one, other in zip(*drawn, strict=True))


@pytest.mark.parametrize("cookie", [COOKIE, "local-7"])
def test_others_find_it_by_its_environment(connection, cookie):
    env = engine_environment(PILOTLIGHT_WORKER_ID=cookie)
    connection.launch("family", environment=env)
    for pid in connection.said()["pids"]:
        found = environ(pid)
        assert (found["PILOTLIGHT_WORKER_ID"], found["VLLM_API_KEY"]) == (cookie, KEY)


@pytest.mark.parametrize(("arguments", "status"), [(["exit", "3"], 3), (["wait"], -signal.SIGTERM)])
def test_its_end_is_told_and_its_number_is_kept_until_the_connection_closes(
    launcher, connection, arguments, status
):
    pid = connection.launch(*arguments)["pid"]
    assert launcher.event("launched") == {"event": "launched", "pid": pid, "worker_id": COOKIE}
    if arguments == ["wait"]:
        connection.said()
        os.kill(pid, signal.SIGTERM)
    assert connection.read() == {"ended": status}
    assert launcher.event("ended") == {"event": "ended", "pid": pid, "status": status}
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    # The group may still be signalled.
    os.killpg(pid, signal.SIGKILL)
    connection.close()
    with launcher.connect().socket:
        while Path(f"/proc/{pid}").exists():
            os.sched_yield()


def test_a_lost_connection_ends_the_whole_session(launcher, connection):
    connection.launch("family")
    pids = connection.said()["pids"]
    connection.close()
    assert all(ended(pid) for pid in pids)
    assert launcher.event("ended")["status"] == -signal.SIGKILL


def test_a_worker_program_killed_between_its_request_and_the_fork_leaves_no_engine(launcher, connection):
    """The launcher is stopped meanwhile, so it finds the request and the end of the connection together."""
    os.kill(launcher.process.pid, signal.SIGSTOP)
    message = {
        "arguments": ["wait"],
        "environment": engine_environment(),
        "folder": "/",
        "architectures": [],
        "worker_id": COOKIE,
    }
    connection.send(message, [2])
    connection.close()
    os.kill(launcher.process.pid, signal.SIGCONT)
    pid = launcher.event("ended")["pid"]
    while Path(f"/proc/{pid}").exists():
        os.sched_yield()
    assert "launched" not in [event["event"] for event in launcher.events]


def test_nothing_is_to_be_said_after_a_launch(connection):
    pid = connection.launch("wait")["pid"]
    connection.said()
    connection.send({}, [])
    assert "after a launch" in connection.read()["problem"]
    assert ended(pid)


def test_many_engines_at_once(launcher):
    connections = [launcher.connect() for _ in range(5)]
    assert len({each.read()["pid"] for each in connections}) == 1
    pids = [each.launch("wait")["pid"] for each in connections]
    assert [each.said() for each in connections] == [{"ready": True}] * 5
    for number, pid in enumerate(pids):
        os.kill(pid, signal.SIGKILL)
        assert connections[number].read() == {"ended": -signal.SIGKILL}
        connections[number].close()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"environment": engine_environment(VLLM_API_KEY="k" * 44)}, "VLLM_API_KEY must have 1 to 43 bytes, not 44"),
        ({"environment": engine_environment(PILOTLIGHT_WORKER_ID="")}, "PILOTLIGHT_WORKER_ID must have 1 to 14"),
        ({"environment": {"A": 1}}, "object of strings"),
        ({"environment": engine_environment(VLLM_WORKER_MULTIPROC_METHOD="spawn")}, "is spawn"),
        ({"folder": "here"}, "absolute path, not 'here'"),
        ({"folder": "/no such folder"}, "No such file"),
        ({"arguments": "--model"}, "arguments must be a list of strings"),
        ({"worker_id": None}, "worker_id must be a string"),
    ],
)  # fmt: skip
def test_what_cannot_be_launched_is_refused(launcher, connection, changes, part):
    assert part in connection.launch("wait", **changes)["problem"]
    assert part in launcher.event("problem")["text"]
    with pytest.raises(EOFError):
        connection.read()
    children = Path(f"/proc/{launcher.process.pid}/task/{launcher.process.pid}/children").read_text()
    assert children == ""


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"what?\n", "no JSON"),
        (b"[]\n", "must be a JSON object, not list"),
        (b"x" * (MESSAGE_BYTES_MAX + 1), f"longer than {MESSAGE_BYTES_MAX} bytes"),
        (b"\xff\xfe\n", "no JSON"),
        (b"[" * 100_000 + b"\n", "no JSON"),
    ],
)
def test_garbage_is_refused_and_the_next_is_served(launcher, connection, data, part):
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.socket.sendall(data)
    assert part in launcher.event("problem")["text"]
    following = launcher.connect()
    following.read()
    assert following.launch("exit", "0")["pid"]
    following.close()


@pytest.mark.parametrize("count", [0, 2])
def test_one_descriptor_comes_with_a_launch(launcher, connection, count):
    before = len(list(Path(f"/proc/{launcher.process.pid}/fd").iterdir()))
    message = {
        "arguments": ["wait"],
        "environment": engine_environment(),
        "folder": "/",
        "architectures": [],
        "worker_id": COOKIE,
    }
    connection.send(message, [2] * count)
    assert f"one descriptor must come with a launch, not {count}" in connection.read()["problem"]
    with pytest.raises(EOFError):
        connection.read()
    assert len(list(Path(f"/proc/{launcher.process.pid}/fd").iterdir())) == before - 1


@pytest.mark.parametrize(
    ("variable", "part"), [("TEST_CUDA", "CUDA is initialized"), ("TEST_THREAD", "1 threads run beside the first")]
)  # fmt: skip
def test_who_has_computed_forks_nothing(start, variable, part):
    program = start(**{variable: "1"})
    assert part in program.event("problem")["text"]
    connection = program.connect()
    assert part in connection.read()["problem"]
    assert part in connection.launch("wait")["problem"]
    connection.close()


def test_one_that_has_computed_since_complains_to_the_gateway_of_every_worker(start):
    """Worker programs that read of it do not ask, so only that tells the gateway to begin it anew."""
    program = start(TEST_COMPUTES="1")
    first = program.connect()
    assert first.read()["problem"] == ""
    assert first.launch("wait")["problem"] == "computed"
    assert program.event("problem")["text"] == "computed"
    for _ in range(2):
        following = program.connect()
        assert following.read()["problem"] == "computed"
        assert program.event("problem")["text"] == "computed"
        following.close()
    first.close()


def test_the_gateway_hears_that_it_is_alive(start):
    program = start(TEST_ALIVE="1")
    for _ in range(2):
        assert program.event("alive") == {"event": "alive"}


def test_the_end_of_the_gateway_is_the_launchers_and_not_the_engines(launcher, connection):
    pid = connection.launch("wait")["pid"]
    connection.said()
    assert launcher.close() == 0
    assert not launcher.path.exists()
    with pytest.raises(EOFError):
        connection.read()
    # Still there: the signal reaches it.
    os.kill(pid, signal.SIGTERM)
    assert ended(pid)


def test_a_killed_launcher_takes_no_engine_with_it(launcher, connection):
    pid = connection.launch("wait")["pid"]
    connection.said()
    launcher.process.kill()
    with pytest.raises(EOFError):
        connection.read()
    os.kill(pid, signal.SIGTERM)
    assert ended(pid)


def test_of_a_launcher_killed_in_the_middle_of_a_fork_no_engine_is_left(tmp_path):
    script = """
import os, signal, sys
from pilotlight_engine.child import Launch
from pilotlight_engine.forking import fork_engine
env = dict(os.environ)
forked = fork_engine(Launch((), env, "/", (), ""), os.dup(2), env, lambda: None)
if forked is None:
    signal.pause()
sys.stdout.write(f"{forked.pid}\\n")
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    env = engine_environment(PYTHONPATH=str(DISTRIBUTION))
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    try:
        assert ended(pid)
    finally:
        kill(pid)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_other_users_are_sent_away(launcher):
    script = """
import os, socket, sys
os.chdir(os.path.dirname(sys.argv[1]))
os.setuid(65534)
client = socket.socket(socket.AF_UNIX)
client.connect("launcher.sock")
print(client.recv(1))
"""
    launcher.path.chmod(0o666)
    launcher.path.parent.chmod(0o711)
    command = [sys.executable, "-I", "-c", script, str(launcher.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.stdout == "b''\n", done.stderr
    assert "user 65534 may not launch" in launcher.event("problem")["text"]


def test_events_are_all_that_is_on_standard_output(launcher, connection):
    connection.launch("exit", "0")
    connection.read()
    connection.close()
    launcher.event("ended")
    assert [event["event"] for event in launcher.events] == ["listening", "ready", "launched", "ended"]
    assert json.dumps(launcher.events)
