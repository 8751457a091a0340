"""A gateway of a few hundred lines that speaks the management and job API, for the command line to talk to.

It keeps endpoints, keys and jobs in memory and records every request. Tests change its behaviour through the
attributes of `StubGateway`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import CliRunner, Result

ADMIN_KEY = "rpa_admin0secret"
RUN_KEY = "rpa_run0secret"
WORKER = "wrk1aaaaaaaaaa"
JOB = "0b9b1c2d-u1"


@dataclass
class Recorded:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


class ProblemError(Exception):
    def __init__(self, status: int, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.content = {"title": "Problem", "status": status, "detail": detail, **more}


@dataclass
class StubGateway:
    """State, and switches for what should go wrong."""

    url: str = ""
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: list[dict[str, Any]] = field(default_factory=list)
    launchers: list[dict[str, Any]] = field(default_factory=list)
    dead_webhooks: list[dict[str, Any]] = field(default_factory=list)
    workers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    starts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)
    log_stays_open: bool = False
    jobs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    job_rows: list[dict[str, Any]] = field(default_factory=list)
    chunks: list[dict[str, Any]] = field(default_factory=list)
    requests: list[Recorded] = field(default_factory=list)
    progress: list[dict[str, Any]] = field(default_factory=list)
    deploy_error: dict[str, Any] | None = None
    chat_events: list[bytes] = field(default_factory=list)
    chat_status: int = 200
    chat_blocks: bool = False
    chat_rest: list[bytes] = field(default_factory=list)
    chat_waits_for_polls: int = 0
    chat_started: threading.Event = field(default_factory=threading.Event)
    client_gone: threading.Event = field(default_factory=threading.Event)
    polled: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    release: threading.Event = field(default_factory=threading.Event)
    wake_statuses: list[int] = field(default_factory=list)

    def add(self, name: str, *, model: str = "pilotlight/ember", **more: Any) -> dict[str, Any]:
        endpoint_id = f"ep{len(self.endpoints):02d}aaaaaaaaaa"
        endpoint = {
            "id": endpoint_id,
            "name": name,
            "status": "idle",
            "model": model,
            "version": 1,
            "kind": "vllm",
            "url": f"{self.url}/v2/{endpoint_id}",
            "openai_url": f"{self.url}/v2/{endpoint_id}/openai/v1",
            "served_names": [model],
            "min": 0,
            "max": 3,
            "idle_timeout_s": 60,
            "env": {},
            "engine_url": None,
            "workers": {},
            "failure": None,
            "retry_at": None,
            **more,
        }
        self.endpoints[endpoint_id] = endpoint
        return endpoint

    def sent(self, method: str, path: str) -> list[Recorded]:
        return [one for one in self.requests if (one.method, one.path) == (method, path)]


def worker(state: str = "ready", stage: str = "ready", **more: Any) -> dict[str, Any]:
    return {
        "id": WORKER,
        "status": "IDLE",
        "isStale": False,
        "version": 1,
        "uptimeSeconds": 200,
        "state": state,
        "stage": stage,
        "failure": None,
        "memory_bytes": 2_000_000_000,
        "pid": 4711,
        "occupied": 1,
        "capacity": 30,
        **more,
    }


class Handler(BaseHTTPRequestHandler):
    gateway: StubGateway

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        recorded = Recorded(self.command, parts.path, query, headers, body)
        self.gateway.requests.append(recorded)
        try:
            self._authorize(recorded)
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and method == self.command:
                    function(self, recorded, *match.groups())
                    return
            raise ProblemError(404, "resource not found")
        except ProblemError as problem:
            self.answer(problem.content, problem.status, "application/problem+json")
        except (BrokenPipeError, ConnectionResetError):
            self.gateway.client_gone.set()

    do_GET = do_POST = do_PATCH = do_DELETE = _serve  # noqa: N815 - the names are http.server's

    def _authorize(self, request: Recorded) -> None:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key not in {ADMIN_KEY, RUN_KEY}:
            raise ProblemError(401, "missing bearer token" if not key else "unknown key")
        if key == RUN_KEY and request.path.startswith(("/pilotlight", "/v2/serverless")):
            raise ProblemError(403, "access denied")

    def answer(self, content: Any, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def begin_stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.flush()


def list_endpoints(handler: Handler, _request: Recorded) -> None:
    handler.answer({"endpoints": list(handler.gateway.endpoints.values())})


def list_launchers(handler: Handler, _request: Recorded) -> None:
    handler.answer({"launchers": handler.gateway.launchers})


def get_endpoint(handler: Handler, _request: Recorded, endpoint_id: str) -> None:
    handler.answer(known(handler, endpoint_id))


def known(handler: Handler, endpoint_id: str) -> dict[str, Any]:
    endpoint = handler.gateway.endpoints.get(endpoint_id)
    if endpoint is None:
        raise ProblemError(404, "endpoint not found")
    return endpoint


def create_endpoint(handler: Handler, request: Recorded) -> None:
    body = dict(request.body)
    name = body.pop("name", "generated")
    if any(one["name"] == name for one in handler.gateway.endpoints.values()):
        raise ProblemError(409, f"the name {name!r} is taken")
    deploy(handler, request, lambda: handler.gateway.add(name, **body), 201)


def revise_endpoint(handler: Handler, request: Recorded, endpoint_id: str) -> None:
    endpoint = known(handler, endpoint_id)

    def change() -> dict[str, Any]:
        endpoint.update(request.body)
        if {"model", "env", "engine_url", "gpu_count"} & request.body.keys():
            endpoint["version"] += 1
        return endpoint

    deploy(handler, request, change, 200)


def deploy(handler: Handler, request: Recorded, work: Callable[[], dict[str, Any]], status: int) -> None:
    gateway = handler.gateway
    if request.headers.get("accept") != "application/x-ndjson":
        handler.answer(work(), status)
        return
    handler.begin_stream("application/x-ndjson")
    events = [{"event": "progress", **one} for one in gateway.progress]
    if gateway.deploy_error is not None:
        events.append({"event": "error", **gateway.deploy_error})
    else:
        events.append({"event": "done", "endpoint": work()})
    for event in events:
        handler.wfile.write(json.dumps(event).encode() + b"\n")


def delete_endpoint(handler: Handler, _request: Recorded, endpoint_id: str) -> None:
    known(handler, endpoint_id)
    del handler.gateway.endpoints[endpoint_id]
    handler.send_response(204)
    handler.end_headers()


def list_workers(handler: Handler, _request: Recorded, endpoint_id: str) -> None:
    known(handler, endpoint_id)
    workers = handler.gateway.workers.get(endpoint_id, [])
    handler.answer({"workers": workers, "summary": {}, "endpointVersion": 1})
    handler.gateway.polled.release()


def worker_logs(handler: Handler, request: Recorded, _endpoint_id: str, worker_id: str) -> None:
    """serverless-api.md §7.4: `tail` lines, then live ones for as long as the stream is open."""
    lines = handler.gateway.logs.get(worker_id)
    if lines is None:
        raise ProblemError(404, "resource not found")
    handler.begin_stream("text/event-stream")
    tail = int(request.query.get("tail", "100"))
    for number, line in enumerate(lines[len(lines) - min(tail, len(lines)) :]):
        data = json.dumps({"ts": f"2026-06-01T12:05:{number:02d}Z", "source": "container", "line": line})
        handler.wfile.write(f"id: 2026-06-01T12:05:{number:02d}Z/{number}\ndata: {data}\n\n".encode())
    handler.wfile.flush()
    if handler.gateway.log_stays_open:
        handler.gateway.release.wait(30)


def list_starts(handler: Handler, request: Recorded, endpoint_id: str) -> None:
    starts = handler.gateway.starts.get(endpoint_id, [])
    handler.answer({"starts": starts[: int(request.query.get("limit", "20"))]})


def keys_route(handler: Handler, request: Recorded) -> None:
    gateway = handler.gateway
    if request.method == "GET":
        handler.answer({"keys": gateway.keys})
        return
    key = {
        "id": f"key{len(gateway.keys)}",
        "name": request.body.get("name", "unnamed"),
        "status": "active",
        "scope": request.body.get("scope", "run"),
        "endpoints": request.body["endpoints"],
        "heartbeat_s": request.body.get("heartbeat_s"),
        "priority": request.body.get("priority", "normal"),
        "requests_per_minute": request.body.get("requests_per_minute"),
        "tokens_per_minute": request.body.get("tokens_per_minute"),
        "concurrent_max": request.body.get("concurrent_max"),
        "created_at": "2026-06-01T12:00:00Z",
    }
    gateway.keys.append(key)
    handler.answer({**key, "key": "rpa_new0secret"}, 201)


def update_key(handler: Handler, request: Recorded, key_id: str) -> None:
    (key,) = (key for key in handler.gateway.keys if key["id"] == key_id)
    key |= request.body
    handler.answer(key)


def delete_key(handler: Handler, _request: Recorded, key_id: str) -> None:
    handler.gateway.keys[:] = [key for key in handler.gateway.keys if key["id"] != key_id]
    handler.send_response(204)
    handler.end_headers()


def webhook_secret(handler: Handler, _request: Recorded, endpoint_id: str) -> None:
    handler.answer({"endpoint_id": known(handler, endpoint_id)["id"], "secret": "whsec_0f"})


def dead_webhooks(handler: Handler, request: Recorded) -> None:
    named = request.query.get("endpoint")
    found = [one for one in handler.gateway.dead_webhooks if named in {None, one["endpoint_id"]}]
    handler.answer({"webhooks": found[: int(request.query["limit"])]})


def one_webhook(handler: Handler, request: Recorded, webhook_id: str) -> None:
    found = [one for one in handler.gateway.dead_webhooks if one["id"] == webhook_id]
    if not found:
        raise ProblemError(404, f"webhook {webhook_id} does not exist")
    handler.gateway.dead_webhooks.remove(found[0])
    if request.method == "POST":
        handler.answer({**found[0], "tries": 0})
        return
    handler.send_response(204)
    handler.end_headers()


def usage(handler: Handler, _request: Recorded) -> None:
    endpoint_id = next(iter(handler.gateway.endpoints), "gone")
    handler.answer(
        {
            "intervals": [],
            "totals": [
                {"endpoint_id": endpoint_id, "state": "frozen", "duration_ms": 600_000},
                {"endpoint_id": endpoint_id, "state": "ready", "duration_ms": 90_000},
            ],
        }
    )


def status(handler: Handler, _request: Recorded) -> None:
    handler.answer({"version": "0.1.0", "endpoints": len(handler.gateway.endpoints), "workers": 0})


def submit(handler: Handler, _request: Recorded, _endpoint_id: str) -> None:
    handler.answer({"id": JOB, "status": "IN_QUEUE"})


def job_state(handler: Handler, _request: Recorded, _endpoint_id: str, job_id: str) -> None:
    """Each question gets the job's next state; the last one stays."""
    states = handler.gateway.jobs.get(job_id)
    if not states:
        raise ProblemError(404, "job not found")
    handler.answer(states.pop(0) if len(states) > 1 else states[0])


