"""Crash campaigns of the job queue: gateway and database server are killed under load, again and again.

What must hold however it went: every submission that was answered 200 is there after each restart and comes to
exactly one end; a result never changes; a job whose cancellation was acknowledged stays cancelled; one whose
answer was lost in a crash is made once, also when it is submitted again under its idempotency key; and each end is
told to its webhook, always with the same words.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import random
import sys
import threading
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any, Self

import httpx

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}
LOAD = 25
"""Submissions of one client in one life of the gateway."""

SETTLE_S = 90
"""Bound of the waits at the end; nothing is asserted about how much of it is used."""


class Receiver:
    """Takes webhooks: job id → the bodies it was told, each kept once."""

    def __init__(self) -> None:
        self.told: defaultdict[str, set[bytes]] = defaultdict(set)
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.told[json.loads(body)["id"]].add(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A killed gateway breaks its connections."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        """Where to send."""
        return f"http://127.0.0.1:{self.server.server_address[1]}/hook"

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class JobCampaign:
    """One campaign.

    Args:
        installation: Not started yet; `webhooks.allow_private` is on.
        kills: How many kills.
        seed: Chooses moments and load; printed, so that a failure can be repeated.
        server: The database server, if there is one.
        server_kills: How many of the kills are the server's.
    """

    def __init__(
        self, installation: Any, *, kills: int, seed: int, server: Any = None, server_kills: int = 0
    ) -> None:
        self.installation = installation
        self.kills = kills
        self.random = random.Random(seed)
        self.server = server
        self.of_the_server = set(self.random.sample(range(kills), server_kills))
        self.pending: dict[str, str] = {}
        self.ended: dict[str, dict[str, Any]] = {}
        self.with_webhook: set[str] = set()
        self.cancelled: set[str] = set()
        self.uncertain: list[tuple[str, dict[str, Any]]] = []
        self.ids: defaultdict[str, set[str]] = defaultdict(set)
        self.over = threading.Event()
        self.progress = threading.Semaphore(0)
        self.disturbed = False
        self.restarts_s: list[float] = []
        print(f"job campaign: {kills} kills, {server_kills} of them of the server, seed {seed}")

    def run(self) -> None:
        """The whole of it."""
        with Receiver() as self.receiver:
            self.installation.start()
            self.path = f"/v2/{self._deploy()}"
            for number in range(self.kills):
                self._round(number)
            self._settle()
            self._check_end()

    def _deploy(self) -> str:
        command = [sys.executable, str(Path(__file__).with_name("queue_worker.py"))]
        body = {
            "kind": "queue",
            "name": "campaign",
            "command": command,
            "min": 1,
            "max": 2,
            "concurrency": 8,
            "memory_bytes": 50_000_000,
        }
        answer = self.installation.api.post("/pilotlight/v1/endpoints", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    # Load.

    def _client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.installation.url,
            headers=dict(self.installation.api.headers),
            trust_env=False,
            timeout=30,
        )

    def _load(self, seed: int) -> None:
        """Submit, and cancel now and then, until the gateway is gone or it is enough."""
        choice = random.Random(seed)
        with self._client() as client:
            for _ in range(LOAD):
                if self.over.is_set():
                    return
                key = uuid.UUID(int=choice.getrandbits(128)).hex
                body: dict[str, Any] = {"input": {"key": key, "filler": "x" * choice.choice((0, 10, 20_000))}}
                if choice.random() < 0.4:
                    body["webhook"] = self.receiver.url
                try:
                    job_id = self._submit(client, key, body)
                except httpx.TransportError:
                    self.uncertain.append((key, body))
                    self.progress.release(LOAD)
                    return
                self.progress.release()
                if job_id is not None and choice.random() < 0.1:
                    with contextlib.suppress(httpx.TransportError):
                        self._cancel(client, job_id)

    def _submit(self, client: httpx.Client, key: str, body: dict[str, Any]) -> str | None:
        answer = client.post(f"{self.path}/run", json=body, headers={"Idempotency-Key": key})
        if self.disturbed and answer.status_code == 503:
            # Whether it was stored is not known: the connection may have broken after the commit.
            self.uncertain.append((key, body))
            return None
        assert answer.status_code == 200, answer.text
        job_id = str(answer.json()["id"])
        self.ids[key].add(job_id)
        self.pending.setdefault(job_id, key)
        if "webhook" in body:
            self.with_webhook.add(job_id)
        return job_id

    def _cancel(self, client: httpx.Client, job_id: str) -> None:
        answer = client.post(f"{self.path}/cancel/{job_id}")
        assert answer.status_code == 200 or (self.disturbed and answer.status_code == 503), answer.text
        if answer.status_code == 200 and answer.json()["status"] == "CANCELLED":
            self.cancelled.add(job_id)

    # Kills.

    def _round(self, number: int) -> None:
        """Load, a kill in the middle of it, a restart."""
        self.over.clear()
        self.disturbed = number in self.of_the_server
        seeds = [self.random.getrandbits(64) for _ in range(self.random.randint(1, 4))]
        busy = [self.installation.background(lambda seed=seed: self._load(seed)) for seed in seeds]
        self._wait_for_a_moment(len(seeds))
        if self.disturbed:
            self._kill_server()
        else:
            self.installation.crash()
        self.over.set()
        for work in busy:
            work.result()
        if not self.disturbed and self.random.random() < 0.1:
            self._kill_while_starting()
        began = time.monotonic()
        if self.installation.process is None:
            self.installation.start()
        self._submit_again()
        self.restarts_s.append(time.monotonic() - began)
        self._check_known()

    def _wait_for_a_moment(self, loads: int) -> None:
        """Any moment will do; whichever it hits, the same must hold. Counted in submissions rather than seconds, so
        that a slow machine is as busy as a fast one."""
        while self.progress.acquire(blocking=False):
            pass
        if self.random.random() < 0.9:
            for _ in range(self.random.randint(1, loads * LOAD)):
                self.progress.acquire(timeout=1)
        time.sleep(0.03 * self.random.random())

    def _kill_server(self) -> None:
        """The server alone, or the gateway shortly before or after it."""
        gateway = self.random.choice(("lives", "before", "after"))
        if gateway == "before":
            self.installation.crash()
        self.server.kill()
        if gateway == "after":
            self.installation.crash()
        self.server.start()

    def _kill_while_starting(self) -> None:
        process = self.installation.spawn()
        time.sleep(self.random.uniform(0.1, 1.2))
        process.kill()
        process.wait()
        process.stdout.close()

    def _submit_again(self) -> None:
        """What a client does that got no answer."""
        deadline = time.monotonic() + SETTLE_S
        with self._client() as client:
            while self.uncertain:
                assert time.monotonic() < deadline, "the gateway did not recover"
                key, body = self.uncertain.pop()
                if self._submit(client, key, body) is None:
                    time.sleep(0.05)

    # Checks.

    def _status(self, job_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + SETTLE_S
        answer = self.installation.api.get(f"{self.path}/status/{job_id}")
        while self.disturbed and answer.status_code == 503 and time.monotonic() < deadline:
            time.sleep(0.05)
            answer = self.installation.api.get(f"{self.path}/status/{job_id}")
        assert answer.status_code == 200, f"{job_id} is lost: {answer.status_code} {answer.text}"
        job: dict[str, Any] = answer.json()
        return job

    def _check_known(self) -> None:
        """Every acknowledged job is there; of the ended ones a few are looked at again."""
        for job_id in list(self.pending):
            job = self._status(job_id)
            if job["status"] in ENDED:
                self._check(job, self.pending.pop(job_id))
                self.ended[job_id] = job
            assert job_id not in self.cancelled or job["status"] == "CANCELLED", job
        for job_id in self.random.sample(sorted(self.ended), min(10, len(self.ended))):
            assert self._status(job_id) == self.ended[job_id], "a result has changed"

    def _check(self, job: dict[str, Any], key: str) -> None:
        if job["id"] in self.cancelled:
            assert job["status"] == "CANCELLED", job
            assert "output" not in job, job
        elif job["status"] != "CANCELLED":
            # A cancellation whose answer was lost may have happened.
            assert job["status"] == "COMPLETED", job
            assert job["output"]["input"]["key"] == key, job

    def _settle(self) -> None:
        """Wait until every job has ended and every webhook was told."""
        deadline = time.monotonic() + SETTLE_S
        while self.pending:
            assert time.monotonic() < deadline, f"not ended: {[self._status(each) for each in self.pending]}"
            self._check_known()
            time.sleep(0.05)
        while silent := self.with_webhook - set(self.receiver.told):
            assert time.monotonic() < deadline, f"no webhook: {[self.ended[each] for each in silent]}"
            time.sleep(0.05)

    def _check_end(self) -> None:
        for key, ids in self.ids.items():
            assert len(ids) == 1, f"{key} was made more than once: {ids}"
        for job_id, job in self.ended.items():
            assert self._status(job_id) == job, "a result has changed"
        for job_id, bodies in self.receiver.told.items():
            assert len(bodies) == 1, f"{job_id} ended more than once: {bodies}"
            told = json.loads(next(iter(bodies)))
            assert {**told, "input": None, "webhook": None} == {
                **self.ended[job_id],
                "input": None,
                "webhook": None,
            }
        counters = self.installation.api.get(f"{self.path}/health").json()["jobs"]
        completed = sum(job["status"] == "COMPLETED" for job in self.ended.values())
        assert counters == {"completed": completed, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0}
        figure = {
            "kills": self.kills,
            "server_kills": len(self.of_the_server),
            "jobs": len(self.ended),
            "cancelled": len(self.cancelled),
            "webhooks": len(self.receiver.told),
            "restart_s_max": round(max(self.restarts_s), 2),
        }
        print(json.dumps({"job_campaign": figure}))
