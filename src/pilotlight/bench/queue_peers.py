"""Other job queues, doing the same no-op end to end with results read by the client.

Each is started as its documentation has it, on a private server of the benchmark's own (Redis or
PostgreSQL, in its temporary folder, on a free port), with its real worker runtime. Their Python packages
live in an environment of their own, made on demand in the cache from a lock. What is missing on this machine
is left out, and said.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from pilotlight.bench.environments import PROGRAMS, peer_python
from pilotlight.bench.errors import BenchError
from pilotlight.bench.processes import START_S, Bench, Child, environment, free_port
from pilotlight.cli.output import note
from pilotlight.cli.root import UsageError

PEERS = ("celery-redis", "dramatiq-redis", "procrastinate-postgresql")

_CLIENTS = 2
_MARGIN_S = 120.0

EVERYSEC = "in Redis with appendfsync everysec: up to a second of it is lost in a crash"
WAL = "on disk (PostgreSQL, synchronous_commit=on) before the answer"


class Peer(ABC):
    """A queue to compare with.

    Attributes:
        case: Its name in the output.
        durability: What happens to accepted work in a crash.
    """

    case: str
    durability: str
    program: str
    clients = _CLIENTS

    def __init__(self, python: Path, env: dict[str, str]) -> None:
        self._python = python
        self._env = env

    @abstractmethod
    def workers(self) -> Sequence[Sequence[str]]:
        """Command lines of its worker; where there are several, the fastest counts."""

    def measure(self, bench: Bench, *, seconds: int, window: int) -> float:
        """Tasks per second, end to end, with the best of its workers."""
        return max(self._measure(bench, command, seconds, window) for command in self.workers())

    def _measure(self, bench: Bench, command: Sequence[str], seconds: int, window: int) -> float:
        worker = bench.start(f"{self.case} worker", command, env=self._env)
        try:
            clients = [
                bench.start(
                    f"{self.case} client",
                    [
                        *(str(self._python), str(PROGRAMS / f"{self.program}.py")),
                        *(str(seconds), str(max(1, window // self.clients))),
                    ],
                    env=self._env,
                    stdout=True,
                )
                for _ in range(self.clients)
            ]
            outs = [client.output(seconds + _MARGIN_S) for client in clients]
            for client in clients:
                bench.end(client)
        finally:
            bench.end(worker)
        return float(sum(json.loads(out)["jobs_per_s"] for out in outs))

    def _tool(self, name: str) -> str:
        return str(self._python.parent / name)


class Celery(Peer):
    """Celery with its two pools that need nothing more to be installed."""

    case = "celery-redis"
    durability = EVERYSEC
    program = "celery_app"

    def workers(self) -> Sequence[Sequence[str]]:
        """See `Peer.workers`."""
        quiet = ("--loglevel", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat")
        pools = (("prefork", str(os.cpu_count() or 2)), ("threads", "8"))
        return [
            [self._tool("celery"), "-A", self.program, "worker", "--pool", pool, "-c", count, *quiet]
            for pool, count in pools
        ]


class Dramatiq(Peer):
    """dramatiq, a process per core."""

    case = "dramatiq-redis"
    durability = EVERYSEC
    program = "dramatiq_app"

    def workers(self) -> Sequence[Sequence[str]]:
        """See `Peer.workers`."""
        return [
            [self._tool("dramatiq"), self.program, "--processes", str(os.cpu_count() or 2), "--threads", "8"]
        ]


class Procrastinate(Peer):
    """procrastinate; one client is many tasks on one event loop."""

    case = "procrastinate-postgresql"
    durability = WAL
    program = "procrastinate_app"
    clients = 1

    def workers(self) -> Sequence[Sequence[str]]:
        """See `Peer.workers`."""
        app = f"--app={self.program}.app"
        return [[self._tool("procrastinate"), app, "worker", "--concurrency", "30"]]

    def prepare(self, bench: Bench) -> None:
        """Make its tables."""
        app = f"--app={self.program}.app"
        command = [self._tool("procrastinate"), app, "schema", "--apply"]
        bench.run("procrastinate schema", command, env=self._env, timeout_s=_MARGIN_S)


def start_peers(bench: Bench, names: Sequence[str]) -> list[Peer]:
    """Servers started and tables made for these peers; those that cannot run here are left out, and said.

    Raises:
        UsageError: A name is not among `PEERS`.
        BenchError: A server did not start.
    """
    unknown = sorted(set(names) - set(PEERS))
    if unknown:
        raise UsageError(f"unknown peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    if not names:
        return []
    try:
        python = peer_python("peers")
    except BenchError as error:
        note(f"queue: {error}; left out: {', '.join(names)}")
        return []
    env = environment(PYTHONPATH=str(PROGRAMS), PYTHONDONTWRITEBYTECODE="1")
    peers: list[Peer] = []
    if set(names) & {Celery.case, Dramatiq.case} and (url := _start_redis(bench)):
        redis = env | {"REDIS_URL": url}
        peers += [kind(python, redis) for kind in (Celery, Dramatiq) if kind.case in names]
    if Procrastinate.case in names and (url := _start_postgresql(bench)):
        peer = Procrastinate(python, env | {"POSTGRESQL_URL": url})
        peer.prepare(bench)
        peers.append(peer)
    return peers


def _start_redis(bench: Bench) -> str | None:
    program = shutil.which("redis-server")
    if program is None:
        note("queue: no redis-server (Debian: apt-get install redis-server); left out: celery, dramatiq")
        return None
    folder = bench.folder / "redis"
    folder.mkdir(mode=0o700)
    port = free_port()
    options = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
    server = bench.start("redis", [program, *options, "--appendonly", "yes", "--appendfsync", "everysec"])
    server.wait_port(port)
    return f"redis://127.0.0.1:{port}/0"


def _start_postgresql(bench: Bench) -> str | None:
    initdb, postgres = postgresql_program("initdb"), postgresql_program("postgres")
    become = _unprivileged()
    if initdb is None or postgres is None or become is None:
        note("queue: no PostgreSQL (Debian: apt-get install postgresql); left out: procrastinate")
        return None
    folder = bench.folder / "postgresql"
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        shutil.chown(folder, become[1])
    data, port = str(folder / "data"), free_port()
    bench.run(
        "initdb",
        [*become[0], initdb, "-D", data, "-U", "bench", "-A", "trust", "-E", "UTF8"],
        timeout_s=_MARGIN_S,
    )
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-c", "max_connections=200"]
    server = bench.start("postgresql", [*become[0], postgres, "-D", data, *options])
    server.wait_port(port)
    url = f"postgresql://bench@127.0.0.1:{port}/postgres"
    _wait_postgresql(server, port)
    return url


def _wait_postgresql(server: Child, port: int) -> None:
    """Return when it answers: it listens a moment before it accepts clients."""
    deadline = time.monotonic() + START_S
    # SSLRequest; the answer is one letter once the server is up.
    question = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as client:
            client.sendall(question)
            if client.recv(1) in {b"N", b"S"}:
                return
        time.sleep(0.05)
    raise server.error("did not answer")


def postgresql_program(name: str) -> str | None:
    """Where a program of PostgreSQL is; None when it is not installed."""
    # Debian keeps them outside everybody's path.
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    for folder in reversed(folders):
        if (folder / name).exists():
            return str(folder / name)
    return shutil.which(name)


def _unprivileged() -> tuple[list[str], str] | None:
    """What to put before a command of PostgreSQL, which does not run as root, and as whom; None: no way."""
    if os.geteuid() != 0:
        return [], ""
    setpriv = shutil.which("setpriv")
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            account = pwd.getpwnam(name)
            if setpriv is None:
                return None
            ids = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
            # Changing the user clears the signal that ends it with us; it is set again behind that.
            return [setpriv, *ids, "--", setpriv, "--pdeathsig", "TERM", "--"], name
    return None