def run_sync(handler: Handler, request: Recorded, endpoint_id: str) -> None:
    job_state(handler, request, endpoint_id, JOB)


def stream_job(handler: Handler, _request: Recorded, _endpoint_id: str, _job_id: str) -> None:
    answers = handler.gateway.chunks
    handler.answer(answers.pop(0) if len(answers) > 1 else answers[0])


def cancel(handler: Handler, _request: Recorded, _endpoint_id: str, job_id: str) -> None:
    if job_id not in handler.gateway.jobs:
        raise ProblemError(404, "job not found")
    handler.answer({"id": job_id, "status": "CANCELLED"})


def retry(handler: Handler, _request: Recorded, _endpoint_id: str, job_id: str) -> None:
    if job_id not in handler.gateway.jobs:
        raise ProblemError(400, "job cannot be retried in status COMPLETED")
    handler.answer({"id": job_id, "status": "IN_QUEUE"})


def purge(handler: Handler, _request: Recorded, _endpoint_id: str) -> None:
    handler.answer({"removed": 3, "status": "completed"})


def list_jobs(handler: Handler, request: Recorded, _endpoint_id: str) -> None:
    """Pages of the stub's rows; the cursor is a position."""
    rows, start = handler.gateway.job_rows, int(request.query.get("cursor", "0"))
    end = start + int(request.query["limit"])
    handler.answer({"requests": rows[start:end], "cursor": str(end) if end < len(rows) else None})


