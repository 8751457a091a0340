"""Webhooks and sealed credentials with real gateways that are killed (serverless-api.md §2.12)."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

S3_CONFIG = {
    "accessId": "AKIDEXAMPLE",
    "accessSecret": "very/secret+key",
    "bucketName": "results",
    "endpointUrl": "https://s3.example.com",
}


class Hook:
    """Receives in threads; while `holding` it answers nothing."""

    def __init__(self):
        self.received = []
        self.holding = threading.Event()
        self.released = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.received.append((dict(self.headers), body))
                if hook.holding.is_set():
                    hook.released.wait(30)
                with contextlib.suppress(OSError):
                    self.send_response(204)
                    self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"


@pytest.fixture
def hook():
    made = Hook()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.released.set()
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def cancelled_job(endpoint, **fields):
    """A job that has become terminal without a worker; its id."""
    job_id = endpoint.post("/run", input={"n": 1}, **fields).json()["id"]
    assert endpoint.post(f"/cancel/{job_id}").json()["status"] == "CANCELLED"
    return job_id


def test_a_gateway_killed_while_it_sends_sends_again_with_the_same_id(make_installation, tools, hook):
    """1. The receiver has the webhook but has not answered. 2. SIGKILL. 3. The next gateway sends it again, and
    its signature holds with the secret that the first one showed."""
    installation = make_installation(PILOTLIGHT_WEBHOOKS__ALLOW_PRIVATE="true").start()
    endpoint = installation.deploy(max=0)
    path = f"/pilotlight/v1/endpoints/{endpoint.id}/webhook-secret"
    secret = installation.api.get(path).json()["secret"]
    hook.holding.set()
    job_id = cancelled_job(endpoint, webhook=hook.url)
    tools.until(lambda: hook.received, "the first try has arrived")
    installation.crash()
    hook.holding.clear()
    hook.released.set()
    installation.start()
    tools.until(lambda: len(hook.received) == 2, "the second try has arrived")
    for headers, body in hook.received:
        stamp = headers["X-Webhook-Timestamp"]
        mac = hmac.new(secret.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
        assert headers["X-Webhook-Signature"] == f"v1={mac}"
        sent = json.loads(body)
        assert (sent["id"], sent["status"], sent["webhook"]) == (job_id, "CANCELLED", hook.url)
    assert len({headers["X-Webhook-Id"] for headers, _ in hook.received}) == 1
    assert installation.api.get(path).json()["secret"] == secret
    assert (installation.home / "secret.key").stat().st_mode & 0o777 == 0o600


def test_private_addresses_are_refused_unless_allowed(shared, tools, hook):
    endpoint = shared.deploy(max=0)
    job_id = cancelled_job(endpoint, webhook=hook.url)
    url = f"/pilotlight/v1/webhooks/dead?endpoint={endpoint.id}"
    (dead,) = tools.until(lambda: shared.api.get(url).json()["webhooks"], "it is a dead letter")
    assert (dead["job_id"], dead["tries"], hook.received) == (job_id, 1, [])
    assert "127.0.0.1 is not a public address" in dead["last_error"]


def test_no_file_of_the_installation_holds_credentials_of_a_bucket(installation):
    endpoint = installation.deploy(max=0)
    answer = endpoint.post("/run", input={"n": 1}, s3Config=S3_CONFIG)
    assert answer.status_code == 200, answer.text
    job_id = answer.json()["id"]
    files = [path for path in installation.root.rglob("*") if path.is_file()]
    contents = [path.read_bytes() for path in files]
    assert any(job_id.encode() in content for content in contents)
    assert not any(b"very/secret" in content or b"AKIDEXAMPLE" in content for content in contents)


def test_a_secret_that_is_damaged_ends_the_start_with_words(make_installation):
    installation = make_installation().start()
    assert installation.interrupt() == 0
    (installation.home / "secret.key").write_text("not a secret\n")
    process = installation.spawn()
    with process.stdout:
        assert process.wait(30) == 1
    assert "secret.key must hold 64 hexadecimal digits" in installation.log.read_text()
    (installation.home / "secret.key").unlink()
