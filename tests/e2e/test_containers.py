"""Endpoints whose workers are containers: a whole installation, real Podman, an unmodified `runpod` handler."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..registry import private_registry  # noqa: TID252

pytestmark = pytest.mark.timeout(600)
"""Images are made by whoever comes first."""

HANDLER = """
import os, time
import runpod

def handler(job):
    given = job["input"]
    print("working on", given, flush=True)
    while given.get("until") and not os.path.exists(given["until"]):
        time.sleep(0.01)
    return {"worker": os.environ["RUNPOD_POD_ID"], "files": sorted(os.listdir(".")), "pid": os.getpid()}

runpod.serverless.start({"handler": handler})
"""

HTTP = """
import http.server, os

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = (os.environ["RUNPOD_POD_ID"] + " " + self.path).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


class Endpoint:
    """One endpoint of an installation and its containers."""

    def __init__(self, installation, podman, **settings):
        self.installation = installation
        self.podman = podman
        answer = installation.api.post(
            "/pilotlight/v1/endpoints", json={"idle_timeout_s": 600, "max": 1, "flashboot": False} | settings
        )
        assert answer.status_code == 201, answer.text
        self.view = answer.json()
        self.id = self.view["id"]

    def containers(self):
        return self.podman.containers(f"io.pilotlight.endpoint={self.id}")

    def submit(self, **given):
        answer = self.installation.api.post(f"/v2/{self.id}/run", json={"input": given})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def result(self, job_id):
        for _ in range(6):
            job = self.installation.api.get(f"/v2/{self.id}/status-sync/{job_id}?wait=10000").json()
            if job["status"] not in {"IN_QUEUE", "IN_PROGRESS"}:
                return job
        pytest.fail(f"{job}\n{self.installation.log.read_text()[-4000:]}")


@pytest.fixture
def contained(make_installation, podman, tmp_path):
    """A running installation that knows where Podman is, and that this test's folder may be given away."""
    roots = json.dumps([str(tmp_path)])
    return make_installation(
        PILOTLIGHT_CONTAINERS__URL=podman.url, PILOTLIGHT_CONTAINERS__VOLUME_ROOTS=roots
    ).start()


@pytest.fixture
def handler_image(podman):
    """An image as a user of RunPod's library has it."""
    text = f'FROM {podman.base()}\nWORKDIR /app\nCOPY handler.py /handler.py\nCMD ["python", "-u", "/handler.py"]\n'
    return podman.build("handler", text, {"handler.py": HANDLER})


def test_an_unmodified_handler_from_zero_to_one_to_zero(contained, podman, handler_image, tools):
    """Deployed without a command: the image knows it. After the idle timeout nothing of the container is left."""
    endpoint = Endpoint(
        contained, podman, kind="queue", image=handler_image, idle_timeout_s=1, name="handler"
    )
    assert (endpoint.view["image"], endpoint.view["command"]) == (handler_image, [])
    assert endpoint.containers() == []
    jobs = [endpoint.result(endpoint.submit(n=n)) for n in range(3)]
    assert [job["status"] for job in jobs] == ["COMPLETED"] * 3
    assert all(job["output"]["pid"] == 1 for job in jobs)
    tools.until(lambda: endpoint.containers() == [], "the container is gone")
    health = f"/v2/{endpoint.id}/health"
    tools.until(lambda: not any(contained.api.get(health).json()["workers"].values()), "no worker is counted")
    # Its output is a worker's log like any other.
    [log] = (contained.home / "logs").glob("*.log")
    assert "working on" in log.read_text()
    # A fresh container, thus a fresh folder, for the next job (worker-protocol.md §11).
    again = endpoint.result(endpoint.submit(n=4))
    assert again["output"]["worker"] != jobs[0]["output"]["worker"]
    assert again["output"]["files"] == []


def test_a_killed_gateway_leaves_a_container_that_the_next_one_sweeps(
    contained, podman, handler_image, tools, tmp_path
):
    """worker-protocol.md §15 scenario 7, with a container: the job runs again and has used no retry."""
    gate = tmp_path / "gate"
    gate.mkdir()
    endpoint = Endpoint(
        contained, podman, kind="queue", image=handler_image,
        volumes=[{"source": str(gate), "target": "/gate", "read_only": True}],
    )  # fmt: skip
    job_id = endpoint.submit(until="/gate/open")
    status = f"/v2/{endpoint.id}/status/{job_id}"
    tools.until(lambda: contained.api.get(status).json()["status"] == "IN_PROGRESS", "the job runs")
    [leftover] = endpoint.containers()
    contained.crash()
    assert endpoint.containers() == [leftover]
    contained.start()
    tools.until(lambda: leftover not in endpoint.containers(), "the leftover is gone")
    (gate / "open").touch()
    done = endpoint.result(job_id)
    assert (done["status"], "retries" in done) == ("COMPLETED", False)
    assert contained.interrupt() == 0
    assert endpoint.containers() == []


