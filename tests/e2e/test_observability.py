"""What an installation of real processes tells of its requests: to Prometheus, in the access log, in traces."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "pilotlight.json"
PROGRAMS = [name for name in ("prometheus", "promtool") if not shutil.which(name)]
CONFIG = """
scrape_configs:
  - job_name: pilotlight
    scrape_interval: 200ms
    scrape_timeout: 200ms
    authorization:
      credentials: {key}
    static_configs:
      - targets: ["{target}"]
"""
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Prometheus:
    """A real one that scrapes an installation."""

    def __init__(self, folder, installation, tools):
        config = folder / "prometheus.yml"
        target = installation.url.removeprefix("http://")
        config.write_text(CONFIG.format(key=installation.admin_key, target=target))
        self.log = folder / "prometheus.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
                    "--web.listen-address=127.0.0.1:0", "--log.format=json",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        address = re.compile(r'"address":"(127\.0\.0\.1:\d+)","[^}]*"msg":"Listening on"')
        found = tools.until(lambda: address.search(self.log.read_text()), "Prometheus listens")
        self.api = httpx.Client(base_url=f"http://{found[1]}/api/v1", trust_env=False, timeout=30)

    def query(self, query):
        answer = self.api.get("/query", params={"query": query}).json()
        assert answer["status"] == "success", (query, answer)
        return answer["data"]["result"]

    def value(self, query):
        """The one value of a query; None while there is none."""
        result = self.query(query)
        return float(result[0]["value"][1]) if result else None

    def stop(self):
        self.api.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def prometheus(tmp_path, tools):
    if PROGRAMS:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not installed: {', '.join(PROGRAMS)}")
    with contextlib.ExitStack() as stack:

        def start(installation):
            made = Prometheus(tmp_path, installation, tools)
            stack.callback(made.stop)
            return made

        yield start


def test_prometheus_scrapes_what_the_dashboard_asks_for(shared, prometheus, tools):
    """1. Streams, a failure, a refusal. 2. Prometheus has them. 3. So have all queries of the dashboard."""
    endpoint = shared.deploy(max=1)
    seen = prometheus(shared)
    # An increase is only seen by who has looked before.
    requests = f'sum(pilotlight_requests_total{{endpoint="{endpoint.id}"}})'
    tools.until(lambda: seen.query(f'pilotlight_workers{{endpoint="{endpoint.id}"}}'), "a first scrape")
    with endpoint.stream("count to 20") as events:
        assert list(events)[-1] == "[DONE]"
    tools.until(lambda: seen.value(requests) == 1, "the stream")
    with endpoint.stream("count to 20") as events:
        assert list(events)[-1] == "[DONE]"
    assert endpoint.get("openai/v1/models/nobody").status_code == 404
    assert endpoint.result(endpoint.run("count to 3"))["status"] == "COMPLETED"
    tools.until(lambda: seen.value(requests) == 4, "all requests")
    by = f'endpoint="{endpoint.id}"'
    for query, value in {
        f'pilotlight_request_errors_total{{{by}, error="not_found"}}': 1,
        f'pilotlight_requests_total{{{by}, route="/run", outcome="ok"}}': 1,
        f"pilotlight_worker_slots{{{by}}}": 30,
        f"pilotlight_time_to_first_token_seconds_count{{{by}}}": 2,
    }.items():
        # Nothing is there for a moment when a scrape has failed.
        tools.until(lambda query=query, value=value: seen.value(query) == value, query)
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            query = (
                target["expr"]
                .replace("$endpoint", ".*")
                .replace("$job", ".*")
                .replace("$__rate_interval", "1m")
            )
            if "worker_request_errors" in query:
                seen.query(query)
            else:
                # A rate needs two scrapes of each series.
                tools.until(lambda asked=query: seen.query(asked), query)
    answer = shared.api.get("/metrics")
    lint = subprocess.run(
        ["promtool", "check", "metrics"], input=answer.content, capture_output=True, check=False
    )
    assert (lint.returncode, lint.stderr.decode()) == (0, "")
    assert shared.api.get("/metrics", headers={"authorization": "Bearer nobody"}).status_code == 401


class Receiver:
    """Takes what an exporter of OTLP posts."""

    def __init__(self):
        self.spans = {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        receiver.spans |= {span.name: span for span in scope.spans}
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_request_is_found_by_its_clients_id_and_trace_everywhere(make_installation, receiver, tools):
    """In the answer, at the engine, in the access log, at the collector; the request log has our id."""
    installation = make_installation(
        PILOTLIGHT_TRACING__ENABLED="true",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url,
        OTEL_BSP_SCHEDULE_DELAY="100",
        NO_PROXY="127.0.0.1",
    ).start()
    endpoint = installation.deploy(max=1)
    headers = {"x-request-id": "checkout-7", "traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "shop=1"}
    body = {
        "model": "pilotlight/ember",
        "messages": [{"role": "user", "content": "count to 5"}],
        "stream": True,
    }
    url = f"/v2/{endpoint.id}/openai/v1/chat/completions"
    answer = installation.api.post(url, json=body, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "checkout-7"
    (row,) = endpoint.requests(1)
    asked = [each.get("headers", {}) for each in endpoint.happenings("request")]
    heard = {name.lower(): value for name, value in asked[-1].items()}
    assert heard["x-request-id"] == f"checkout-7-{row['id']}"
    assert heard["tracestate"] == "shop=1"
    _, trace, span_id, flags = heard["traceparent"].split("-")
    assert (trace, flags) == (TRACE, "01")
    span = tools.until(lambda: receiver.spans.get("/v1/chat/completions"), "the span")
    assert (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()) == (TRACE, span_id, PARENT)
    assert "wait for a worker" in receiver.spans
    assert (
        installation.api.post(url, json=body, headers={"authorization": "Bearer nobody"}).status_code == 401
    )
    assert installation.interrupt() == 0
    lines = [
        json.loads(line) for line in (installation.home / "access" / "access.log").read_text().splitlines()
    ]
    assert [(line["status"], line["outcome"]) for line in lines] == [(200, "ok"), (401, "rejected")]
    known = {"id": row["id"], "client_id": "checkout-7", "endpoint_id": endpoint.id, "streamed": True}
    assert known.items() <= lines[0].items()
    assert lines[0]["worker_id"] == row["worker_id"]
    assert lines[0]["trace"] == f"00-{TRACE}-{span_id}-01"
    assert (lines[1]["key_id"], lines[1]["error"]) == ("", "unauthorized")
