"""Workers that are any command: processes of the kinds `queue` and `load-balancer`, run whole.

The queue workers here speak the bare protocol with the standard library; those built on real SDKs have tests of
their own.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading

import httpx
import pytest

QUEUE_WORKER = r"""
import json, os, signal, sys, threading, time, urllib.request

def call(url, body=None, timeout=60):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": os.environ["RUNPOD_AI_API_KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method="GET" if data is None else "POST")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as answer:
        return answer.status, answer.read()

ending = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: (print("told to end", flush=True), ending.set()))
print("worker", os.environ["RUNPOD_POD_ID"], "begins", flush=True)
if os.environ.get("FAIL"):
    sys.exit("cannot load: " + os.environ["FAIL"])
open("begun", "a").write("x")
me, holding = os.environ["RUNPOD_POD_ID"], []

def beat():
    while True:
        call(os.environ["RUNPOD_WEBHOOK_PING"].replace("$RUNPOD_POD_ID", me) + "&job_id=" + ",".join(holding))
        time.sleep(0.5)

threading.Thread(target=beat, daemon=True).start()
while not ending.is_set():
    status, body = call(os.environ["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", me) + "&job_in_progress=0")
    if status != 200:
        continue
    job = json.loads(body)
    holding.append(job["id"])
    given = job["input"]
    if given.get("crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    if given.get("until"):
        while not os.path.exists(given["until"]):
            time.sleep(0.01)
    output = {"begun": open("begun").read(), "cwd": os.getcwd(), "files": sorted(os.listdir(".")),
              "home": os.listdir(os.environ["HOME"]), "args": sys.argv[1:], "worker": me,
              "env": {name: os.environ.get(name) for name in given.get("env", [])}}
    result = {"output": output}
    if given.get("refresh"):
        result["stopPod"] = True
    url = os.environ["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$RUNPOD_POD_ID", me).replace("$ID", job["id"])
    call(url + "&isStream=false", result)
    holding.clear()
print("ends", flush=True)
"""

HTTP_WORKER = r"""
import http.server, os, sys, time

flags = os.environ["FLAGS"]
print("listening on", os.environ["PORT"], flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def do_GET(self):
        if self.path == "/crash":
            os._exit(3)
        if self.path == "/healthz":
            name = os.path.join(flags, "health")
            status = int(open(name).read()) if os.path.exists(name) else 200
            self.send_response(status); self.send_header("Content-Length", "0"); self.end_headers()
            return
        if self.path.startswith("/until/"):
            while not os.path.exists(os.path.join(flags, self.path[7:])):
                time.sleep(0.01)
        body = (os.environ["RUNPOD_POD_ID"] + " " + self.path).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)

class Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = True

if not os.environ.get("DEAF"):
    Server(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
time.sleep(3600)
"""


@pytest.fixture
def deploy(installation, tmp_path):
    """Makes an endpoint of one of the two programs; gives what calls it."""

    def make(kind, source, *, arguments=(), **settings):
        script = tmp_path / f"{kind}.py"
        script.write_text(source)
        body = {
            "kind": kind,
            "command": [sys.executable, str(script), *arguments],
            "idle_timeout_s": 600,
            "memory_bytes": 50_000_000,
            "flashboot": False,
            **settings,
        }
        answer = installation.api.post("/pilotlight/v1/endpoints", json=body)
        assert answer.status_code == 201, answer.text
        return Called(installation, answer.json())

    return make


class Called:
    """One endpoint, as its callers and its owner see it."""

    def __init__(self, installation, view):
        self.installation = installation
        self.api = installation.api
        self.id = view["id"]
        self.url = view["url"]

    def view(self):
        return self.api.get(f"/pilotlight/v1/endpoints/{self.id}").json()

    def workers(self):
        return self.api.get(f"/v2/serverless/{self.id}/workers").json()["workers"]

    def submit(self, **given):
        answer = self.api.post(f"/v2/{self.id}/run", json={"input": given})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def result(self, job_id):
        for _ in range(6):
            job = self.api.get(f"/v2/{self.id}/status-sync/{job_id}?wait=10000").json()
            if job["status"] not in {"IN_QUEUE", "IN_PROGRESS"}:
                return job
        pytest.fail(f"{job}\n{self.installation.log.read_text()[-4000:]}")

    def status(self, job_id):
        return self.api.get(f"/v2/{self.id}/status/{job_id}").json()["status"]

    def log(self, worker_id):
        url = f"/v2/serverless/{self.id}/workers/{worker_id}/logs?follow=false"
        frames = self.api.get(url).text.splitlines()
        return [json.loads(line[6:])["line"] for line in frames if line.startswith("data: ")]

    def get(self, path="/", **headers):
        return self.api.get(
            self.url + path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )


def test_a_queue_worker_comes_with_a_job_and_goes_without(deploy, tools):
    """1. A job starts a worker from nothing. 2. It sees what worker-protocol.md §2.1 and serverless-api.md §4.1
    promise and an empty folder of its own. 3. After the idle timeout it is told to end, ends by itself, and nothing of it is left. 4. The
    next one finds nothing of the first (worker-protocol.md §11)."""
    endpoint = deploy(
        "queue", QUEUE_WORKER, arguments=["--size", "2 words"], idle_timeout_s=1, env={"MINE": "1"}
    )
    names = [
        "MINE", "RUNPOD_POD_ID", "RUNPOD_ENDPOINT_ID", "RUNPOD_PING_INTERVAL", "RUNPOD_LOG_LEVEL",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "RUNPOD_ENDPOINT_BASE_URL", "NO_PROXY", "PILOTLIGHT_WORKER_STATE_URL",
        "PILOTLIGHT_HOME", "RUNPOD_DC_ID", "RUNPOD_CPU_COUNT", "RUNPOD_GPU_COUNT", "RUNPOD_GPU_TYPE_ID",
    ]  # fmt: skip
    assert endpoint.view()["status"] == "idle"
    seen = []
    for _ in range(2):
        job = endpoint.result(endpoint.submit(env=names))
        assert job["status"] == "COMPLETED", job
        output = job["output"]
        assert (output["begun"], output["files"], output["home"]) == ("x", ["begun"], [])
        assert output["args"] == ["--size", "2 words"]
        assert output["env"] == {
            "MINE": "1",
            "RUNPOD_POD_ID": output["worker"],
            "RUNPOD_ENDPOINT_ID": endpoint.id,
            "RUNPOD_PING_INTERVAL": "2000",
            "RUNPOD_LOG_LEVEL": "INFO",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_ENDPOINT_BASE_URL": f"{endpoint.installation.url}/v2",
            "NO_PROXY": "127.0.0.1",
            "PILOTLIGHT_WORKER_STATE_URL": None,
            "PILOTLIGHT_HOME": None,
            "RUNPOD_DC_ID": "LOCAL",
            "RUNPOD_CPU_COUNT": str(len(os.sched_getaffinity(0))),
            "RUNPOD_GPU_COUNT": "0",
            "RUNPOD_GPU_TYPE_ID": None,
        }
        seen.append(output)
        tools.until(lambda: not endpoint.installation.processes(), "no process is left")
        tools.until(lambda: not endpoint.view()["workers"], "no worker is left")
        log = endpoint.log(output["worker"])
        assert "told to end" in log
        assert log[-1] == "exited with status 0"
    assert seen[0]["worker"] != seen[1]["worker"]
    assert not list((endpoint.installation.home / "work").iterdir())
    starts = endpoint.api.get(f"/pilotlight/v1/endpoints/{endpoint.id}/starts").json()["starts"]
    assert [start["outcome"] for start in starts] == ["ready", "ready"]
    assert all(start["first_token_after_ms"] >= start["ready_after_ms"] for start in starts)
    assert endpoint.view()["failure"] is None


def test_a_draining_worker_finishes_its_job_and_gets_no_other(deploy, tools, tmp_path):
    """worker-protocol.md §6.3: a new revision drains the old worker, whose job in hand is finished there."""
    endpoint = deploy("queue", QUEUE_WORKER, max=1)
    first = endpoint.submit(until=str(tmp_path / "go"))
    tools.until(lambda: endpoint.status(first) == "IN_PROGRESS", "the job runs")
    (old,) = endpoint.workers()
    command = endpoint.view()["command"]
    revised = endpoint.api.patch(
        f"/pilotlight/v1/endpoints/{endpoint.id}", json={"command": [*command, "--new"]}
    )
    assert (revised.status_code, revised.json()["version"]) == (200, 2)
    tools.until(
        lambda: old["id"] in [w["id"] for w in endpoint.workers() if w["state"] == "draining"], "it drains"
    )
    second = endpoint.submit()
    (tmp_path / "go").touch()
    done = endpoint.result(first)
    assert (done["status"], done["output"]["worker"]) == ("COMPLETED", old["id"])
    other = endpoint.result(second)
    assert other["output"]["args"] == ["--new"]
    assert other["output"]["worker"] != old["id"]


def test_a_job_that_kills_its_worker_is_run_once_more_and_then_failed(deploy, tools):
    endpoint = deploy("queue", QUEUE_WORKER)
    job = endpoint.result(endpoint.submit(crash=True))
    assert job["status"] == "FAILED", job
    tools.until(lambda: endpoint.view()["failure"], "the crash is told")
    assert "signal 9" in endpoint.view()["failure"]["cause"]
    assert endpoint.result(endpoint.submit())["status"] == "COMPLETED"


def test_a_program_that_cannot_start_says_why(deploy, tools):
    """Its last line is the reason; after three failures the endpoint rests."""
    endpoint = deploy("queue", QUEUE_WORKER, env={"FAIL": "no weights"})
    job = endpoint.submit()
    view = tools.until(lambda: (v := endpoint.view())["status"] == "unhealthy" and v, "it is unhealthy")
    assert view["failure"]["kind"] == "exited"
    assert "exit status 1" in view["failure"]["cause"]
    assert view["failure"]["cause"].endswith("cannot load: no weights")
    assert "pilotlight logs" in view["failure"]["advice"]
    assert endpoint.status(job) == "IN_QUEUE"


def test_a_worker_that_asks_to_be_replaced_is(deploy, tools):
    """worker-protocol.md §6.4: it gets nothing more, ends, and that is no crash."""
    endpoint = deploy("queue", QUEUE_WORKER, min=1)
    first = endpoint.result(endpoint.submit(refresh=True))
    old = first["output"]["worker"]
    tools.until(lambda: old not in [worker["id"] for worker in endpoint.workers()], "it has gone")
    second = endpoint.result(endpoint.submit())
    assert second["output"]["worker"] != old
    assert endpoint.view()["failure"] is None


def test_a_silent_start_ends_at_the_boot_deadline(make_installation, tools, tmp_path):
    """worker-protocol.md §6.1: ready at the first take, and not for ever waited for."""
    installation = make_installation(PILOTLIGHT_WORKERS__START_TIMEOUT_S="1").start()
    command = [sys.executable, "-c", "import time; time.sleep(3600)"]
    body = {"kind": "queue", "command": command, "memory_bytes": 50_000_000, "min": 1}
    view = installation.api.post("/pilotlight/v1/endpoints", json=body).json()
    url = f"/pilotlight/v1/endpoints/{view['id']}"
    failure = tools.until(lambda: installation.api.get(url).json()["failure"], "it fails")
    assert failure["kind"] == "timeout"
    installation.api.delete(f"/v2/serverless/{view['id']}")


def test_a_load_balancer_from_zero_to_one_and_back(deploy, tools, tmp_path):
    """1. A request starts a worker and waits for its health. 2. 204 is not routable yet. 3. With 200 the request
    is answered, by path and by host. 4. Health that goes takes it out of rotation, health that returns brings it
    back. 5. After the idle timeout it is gone."""
    health = tmp_path / "health"
    health.write_text("204")
    endpoint = deploy(
        "load-balancer",
        HTTP_WORKER,
        max=1,
        env={"FLAGS": str(tmp_path), "HEALTH_CHECK_PATH": "/healthz"},
    )
    assert endpoint.view()["scaler"] == "REQUEST_COUNT"
    asking = endpoint.installation.background(lambda: endpoint.get("/hello?x=1"))
    (worker,) = tools.until(
        lambda: [each for each in endpoint.workers() if each["stage"] == "initializing"], "it says 204"
    )
    assert worker["status"] == "INITIALIZING"
    assert not asking.done()
    health.write_text("200")
    answer = asking.result(30)
    assert (answer.text, answer.headers["x-runpod-worker-id"]) == (f"{worker['id']} /hello?x=1", worker["id"])
    by_host = endpoint.api.get("/hello", headers={"host": f"{endpoint.id}.lb.example.org"})
    assert by_host.text == f"{worker['id']} /hello"
    assert endpoint.api.get(f"/v2/{endpoint.id}/health").status_code == 200

    health.write_text("500")
    tools.until(
        lambda: [each for each in endpoint.workers() if each["status"] == "UNHEALTHY"], "out of rotation"
    )
    asking = endpoint.installation.background(lambda: endpoint.get("/again"))
    health.write_text("200")
    assert asking.result(30).text == f"{worker['id']} /again"

    endpoint.api.patch(f"/pilotlight/v1/endpoints/{endpoint.id}", json={"idle_timeout_s": 1})
    tools.until(lambda: not endpoint.installation.processes(), "no process is left")
    tools.until(lambda: not endpoint.view()["workers"], "no worker is left")
    resumed = endpoint.get("/back", x_runpod_worker_id=f"strict-resume {worker['id']}")
    assert resumed.text == f"{worker['id']} /back"
    assert endpoint.installation.interrupt() == 0
    # Two lives under one id: nothing is charged twice, nor for the time between them.
    rows = endpoint.installation.table("SELECT start_ms, end_ms FROM usage_intervals ORDER BY sequence")
    gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(rows)]
    assert [gap > 0 for gap in gaps].count(True) == 1
    assert min(gaps) == 0


def test_requests_in_hand_are_finished_before_a_worker_ends(deploy, tools, tmp_path):
    endpoint = deploy(
        "load-balancer", HTTP_WORKER, env={"FLAGS": str(tmp_path), "HEALTH_CHECK_PATH": "/healthz"}
    )
    asking = endpoint.installation.background(lambda: endpoint.get("/until/go"))
    tools.until(lambda: [each for each in endpoint.workers() if each["occupied"]], "it is busy")
    endpoint.api.patch(f"/pilotlight/v1/endpoints/{endpoint.id}", json={"max": 0})
    tools.until(lambda: [each for each in endpoint.workers() if each["state"] == "draining"], "it drains")
    (tmp_path / "go").touch()
    assert asking.result(30).text.endswith("/until/go")
    tools.until(lambda: not endpoint.installation.processes(), "no process is left")


def test_a_worker_that_drains_is_resumed_when_it_has_ended(deploy, tools, tmp_path):
    """serverless-api.md §3: `strict-resume` restarts what was scaled down, and waits until it is."""
    endpoint = deploy(
        "load-balancer", HTTP_WORKER, env={"FLAGS": str(tmp_path), "HEALTH_CHECK_PATH": "/healthz"}
    )
    asking = endpoint.installation.background(lambda: endpoint.get("/until/go"))
    (worker,) = tools.until(lambda: [each for each in endpoint.workers() if each["occupied"]], "it is busy")
    settings = f"/pilotlight/v1/endpoints/{endpoint.id}"
    endpoint.api.patch(settings, json={"max": 0})
    tools.until(lambda: [each for each in endpoint.workers() if each["state"] == "draining"], "it drains")
    # What is in hand there may start a second one.
    endpoint.api.patch(settings, json={"max": 2})
    pin = f"strict-resume {worker['id']}"
    again = endpoint.installation.background(lambda: endpoint.get("/again", x_runpod_worker_id=pin))
    (tmp_path / "go").touch()
    assert asking.result(30).text == f"{worker['id']} /until/go"
    assert again.result(30).text == f"{worker['id']} /again"


def test_load_adds_workers_with_ports_of_their_own(deploy, tools, tmp_path):
    """REQUEST_COUNT: five requests at two a worker need three workers, side by side on one machine."""
    endpoint = deploy(
        "load-balancer",
        HTTP_WORKER,
        concurrency=2,
        scaler_value=2,
        env={"FLAGS": str(tmp_path), "HEALTH_CHECK_PATH": "/healthz"},
    )
    asking = [endpoint.installation.background(lambda: endpoint.get("/until/go")) for _ in range(5)]
    tools.until(lambda: sum(each["occupied"] for each in endpoint.workers()) == 5, "all are being served")
    (tmp_path / "go").touch()
    answered = {future.result(30).headers["x-runpod-worker-id"] for future in asking}
    assert len(answered) == 3


def test_a_worker_that_crashes_is_502_and_replaced(deploy, tools, tmp_path):
    endpoint = deploy(
        "load-balancer", HTTP_WORKER, env={"FLAGS": str(tmp_path), "HEALTH_CHECK_PATH": "/healthz"}
    )
    assert endpoint.get("/").status_code == 200
    crashed = endpoint.get("/crash")
    assert (crashed.status_code, crashed.json()) == (502, {"error": "bad gateway"})
    # Until the gateway has seen its end, the crashed one may still be picked and refuse the connection.
    after = tools.until(
        lambda: answer if (answer := endpoint.get("/")).status_code == 200 else None, "another worker answers"
    )
    assert after.headers["x-runpod-worker-id"] != crashed.headers["x-runpod-worker-id"]
    log = endpoint.log(crashed.headers["x-runpod-worker-id"])
    assert log[-1] == "exited with status 3"


def test_a_worker_that_never_listens_is_ended_and_told(make_installation, tools, tmp_path):
    """serverless-api.md §3: terminated after 8 min; until then nobody is routable."""
    installation = make_installation(
        PILOTLIGHT_LOAD_BALANCER__UNHEALTHY_S="1", PILOTLIGHT_LOAD_BALANCER__WAIT_S="1"
    ).start()
    script = tmp_path / "deaf.py"
    script.write_text(HTTP_WORKER)
    view = installation.api.post(
        "/pilotlight/v1/endpoints",
        json={
            "kind": "load-balancer",
            "command": [sys.executable, str(script)],
            "memory_bytes": 50_000_000,
            "env": {"FLAGS": str(tmp_path), "DEAF": "1"},
        },
    ).json()
    answer = installation.api.get(view["url"])
    assert (answer.status_code, answer.json()) == (400, {"error": "no workers available"})
    url = f"/pilotlight/v1/endpoints/{view['id']}"
    failure = tools.until(lambda: installation.api.get(url).json()["failure"], "it fails")
    assert failure["kind"] == "unhealthy"
    assert "GET /ping" in failure["cause"]
    assert "PORT" in failure["advice"]


def test_a_stream_arrives_while_it_is_made(deploy, installation, tmp_path):
    source = r"""
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/ping": return
        self.wfile.write(b"first\n"); self.wfile.flush()
        while not os.path.exists(os.environ["GO"]): pass
        self.wfile.write(b"last\n")
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""
    endpoint = deploy("load-balancer", source, env={"GO": str(tmp_path / "go")})
    read = []
    first = threading.Event()

    def follow():
        with installation.api.stream("GET", endpoint.url + "/", timeout=httpx.Timeout(30)) as answer:
            for line in answer.iter_lines():
                read.append(line)
                first.set()

    following = installation.background(follow)
    assert first.wait(30)
    assert read == ["first"]
    (tmp_path / "go").touch()
    following.result(30)
    assert read == ["first", "last"]


def test_our_own_worker_program_is_a_load_balancing_worker(installation, tools):
    """vllm-worker.md §7.1: in direct mode behind our own load balancer.

    1. A request wakes a worker, waits while it says 204, and is answered. 2. Streams pass. 3. After the idle
    timeout it is told to end, drains, and nothing is left.
    """
    body = {
        "kind": "load-balancer",
        "command": [sys.executable, "-m", "pilotlight.worker"],
        "env": {"WORKER_MODE": "http", "MODEL_NAME": "pilotlight/ember", "FAKE_ENGINE_START_SECONDS": "1"},
        "idle_timeout_s": 1,
        "memory_bytes": 50_000_000,
        "flashboot": False,
    }
    answer = installation.api.post("/pilotlight/v1/endpoints", json=body)
    assert answer.status_code == 201, answer.text
    endpoint = Called(installation, answer.json())
    chat = {"messages": [{"role": "user", "content": "one two three"}]}
    whole = installation.api.post(f"{endpoint.url}/v1/chat/completions", json=chat)
    assert whole.status_code == 200, whole.text
    assert whole.json()["choices"][0]["message"]["content"] == "one two three"
    streamed = installation.api.post(f"{endpoint.url}/v1/chat/completions", json={**chat, "stream": True})
    assert streamed.text.endswith("data: [DONE]\n\n")
    status = endpoint.get("/").json()
    assert (status["status"], status["models"][0]) == ("ready", "pilotlight/ember")
    assert installation.api.post(f"{endpoint.url}/sleep", json={}).status_code == 403
    tools.until(lambda: not installation.processes(), "no process is left")
    starts = installation.api.get(f"/pilotlight/v1/endpoints/{endpoint.id}/starts").json()["starts"]
    assert starts[0]["outcome"] == "ready"
    assert "initializing" in [stage["stage"] for stage in starts[0]["stages"]]
