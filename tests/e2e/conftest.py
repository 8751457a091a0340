"""Whole installations of real processes: `pilotlight up`, worker programs, and the fake engine in vLLM's place.

`installation` starts one and, when the test is over, ends it with SIGINT and demands that it ends in time and
leaves no process behind. Everything a worker starts inherits a TMPDIR that only this installation has, by
which its processes are found.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.soak import standin
from tests.soak.campaign import Campaign
from tests.soak.disturbance import words
from tests.soak.site import Site

from .job_campaign import JobCampaign

EXIT_S = 10
"""Ctrl-C ends everything within this time."""

WAIT_S = 30
"""Bound of every wait; nothing is asserted about how much of it is used."""

PROGRAM = [str(Path(sys.executable).with_name("pilotlight")), "up", "--json"]
ENGINE = [sys.executable, "-m", "pilotlight.testing.fake_engine"]
COOKIE = "PILOTLIGHT_WORKER_ID"
OPTIONS = {
    "ENFORCE_EAGER": "pair",
    "KV_CACHE_MEMORY_BYTES": "value",
    "MAX_MODEL_LEN": "value",
    "SERVED_MODEL_NAME": "value",
    "DTYPE": "value",
}


def until(look: Callable[[], Any], what: str, *, seconds: float = WAIT_S) -> Any:
    """What `look` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


def wait_dead(pid: int, *, seconds: float = WAIT_S) -> None:
    """Return when the process is gone; it need not be our child."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(seconds * 1000), f"process {pid} still lives after {seconds} s"
    finally:
        os.close(handle)


def kill_own(pid: int, number: signal.Signals, environment: str) -> None:
    """Signal a process, if it still is one of this installation."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        handle = os.pidfd_open(pid)
        try:
            if environment.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


