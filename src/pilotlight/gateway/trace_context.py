"""The place of a request in its trace, as the data path passes it on (W3C Trace Context).

Apart from `gateway.tracing`, which needs OpenTelemetry, so that the data path does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The span of one request.

    Attributes:
        trace: It, as `traceparent`: for the engine, whose spans become its children, and for the row.
        parent_span: Id of the client's span; "" where it named none.
    """

    trace: str
    parent_span: str = ""


class Tracer(Protocol):
    """Gives requests their spans."""

    def begin(self, traceparent: bytes, tracestate: bytes) -> TraceContext:
        """The span of a request that arrives now.

        Args:
            traceparent: The client's header; b"" for none. One that is malformed counts as none.
            tracestate: The client's header; it goes on to the engine as it is.
        """
        ...
