"""Traces, as a receiver of OTLP gets them over HTTP."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from pilotlight.domain.usage import Outcome, Road
from pilotlight.errors import SettingsError
from pilotlight.gateway.observability import Observability
from pilotlight.gateway.recorder import RequestRecorder
from pilotlight.gateway.tracing import Tracing
from pilotlight.settings import Settings
from pilotlight.stores.memory import MemoryStore

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Receiver:
    """Takes what an exporter posts."""

    def __init__(self):
        self.resources = []
        self.spans = []

    async def handle(self, request):
        assert request.path == "/v1/traces"
        message = ExportTraceServiceRequest.FromString(await request.read())
        for resource in message.resource_spans:
            self.resources.append(
                {item.key: item.value.string_value for item in resource.resource.attributes}
            )
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response(body=b"", content_type="application/x-protobuf")

    def named(self, name):
        (span,) = [span for span in self.spans if span.name == name]
        return span


@pytest.fixture
async def receiver(monkeypatch):
    made = Receiver()
    application = web.Application()
    application.router.add_route("*", "/{tail:.*}", made.handle)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    await runner.cleanup()


def values(span):
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes
    }  # fmt: skip


async def test_a_request_is_a_span_below_its_clients(receiver, row, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    tracing = Tracing()
    context = tracing.begin(f"00-{TRACE}-{PARENT}-01".encode(), b"vendor=1")
    version, trace, span_id, flags = context.trace.split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert context.parent_span == PARENT != span_id
    made = row(trace=context.trace, parent_span=context.parent_span, client_id="mine", wait_ms=30)
    tracing.note([made])
    await tracing.close()
    span, wait = receiver.named("/v1/chat/completions"), receiver.named("wait for a worker")
    assert (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()) == (TRACE, span_id, PARENT)
    assert (wait.trace_id, wait.parent_span_id) == (span.trace_id, span.span_id)
    begin_ns = made.arrival_ms * 1_000_000
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (begin_ns, begin_ns + 340_000_000)
    assert (wait.start_time_unix_nano, wait.end_time_unix_nano) == (begin_ns, begin_ns + 30_000_000)
    (event,) = span.events
    assert (event.name, event.time_unix_nano) == ("first token", begin_ns + 40_000_000)
    assert values(span) == {
        "http.route": "/v1/chat/completions", "http.response.status_code": 200, "gen_ai.usage.input_tokens": 120,
        "gen_ai.usage.output_tokens": 4, "pilotlight.request": made.id, "pilotlight.client_id": "mine",
        "pilotlight.road": "data", "pilotlight.endpoint": "ep", "pilotlight.key": "k", "pilotlight.worker": "w1",
        "pilotlight.outcome": "ok",
    }  # fmt: skip
    assert span.status.code == 0
    assert receiver.resources[0]["service.name"] == "shop"


@pytest.mark.parametrize("header", [b"", b"00-xyz-1-01", b"\xff", f"00-{'0' * 32}-{PARENT}-01".encode()])
async def test_a_request_without_a_sane_parent_begins_a_trace(receiver, row, header):
    tracing = Tracing()
    context = tracing.begin(header, b"")
    assert context.parent_span == ""
    tracing.note([row(trace=context.trace, wait_ms=0)])
    await tracing.close()
    (span,) = receiver.spans
    assert f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01" == context.trace
    assert span.parent_span_id == b""
    assert receiver.resources[0]["service.name"] == "pilotlight"


async def test_every_request_has_ids_of_its_own(receiver, row):
    tracing = Tracing()
    rows = [row(id=str(number), trace=tracing.begin(b"", b"").trace) for number in range(50)]
    rows += [row(id="job", road=Road.JOB, route="/run")]
    tracing.note(rows)
    await tracing.close()
    spans = [span for span in receiver.spans if span.name != "wait for a worker"]
    assert len({span.span_id for span in receiver.spans}) == len(receiver.spans) == 102
    assert [span.trace_id.hex() for span in spans[:50]] == [each.trace[3:35] for each in rows[:50]]
    assert spans[50].name == "/run"


async def test_what_is_not_sampled_and_strangers_send_nothing(receiver, row, monkeypatch):
    tracing = Tracing()
    unsampled = tracing.begin(f"00-{TRACE}-{PARENT}-00".encode(), b"")
    assert unsampled.trace.endswith("-00")
    stranger = tracing.begin(b"", b"")
    tracing.note([row(trace=unsampled.trace, parent_span=PARENT), row(trace=stranger.trace, key_id="")])
    await tracing.close()
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    never = Tracing()
    assert never.begin(f"00-{TRACE}-{PARENT}-01".encode(), b"").trace.endswith("-00")
    never.note([row()])
    await never.close()
    assert receiver.spans == []


async def test_a_failure_says_so_and_a_callers_mistake_does_not(receiver, row):
    tracing = Tracing()
    tracing.note([row(outcome=Outcome.FAILED, route="/run"), row(outcome=Outcome.REJECTED, status=400)])
    await tracing.close()
    failed, refused = receiver.named("/run"), receiver.named("/v1/chat/completions")
    assert (failed.status.code, values(failed)["error.type"]) == (2, "stream_cut")
    assert (refused.status.code, values(refused)["error.type"]) == (0, "invalid_request")


async def test_a_collector_that_never_answers_holds_up_no_end(row, monkeypatch):
    """The gateway has to end within seconds; the collector takes the connection and says nothing."""
    monkeypatch.setattr("pilotlight.gateway.tracing._CLOSE_S", 0.05)
    asked, goes, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def silent(reader, writer):
        asked.set()
        await goes.wait()
        writer.close()
        gone.set()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tracing = Tracing()
    tracing.note([row()])
    await asyncio.gather(tracing.close(), asked.wait())
    server.close()
    goes.set()
    await gone.wait()


def test_traces_without_opentelemetry_are_refused_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "pilotlight.gateway.tracing", raising=False)
    settings = Settings(home=tmp_path, tracing={"enabled": True}, access_log={"target": "off"})
    parts = SimpleNamespace(
        settings=settings, recorder=RequestRecorder(MemoryStore()), directory=None, slots=None, fleet=None, store=None,
        clock=SimpleNamespace(now_ms=lambda: 0), engine_load=None, leadership=None,
    )  # fmt: skip
    with pytest.raises(SettingsError, match=r"requirements/tracing\.lock"):
        Observability(parts)