def test_a_container_that_serves_http(contained, podman, tools):
    """Kind load-balancer: the container listens on the port that it is given, on the host's loopback."""
    text = f'FROM {podman.base()}\nCOPY server.py /server.py\nCMD ["python", "-u", "/server.py"]\n'
    image = podman.build("server", text, {"server.py": HTTP})
    endpoint = Endpoint(
        contained, podman, kind="load-balancer", image=image, scaler="REQUEST_COUNT", scaler_value=1
    )
    answer = contained.api.get(f"/lb/{endpoint.id}/some/path")
    assert (answer.status_code, answer.text.split()[1]) == (200, "/some/path")
    assert contained.api.delete(f"/v2/serverless/{endpoint.id}").status_code < 300
    tools.until(lambda: endpoint.containers() == [], "the container is gone")


def test_what_the_command_line_says(contained, podman, handler_image, tmp_path):
    """`deploy --image` makes it, also once more; what is wrong is told before anything is stored."""

    def deploy(*arguments, **environment):
        program = Path(sys.executable).with_name("pilotlight")
        return subprocess.run(
            [program, "deploy", *arguments], capture_output=True, text=True, check=False,
            env=contained.environment | {"COLUMNS": "200"} | environment,
        )  # fmt: skip

    named = ("--kind", "queue", "--name", "shop")
    made = deploy(
        *named,
        "--image",
        handler_image,
        "--volume",
        f"{tmp_path}:/runpod-volume:ro",
        "--memory",
        "512M",
    )
    assert made.returncode == 0, made.stderr
    assert handler_image in made.stdout
    [view] = contained.api.get("/pilotlight/v1/endpoints").json()["endpoints"]
    assert view["volumes"] == [{"source": str(tmp_path), "target": "/runpod-volume", "read_only": True}]
    again = deploy(*named, "--image", handler_image, "--command", "python -u /handler.py")
    assert again.returncode == 0, again.stderr
    [view] = contained.api.get("/pilotlight/v1/endpoints").json()["endpoints"]
    assert (view["version"], view["command"], view["memory_bytes"]) == (
        2,
        ["python", "-u", "/handler.py"],
        512 << 20,
    )
    assert len(view["volumes"]) == 1
    missing = deploy("--kind", "queue", "--image", "localhost:1/no/such:1")
    assert missing.returncode == 1
    assert "localhost:1/no/such:1 cannot be fetched" in missing.stderr
    silent = deploy("--kind", "queue", "--image", "localhost:1/no/such:1", "--registry-user", "me")
    assert silent.returncode == 2
    assert "PILOTLIGHT_REGISTRY_PASSWORD" in silent.stderr


def test_the_password_of_a_registry_is_nowhere_to_be_read(contained, podman, tmp_path, tools):
    """Fetched with it twice, by `deploy` and by a worker; absent from answers, containers, database and logs."""
    busybox = Path(shutil.which("busybox"))
    image = podman.build(
        "idle",
        'FROM scratch\nCOPY busybox /busybox\nCMD ["/busybox", "sleep", "600"]\n',
        {"busybox": busybox},
    )
    with private_registry(podman, image, "team/idle", tmp_path) as registry:
        reference = f"{registry.address}/team/idle:1"
        login = {"registry_user": "me", "registry_password": "secret-word"}
        endpoint = Endpoint(contained, podman, kind="queue", image=reference, **login)
        assert "registry_password" not in endpoint.view
        assert endpoint.view["registry_user"] == "me"
        podman.run("rmi", "--force", reference)
        registry.asked.clear()
        endpoint.submit()
        [container] = tools.until(endpoint.containers, "the container is made")
        assert any(given == registry.authorization for _, given in registry.asked)
        assert "secret-word" not in podman.run("inspect", container)
        sealed = base64.b64encode(b"me:secret-word").decode()
        assert contained.interrupt() == 0
        assert endpoint.containers() == []
    found = [path for path in contained.home.rglob("*") if path.is_file()]
    for data in (*(path.read_bytes() for path in found), contained.log.read_bytes()):
        assert b"secret-word" not in data
        assert sealed.encode() not in data
    assert f"fetched image {reference}" in "".join(
        path.read_text() for path in found if path.suffix == ".log"
    )