class Installation:
    """One data folder and the gateway that runs on it now, if any.

    Args:
        root: A fresh folder with a short path; sockets lie below it.
        engine_home: A folder that looks like an engine's environment.
        settings: More PILOTLIGHT_* variables.
    """

    def __init__(self, root: Path, engine_home: Path, **settings: str) -> None:
        self.root = root
        self.home = root / "h"
        self.sockets = root / "t"
        self.sockets.mkdir()
        self.mark = f"TMPDIR={self.sockets}"
        self.log = root / "up.log"
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(root),
            "LANG": "C.UTF-8",
            "TMPDIR": str(self.sockets),
            "PILOTLIGHT_HOME": str(self.home),
            "PILOTLIGHT_ENGINE__HOME": str(engine_home),
            "HF_HUB_OFFLINE": "1",
            "PILOTLIGHT_ENGINE__COMMAND": json.dumps(ENGINE),
            "PILOTLIGHT_WORKERS__MEMORY_RESERVE_BYTES": "0",
            **settings,
        }
        self.process_command = PROGRAM
        self.port = 0
        self.url = ""
        self.admin_key = ""
        self.process: subprocess.Popen[str] | None = None
        self._deployed = 0
        self.api = httpx.Client(trust_env=False, timeout=WAIT_S)
        self._threads = ThreadPoolExecutor(max_workers=32)

    # The gateway's life.

    def spawn(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        """Run `up` in a session of its own, as a terminal would; its log goes to a file."""
        with self.log.open("a") as log:
            return subprocess.Popen(
                [*PROGRAM, "--port", str(self.port), *arguments],
                env=self.environment | settings,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def start(self) -> Installation:
        """Start the gateway and wait until it answers; a second time on the same port, as after a crash."""
        self.process = self.spawn()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        facts = json.loads(line)
        self.url = facts["url"]
        self.port = int(self.url.rpartition(":")[2])
        self.admin_key = facts.get("admin_key") or self.admin_key
        self.connect(limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))
        return self

    def connect(self, **how: Any) -> None:
        """Make the test client anew, for the administrator, with these options of `httpx.Client`."""
        self.api.close()
        self.api = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.admin_key}"},
            trust_env=False,
            timeout=WAIT_S,
            **how,
        )

    @property
    def pid(self) -> int:
        """The gateway's process id."""
        assert self.process is not None
        return self.process.pid

    def interrupt(self, *, group: bool = False) -> int:
        """Ctrl-C, then what `exited` checks; the exit code."""
        (os.killpg if group else os.kill)(self.pid, signal.SIGINT)
        return self.exited()

    def exited(self) -> int:
        """The exit code, after checking that the end came in time and that no process is left."""
        assert self.process is not None
        try:
            code = self.process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the gateway still runs {EXIT_S} s after Ctrl-C\n{self.log.read_text()[-4000:]}")
        self._forget()
        assert self.processes() == {}, self.log.read_text()[-4000:]
        return code

    def crash(self) -> None:
        """`kill -9` of the gateway alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._forget()

    def _forget(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None

    def finish(self, *, failed: bool = False) -> None:
        """End everything; only a test that passed so far is asked for a clean end."""
        try:
            if self.process is not None:
                code = self.interrupt()
                assert failed or code == 0, f"exit code {code}\n{self.log.read_text()[-4000:]}"
            log = self.log.read_text() if self.log.exists() else ""
            assert failed or "Traceback" not in log, log[-4000:]
        finally:
            if self.process is not None:
                self.crash()
            for pid in self.processes():
                kill_own(pid, signal.SIGKILL, self.mark)
            self.api.close()
            self._threads.shutdown(wait=True, cancel_futures=True)

    # Processes.

    def processes(self) -> dict[int, str]:
        """Living processes of this installation's workers: number → worker id; "" if it lacks the cookie."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or (self.process is not None and int(entry.name) == self.process.pid):
                continue
            with contextlib.suppress(OSError):
                environment = (entry / "environ").read_bytes().split(b"\0")
                if self.mark.encode() in environment:
                    cookies = [item for item in environment if item.startswith(f"{COOKIE}=".encode())]
                    found[int(entry.name)] = cookies[0].decode().partition("=")[2] if cookies else ""
        return found

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Signal one process of a worker."""
        kill_own(pid, number, self.mark)

    # Management.

    def deploy(self, env: dict[str, str] | None = None, **settings: Any) -> Endpoint:
        """An endpoint of the built-in model; `env` makes its engine misbehave. Idle workers end."""
        self._deployed += 1
        record = self.root / f"engine{self._deployed}.jsonl"
        body = {
            "model": "pilotlight/ember",
            "env": {"FAKE_ENGINE_RECORD": str(record), **(env or {})},
            "idle_timeout_s": 600,
            "flashboot": False,
            **settings,
        }
        answer = self.api.post("/pilotlight/v1/endpoints", json=body)
        assert answer.status_code == 201, answer.text
        return Endpoint(self, answer.json()["id"], record)

    def background(self, work: Callable[[], Any]) -> Future[Any]:
        """Do something that waits, in another thread."""
        return self._threads.submit(work)

    def table(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of the database of a gateway that is not running."""
        assert self.process is None
        with contextlib.closing(sqlite3.connect(self.home / "pilotlight.db")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            return connection.execute(query).fetchall()

    def check_account(self) -> None:
        """Every worker has an end, and its usage covers its life without gap or overlap."""
        lives = self.table("SELECT id, created_ms, ended_ms FROM workers")
        for worker_id, created, ended in lives:
            rows = self.table(
                f"SELECT start_ms, end_ms FROM usage_intervals WHERE worker_id = '{worker_id}' ORDER BY sequence"
            )
            moment = created
            for start, end in rows:
                assert start == moment, f"usage of {worker_id} has a gap or an overlap: {rows}"
                moment = end
            assert moment == ended, f"usage of {worker_id}, created {created}, ended {ended}: {rows}"


class Endpoint:
    """One endpoint of an installation, as its callers and its owner see it."""

    def __init__(self, installation: Installation, endpoint_id: str, record: Path) -> None:
        self.installation = installation
        self.id = endpoint_id
        self.record = record

    # Calls.

    def post(self, path: str, **body: Any) -> httpx.Response:
        """POST a JSON body below `/v2/{endpoint}`."""
        return self.installation.api.post(f"/v2/{self.id}/{path}", json=body)

    def get(self, path: str) -> httpx.Response:
        """GET below `/v2/{endpoint}`."""
        return self.installation.api.get(f"/v2/{self.id}/{path}")

    def chat(self, text: str, **more: Any) -> httpx.Response:
        """A chat completion."""
        messages = [{"role": "user", "content": text}]
        return self.post("openai/v1/chat/completions", model="pilotlight/ember", messages=messages, **more)

    @contextlib.contextmanager
    def stream(self, text: str) -> Iterator[Iterator[str]]:
        """A streamed chat completion: the data of its events."""
        body = {
            "model": "pilotlight/ember",
            "messages": [{"role": "user", "content": text}],
            "stream": True,
        }
        url = f"/v2/{self.id}/openai/v1/chat/completions"
        with self.installation.api.stream("POST", url, json=body) as response:
            assert response.status_code == 200, response.read()
            yield (line[6:] for line in response.iter_lines() if line.startswith("data: "))

    def run(self, prompt: str, **more: Any) -> str:
        """Submit a job; its id."""
        answer = self.post("run", input={"prompt": prompt, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def job(self, job_id: str) -> dict[str, Any]:
        """A job as it is."""
        return self.get(f"status/{job_id}").json()

    def result(self, job_id: str) -> dict[str, Any]:
        """A job when it has ended."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            job = self.get(f"status-sync/{job_id}?wait=10000").json()
            if job["status"] not in {"IN_QUEUE", "IN_PROGRESS"}:
                return job
        pytest.fail(f"job {job_id} has not ended: {job}\n{self.installation.log.read_text()[-4000:]}")

    def chunks(self, job_id: str) -> dict[str, Any]:
        """One answer of `/stream`."""
        return self.get(f"stream/{job_id}?wait=10000").json()

    def rest_of_stream(self, job_id: str) -> str:
        """The words of the stream of a job, which has ended, that no reader had before."""
        answer = self.chunks(job_id)
        assert answer["status"] not in {"IN_QUEUE", "IN_PROGRESS"}, answer
        return "".join(words([chunk["output"] for chunk in answer["stream"]])).strip()

    def first_chunks(self, job_id: str) -> list[Any]:
        """The first chunks of a running job; if it is run again, its stream begins anew."""
        return until(lambda: self.chunks(job_id)["stream"], "a chunk")

    def health(self) -> dict[str, Any]:
        """The counters."""
        return self.get("health").json()

    # What its owner sees.

    def _read(self, path: str) -> Any:
        answer = self.installation.api.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def view(self) -> dict[str, Any]:
        """The endpoint."""
        return self._read(f"/pilotlight/v1/endpoints/{self.id}")

    def revise(self, **changes: Any) -> None:
        """Change it."""
        answer = self.installation.api.patch(f"/pilotlight/v1/endpoints/{self.id}", json=changes)
        assert answer.status_code == 200, answer.text

    def workers(self) -> list[dict[str, Any]]:
        """Living workers."""
        return self._read(f"/pilotlight/v1/endpoints/{self.id}/workers")["workers"]

    def ready(self) -> dict[str, Any]:
        """Its worker as soon as one is ready."""
        return until(
            lambda: next((each for each in self.workers() if each["state"] == "ready"), None),
            "a ready worker",
        )

    def starts(self) -> list[dict[str, Any]]:
        """Starts, newest first."""
        return self._read(f"/pilotlight/v1/endpoints/{self.id}/starts")["starts"]

    def usage(self) -> list[dict[str, Any]]:
        """Usage intervals."""
        return self._read(f"/pilotlight/v1/usage?endpoint={self.id}")["intervals"]

    def requests(self, count: int) -> list[dict[str, Any]]:
        """The request log, newest first, once it has so many rows; they are written in batches."""
        path = f"/pilotlight/v1/requests?endpoint={self.id}&limit=1000"
        return until(
            lambda: rows if len(rows := self._read(path)["requests"]) >= count else None, f"{count} rows"
        )

    # Its engines.

    def happenings(self, what: str) -> list[dict[str, Any]]:
        """What its engines have written down, oldest first."""
        if not self.record.exists():
            return []
        lines = self.record.read_text().splitlines()
        return [entry for line in lines if (entry := json.loads(line))["what"] == what]

    def engine_pid(self, number: int = 1) -> int:
        """Process id of its n-th engine, once that has started."""
        return until(
            lambda: len(found := self.happenings("start")) >= number and found[number - 1]["pid"],
            f"engine {number}",
        )


@pytest.fixture(scope="session")
def engine_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like an engine's environment: an interpreter and a manifest."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    manifest = {
        "format": 2,
        "registered": {},
        "quantisations": {},
        "vllm": "0.32.0",
        "torch": "2.13.0+cpu",
        "platform": "cpu",
        "architectures": ["LlamaForCausalLM", "Qwen3ForCausalLM"],
        "flags": {
            name: {
                "flag": f"--{name.lower().replace('_', '-')}",
                "kind": kind,
                "value": "text",
                "short": [],
                "multi": False,
                "choices": ["auto", "bfloat16"] if name == "DTYPE" else None,
            }
            for name, kind in OPTIONS.items()
        },
    }
    (folder / "pilotlight-engine.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def make_installation(
    request: pytest.FixtureRequest, engine_home: Path
) -> Iterator[Callable[..., Installation]]:
    """Makes installations that are not started yet, and ends them."""
    made: list[Installation] = []

    def make(**settings: str) -> Installation:
        # Not tmp_path: a Unix socket's path has 107 bytes at most.
        root = Path(tempfile.mkdtemp(prefix="pl-e2e-"))
        made.append(Installation(root, engine_home, **settings))
        return made[-1]

    yield make
    report = getattr(request.node, "call_report", None)
    failed = report is None or report.failed
    try:
        for each in made:
            each.finish(failed=failed)
    finally:
        for each in made:
            if failed:
                sys.stderr.write(
                    f"--- {each.log}\n{each.log.read_text()[-6000:] if each.log.exists() else ''}"
                )
            shutil.rmtree(each.root, ignore_errors=True)


@pytest.fixture
def installation(make_installation: Callable[..., Installation]) -> Installation:
    """A running installation."""
    return make_installation().start()


@pytest.fixture(scope="session")
def _shared(engine_home: Path) -> Iterator[Installation]:
    installation = Installation(Path(tempfile.mkdtemp(prefix="pl-e2e-")), engine_home)
    try:
        yield installation.start()
    finally:
        try:
            installation.finish()
        finally:
            shutil.rmtree(installation.root, ignore_errors=True)


@pytest.fixture
def shared(_shared: Installation, request: pytest.FixtureRequest) -> Iterator[Installation]:
    """A running installation without endpoints, for tests that do not stop it; starting one takes seconds."""
    yield _shared
    if request.node.call_report.failed:
        sys.stderr.write(f"--- {_shared.log}\n{_shared.log.read_text()[-6000:]}")
    for endpoint in _shared.api.get("/pilotlight/v1/endpoints").json()["endpoints"]:
        _shared.api.delete(f"/v2/serverless/{endpoint['id']}")
    for worker_pid in _shared.processes():
        # What a failed test left may wait for a file that will never come.
        _shared.signal(worker_pid, signal.SIGKILL)
    until(lambda: not _shared.processes(), "no process is left")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Let fixtures know how their test went."""
    report = yield
    if report.when == "call":
        item.call_report = report
    return report


class Tools:
    """Ways to wait, for tests: test modules cannot import this one."""

    until = staticmethod(until)
    wait_dead = staticmethod(wait_dead)


@pytest.fixture(scope="session")
def tools() -> Tools:
    """Ways to wait."""
    return Tools()


class CrashCampaign:
    """Kills the gateway under load again and again, and checks what must hold however it went.

    Every acknowledged job ends, once, with the words it asked for, also when a reader had read a part of its
    stream; no restart uses up a retry; no process of a dead gateway survives the next start; the account of each
    worker has no gap.

    Args:
        installation: Not started yet.
        kills: How often the gateway is killed.
        seed: Chooses moments and load; printed, so that a failure can be repeated.
    """

    def __init__(self, installation: Installation, *, kills: int, seed: int) -> None:
        self.installation = installation
        self.kills = kills
        self.random = random.Random(seed)
        self.expected: dict[str, int] = {}
        self.ended: dict[str, dict[str, Any]] = {}
        self.restarts_s: list[float] = []
        print(f"crash campaign: {kills} kills, seed {seed}")

    def run(self) -> None:
        """The whole of it."""
        self.installation.start()
        endpoint = self.installation.deploy(
            {"FAKE_ENGINE_EVENT_SECONDS": "0.02"}, max=2, concurrency=4, idle_timeout_s=2
        )
        for _ in range(self.kills):
            self._round(endpoint)
        for job_id in self.expected:
            self._check(job_id, endpoint.result(job_id))
        self._check_end(endpoint)

    def _round(self, endpoint: Endpoint) -> None:
        """Load, a kill in the middle of it, a restart."""
        busy = [
            self.installation.background(lambda: self._submit(endpoint))
            for _ in range(self.random.randint(1, 5))
        ]
        busy.append(self.installation.background(lambda: self._stream(endpoint)))
        if self.expected:
            job_id = self.random.choice(list(self.expected))
            busy.append(self.installation.background(lambda: self._read_some(endpoint, job_id)))
        # From "nothing is ready" to "everything runs": a worker needs a second or so to be ready.
        time.sleep(self.random.choice((0.0, 0.1, 0.8, 1.6, 2.4)) * self.random.uniform(0.5, 1))
        # Without the cookie: a child of the gateway that has yet to become a worker. Stopped, it would hold
        # the lock of the data folder, of which it has a copy until then.
        before = [pid for pid, cookie in self.installation.processes().items() if cookie]
        if before and self.random.random() < 0.3:
            self.installation.signal(self.random.choice(before), signal.SIGSTOP)
        self.installation.crash()
        for work in busy:
            with contextlib.suppress(httpx.TransportError):
                work.result()
        if self.random.random() < 0.2:
            self._kill_while_starting()
        began = time.monotonic()
        self.installation.start()
        self.restarts_s.append(time.monotonic() - began)
        survivors = set(before) & set(self.installation.processes())
        assert not survivors, f"{survivors} survived a restart"
        for job_id in list(self.ended):
            again = endpoint.job(job_id)
            assert again == self.ended[job_id], "a result has changed"
        for job_id in list(self.expected):
            job = endpoint.job(job_id)
            assert "id" in job, f"{job_id} is lost: {job}"
            if job["status"] not in {"IN_QUEUE", "IN_PROGRESS"}:
                self._check(job_id, job)
                self.ended[job_id] = job

    def _kill_while_starting(self) -> None:
        process = self.installation.spawn()
        assert process.stdout is not None
        with process.stdout, contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.random.uniform(0.2, 1.5))
        process.kill()
        process.wait()

    def _submit(self, endpoint: Endpoint) -> None:
        count = self.random.randint(1, 40)
        stream = self.random.random() < 0.5
        # Only what was acknowledged counts: a request that the crash cut may or may not have become a job.
        job_id = endpoint.run(f"count to {count}", stream=stream, sampling_params={"max_tokens": 100})
        self.expected[job_id] = count

    def _stream(self, endpoint: Endpoint) -> None:
        with endpoint.stream("count to 30") as events:
            list(events)

    def _read_some(self, endpoint: Endpoint, job_id: str) -> None:
        endpoint.chunks(job_id)

    def _check(self, job_id: str, job: dict[str, Any]) -> None:
        assert "retries" not in job, f"a restart has used up the retry: {job}"
        assert job["status"] == "COMPLETED", job
        tokens = "".join(words(job["output"])).split()
        assert tokens == [str(number) for number in range(1, self.expected[job_id] + 1)], job

    def _check_end(self, endpoint: Endpoint) -> None:
        rows = [row["id"] for row in endpoint.requests(0)]
        assert len(rows) == len(set(rows)), "a job or request has two rows"
        assert self.installation.interrupt() == 0
        self.installation.check_account()
        statuses = Counter(job["status"] for job in self.ended.values())
        figure = {
            "kills": self.kills,
            "jobs": len(self.expected),
            "ended_before_the_last_kill": dict(statuses),
            "restart_s_max": round(max(self.restarts_s), 2),
        }
        print(json.dumps({"crash_campaign": figure}))


@pytest.fixture
def crash_campaign(make_installation: Callable[..., Installation]) -> Callable[..., None]:
    """Runs a campaign of so many kills with this seed."""

    def run(*, kills: int, seed: int) -> None:
        CrashCampaign(make_installation(), kills=kills, seed=seed).run()

    return run


@pytest.fixture
def job_campaign(
    request: pytest.FixtureRequest, make_installation: Callable[..., Installation]
) -> Callable[..., None]:
    """Runs a campaign of kills of gateway and database server, see `job_campaign.py`."""

    def run(*, on_postgresql: bool = False, **campaign: Any) -> None:
        settings = {
            "PILOTLIGHT_WEBHOOKS__ALLOW_PRIVATE": "true",
            "PILOTLIGHT_WEBHOOKS__RETRY_DELAYS_S": "[1, 1, 1, 1, 1, 1]",
            "PILOTLIGHT_JOBS__RETENTION_MS": "86400000",
        }
        if not on_postgresql:
            JobCampaign(make_installation(**settings), **campaign).run()
            return
        server = request.getfixturevalue("postgresql")
        settings["PILOTLIGHT_STORE__URL"] = server.new_database(migrated=False)
        try:
            JobCampaign(make_installation(**settings), server=server, **campaign).run()
        finally:
            # Others of this session use it, too.
            if server.process.poll() is not None:
                server.start()

    return run


@pytest.fixture
def mixed_load(make_installation: Callable[..., Installation]) -> Callable[..., None]:
    """Runs a soak of the data path for so many seconds, see `tests/soak`."""

    def run(*, seed: int = 0, **soak: Any) -> None:
        seed = (
            seed
            or int(os.environ.get("PILOTLIGHT_TEST_SEED", "0"))
            or random.SystemRandom().randrange(1, 10**6)
        )
        installation = make_installation()
        census = installation.root / "census.json"
        installation.environment |= standin.settings(census)
        installation.start()
        site = Site(
            port=installation.port,
            key=installation.admin_key,
            home=installation.home,
            pid=installation.pid,
            log=installation.log,
        )

        def end() -> None:
            assert installation.interrupt() == 0

        Campaign(site, standin.plan(seed=seed, census=census, **soak)).run(end)

    return run


def start_with_tls(make_installation, pair, **settings: str) -> Installation:
    """A running installation with this certificate, whose test client trusts it."""
    installation = make_installation(
        PILOTLIGHT_SERVER__TLS_CERT=str(pair.certificate),
        PILOTLIGHT_SERVER__TLS_KEY=str(pair.key),
        **settings,
    ).start()
    installation.connect(verify=pair.trust())
    return installation
