"""Traces by OpenTelemetry: one span for each request, with the wait for a worker as its child.

Imported only where `tracing.enabled` is set: it needs the extra `tracing`. A request gets its ids when it
arrives (`Tracing.begin`), because the engine has to be told of them; the span itself is made of the row of
the request when that has ended, in a thread. No event of a stream costs anything. Where spans go and how many
are kept is said by OpenTelemetry's own variables.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from pilotlight import __version__
from pilotlight.core.request_totals import error_class, known_route
from pilotlight.domain.usage import Outcome, RequestRecord
from pilotlight.gateway.row_thread import RowThread
from pilotlight.gateway.trace_context import TraceContext
from pilotlight.threads import call_in_thread

_MS = 1_000_000
_CLOSE_S = 3.0
"""How long a collector may take for the last spans when the gateway ends."""

_OURS = frozenset({Outcome.FAILED, Outcome.EXPIRED, Outcome.TIMED_OUT})
"""Outcomes that are not the caller's fault."""


class _KnownIds(IdGenerator):
    """Gives the next span the ids that it has been given already; else random ones."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self.trace_id: int | None = None
        self.span_id: int | None = None

    def generate_trace_id(self) -> int:
        """The id of a trace; asked where there is no parent."""
        known, self.trace_id = self.trace_id, None
        return known or self._random.generate_trace_id()

    def generate_span_id(self) -> int:
        """The id of a span."""
        known, self.span_id = self.span_id, None
        return known or self._random.generate_span_id()


class Tracing:
    """Gives requests their place in a trace, and sends their spans; an `Observer` of the recorder."""

    def __init__(self) -> None:
        self._ids = _KnownIds()
        named = Resource({SERVICE_NAME: "pilotlight", SERVICE_VERSION: __version__})
        # `up` ends within seconds, and waits for spans itself.
        self._provider = TracerProvider(
            resource=named.merge(OTELResourceDetector().detect()),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("pilotlight", __version__)
        self._thread = RowThread(self._send, name="traces")
        self._headers = TraceContextTextMapPropagator()

    def begin(self, traceparent: bytes, tracestate: bytes) -> TraceContext:
        """The span of a request that arrives now (`trace_context.Tracer`)."""
        parent = SpanContext(trace_id=0, span_id=0, is_remote=True)
        context = Context()
        if traceparent:
            carrier = {
                "traceparent": traceparent.decode("latin-1"),
                "tracestate": tracestate.decode("latin-1"),
            }
            context = self._headers.extract(carrier, context)
            parent = trace.get_current_span(context).get_span_context()
        known = parent.is_valid
        trace_id = parent.trace_id if known else int.from_bytes(os.urandom(16))
        decided = self._provider.sampler.should_sample(context, trace_id, "", SpanKind.SERVER)
        flags = int(decided.decision is Decision.RECORD_AND_SAMPLE)
        span_id = os.urandom(8).hex()
        return TraceContext(
            trace=f"00-{trace_id:032x}-{span_id}-{flags:02x}",
            parent_span=f"{parent.span_id:016x}" if known else "",
        )

    def note(self, rows: Sequence[RequestRecord]) -> None:
        """Send the spans of requests that have ended; strangers have none."""
        self._thread.note([row for row in rows if row.key_id and not row.trace.endswith("-00")])

    async def close(self) -> None:
        """Send what is left, if the collector takes it within seconds."""
        await self._thread.close()
        shutdown = asyncio.ensure_future(call_in_thread(self._provider.shutdown, name="traces"))
        await asyncio.wait({shutdown}, timeout=_CLOSE_S)

    def _send(self, rows: Sequence[RequestRecord]) -> None:
        for row in rows:
            self._span(row)

    def _span(self, row: RequestRecord) -> None:
        context = Context()
        if row.trace:
            _, trace_id, span_id, flags = row.trace.split("-")
            self._ids.trace_id, self._ids.span_id = int(trace_id, 16), int(span_id, 16)
            if row.parent_span:
                self._ids.trace_id = None
                parent = SpanContext(
                    int(trace_id, 16),
                    int(row.parent_span, 16),
                    is_remote=True,
                    trace_flags=TraceFlags(int(flags, 16)),
                )
                context = trace.set_span_in_context(NonRecordingSpan(parent), context)
        begin_ns = row.arrival_ms * _MS
        span = self._tracer.start_span(
            known_route(row.route),
            context,
            kind=SpanKind.SERVER,
            attributes=_attributes(row),
            start_time=begin_ns,
        )
        if row.wait_ms:
            within = trace.set_span_in_context(span, Context())
            wait = self._tracer.start_span("wait for a worker", within, start_time=begin_ns)
            wait.end(begin_ns + row.wait_ms * _MS)
        if row.first_token_ms is not None:
            span.add_event("first token", timestamp=begin_ns + row.first_token_ms * _MS)
        if row.outcome in _OURS or row.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(begin_ns + row.duration_ms * _MS)


def _attributes(row: RequestRecord) -> dict[str, AttributeValue]:
    """OpenTelemetry's own names where there are some."""
    known: dict[str, AttributeValue | None] = {
        "http.route": row.route,
        "http.response.status_code": row.status or None,
        "error.type": error_class(row),
        "gen_ai.usage.input_tokens": row.tokens_in,
        "gen_ai.usage.output_tokens": row.tokens_out,
        "pilotlight.request": row.id,
        "pilotlight.client_id": row.client_id or None,
        "pilotlight.road": row.road.value,
        "pilotlight.endpoint": row.endpoint_id,
        "pilotlight.key": row.key_id,
        "pilotlight.worker": row.worker_id or None,
        "pilotlight.outcome": row.outcome.value,
        "pilotlight.continued": row.continued or None,
    }
    return {name: value for name, value in known.items() if value is not None}