def wake(handler: Handler, _request: Recorded, _endpoint_id: str) -> None:
    gateway = handler.gateway
    for _ in range(gateway.chat_waits_for_polls):
        gateway.polled.acquire(timeout=20)
    code = gateway.wake_statuses.pop(0) if gateway.wake_statuses else 200
    if code == 200:
        handler.answer({})
    else:
        message = "no worker became ready in time (importing)"
        handler.answer({"error": {"message": message, "type": "server_error"}}, code, retry_after="0")


def models(handler: Handler, _request: Recorded, endpoint_id: str) -> None:
    handler.answer({"object": "list", "data": [{"id": known(handler, endpoint_id)["model"]}]})


def chat(handler: Handler, _request: Recorded, _endpoint_id: str) -> None:
    gateway = handler.gateway
    for _ in range(gateway.chat_waits_for_polls):
        gateway.polled.acquire(timeout=20)
    if gateway.chat_status != 200:
        message = "the queue is full"
        handler.answer(
            {"error": {"message": message, "type": "overloaded"}}, gateway.chat_status, retry_after="7"
        )
        return
    handler.begin_stream("text/event-stream")
    for event in gateway.chat_events:
        handler.wfile.write(event)
        handler.wfile.flush()
    gateway.chat_started.set()
    while gateway.chat_blocks and not gateway.release.wait(0.02):
        handler.wfile.write(b": still here\n\n")
        handler.wfile.flush()
    for event in gateway.chat_rest:
        handler.wfile.write(event)


