"""Schemathesis against the served OpenAPI description: nothing it can think of is answered 5xx."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.conftest import live_installation

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import clients

CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance"

CONFIGURATION = """
[parameters]
"path.endpoint_id" = "{endpoint}"
"query.wait" = 1000
"query.follow" = false

[[operations]]
include-path = "/v2/{{endpoint_id}}/status/{{job_id}}"
parameters = {{ "path.job_id" = "{job}" }}

[[operations]]
include-path-regex = "(stream|retry)/.job_id.$"
parameters = {{ "path.job_id" = "{failed}" }}

[[operations]]
include-path-regex = "batch/.batch_id."
parameters = {{ "path.batch_id" = "{batch}" }}
"""
"""Real ids, or nearly everything would be answered 404 before anybody looks at it; short waits."""


class Nothing(BaseHTTPRequestHandler):
    """Says of every repository that it is not there, as the hub does."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the name is the library's

    def log_message(self, *_):
        """Say nothing."""


@contextlib.contextmanager
def empty_hub():
    """A model hub that has nothing; the real one cannot be relied upon, and a hub that is away is a 503."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.timeout(300)
def test_no_request_breaks_the_server(tmp_path):
    try:
        schemathesis = clients.ensure("schemathesis") / "bin" / "schemathesis"
    except clients.SetupError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error))
    with empty_hub() as hub, live_installation(HF_ENDPOINT=hub) as installation:
        api = installation.api
        endpoint = api.post(
            "/pilotlight/v1/endpoints",
            json={
                "name": "echo",
                "kind": "queue",
                "command": [sys.executable, str(Path(__file__).with_name("echo_worker.py"))],
            },
        )
        assert endpoint.status_code == 201, endpoint.text
        base = f"/v2/{endpoint.json()['id']}"
        done = api.post(f"{base}/runsync", json={"input": {"n": 1}}).json()
        assert done["status"] == "COMPLETED", done
        job = api.post(f"{base}/run", json={"input": 1, "policy": {"ttl": 604_800_000}}).json()
        batch = api.post(f"{base}/batch", json=[{"input": 1}]).json()
        configuration = tmp_path / "schemathesis.toml"
        configuration.write_text(
            CONFIGURATION.format(
                endpoint=endpoint.json()["id"], job=job["id"], failed=done["id"], batch=batch["id"]
            )
        )
        command = [
            str(schemathesis), "--config-file", str(configuration), "--no-color",
            "run", f"{installation.url}/pilotlight/v1/openapi.json",
            "--header", f"Authorization: Bearer {installation.key}",
            "--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "15",
            "--seed", "1", "--generation-deterministic", "--suppress-health-check", "all",
            "--continue-on-failure", "--workers", "1", "--warnings", "off", "--request-timeout", "60",
            # They would end what the others need, or never end themselves.
            "--exclude-name", "DELETE /v2/serverless/{endpoint_id}",
            "--exclude-name", "DELETE /pilotlight/v1/keys/{key_id}",
        ]  # fmt: skip
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        report = ended.stdout + ended.stderr
        assert ended.returncode == 0, report[-20_000:]
        assert " passed" in report or "No issues found" in report, report[-3000:]
        # It is still there; what the endpoint has become is another matter, it was revised many times.
        assert api.get("/health").json() == {"status": "ok"}
        assert api.get(f"{base}/health").status_code == 200