ENDPOINT = "/pilotlight/v1/endpoints/([^/]+)"
SERVERLESS = "/v2/serverless/([^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/pilotlight/v1/endpoints", list_endpoints),
    ("POST", "/pilotlight/v1/endpoints", create_endpoint),
    ("GET", ENDPOINT, get_endpoint),
    ("PATCH", ENDPOINT, revise_endpoint),
    ("GET", f"{ENDPOINT}/starts", list_starts),
    ("GET", "/pilotlight/v1/keys", keys_route),
    ("POST", "/pilotlight/v1/keys", keys_route),
    ("PATCH", "/pilotlight/v1/keys/([^/]+)", update_key),
    ("DELETE", "/pilotlight/v1/keys/([^/]+)", delete_key),
    ("GET", f"{ENDPOINT}/webhook-secret", webhook_secret),
    ("GET", "/pilotlight/v1/webhooks/dead", dead_webhooks),
    ("POST", "/pilotlight/v1/webhooks/([^/]+)/resend", one_webhook),
    ("DELETE", "/pilotlight/v1/webhooks/([^/]+)", one_webhook),
    ("GET", "/pilotlight/v1/launchers", list_launchers),
    ("GET", "/pilotlight/v1/usage", usage),
    ("GET", "/pilotlight/v1/status", status),
    ("DELETE", SERVERLESS, delete_endpoint),
    ("GET", f"{ENDPOINT}/workers", list_workers),
    ("GET", f"{SERVERLESS}/workers/([^/]+)/logs", worker_logs),
    ("GET", "/v2/([^/]+)/openai/health", wake),
    ("GET", "/v2/([^/]+)/openai/v1/models", models),
    ("POST", "/v2/([^/]+)/openai/v1/chat/completions", chat),
    ("POST", "/v2/([^/]+)/run", submit),
    ("POST", "/v2/([^/]+)/runsync", run_sync),
    ("GET", "/v2/([^/]+)/status/([^/]+)", job_state),
    ("GET", "/v2/([^/]+)/status-sync/([^/]+)", job_state),
    ("GET", "/v2/([^/]+)/stream/([^/]+)", stream_job),
    ("POST", "/v2/([^/]+)/cancel/([^/]+)", cancel),
    ("POST", "/v2/([^/]+)/retry/([^/]+)", retry),
    ("POST", "/v2/([^/]+)/purge-queue", purge),
    ("GET", "/v2/([^/]+)/requests", list_jobs),
]


@pytest.fixture
def gateway() -> Iterator[StubGateway]:
    """A running stub on a free port, ended completely afterwards."""
    stub = StubGateway()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"gateway": stub}))
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="stub gateway"
    )
    thread.start()
    try:
        yield stub
    finally:
        stub.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def environment(gateway: StubGateway, tmp_path: Path) -> dict[str, str]:
    """Variables that point the command line at the stub, and at an empty data folder."""
    return {
        "PILOTLIGHT_URL": gateway.url,
        "PILOTLIGHT_API_KEY": ADMIN_KEY,
        "PILOTLIGHT_HOME": str(tmp_path / "home"),
        "COLUMNS": "100",
    }


@pytest.fixture
def cli(environment: dict[str, str]) -> Callable[..., Result]:
    """Runs the command line in this process: `cli("ls", "--json", input="…")`."""
    from pilotlight.cli.root import app

    def invoke(*arguments: str, input: str | None = None, **more: str) -> Result:
        return CliRunner().invoke(app, list(arguments), input=input, env={**environment, **more})

    return invoke


@pytest.fixture
def spawn(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command line as a process of its own; ends what a test left behind."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", "from pilotlight.cli import main; main()", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, **more},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def a_worker() -> Callable[..., dict[str, Any]]:
    """Makes a worker as the workers route shows it."""
    return worker
