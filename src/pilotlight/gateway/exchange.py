"""One request on its way to a worker and back: what is noted of it, and its row in the request log.

The data path and the load balancer begin one of these for every request, note what becomes of it as they go
along, and write its row at the end. Jobs write rows of their own (`gateway.jobs.ledger`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from pilotlight.domain.usage import Outcome, RequestRecord, Road
from pilotlight.gateway.request_ids import new_id
from pilotlight.gateway.trace_context import TraceContext
from pilotlight.ports.clock import Clock


@dataclass
class Exchange:
    """What is known so far of one request.

    Attributes:
        request_id: Ours; a client may see it.
        endpoint_id: As the client wrote it, so it need not exist.
        route: Path without its query.
        arrival_ms: When it came.
        started_ns: The same moment on the monotonic clock.
        key_id: Whose request it is; "" until that is known.
        worker_id: Who got it; "" until somebody has.
        status: HTTP status of the answer; 0 until there is one.
        outcome: What became of it; a failure until somebody knows better.
        wait_ns: How long it waited for its worker.
        first_byte_ns: When the first byte of the answer's body was passed on; None before.
        head_sent: Whether an answer has begun, so that its status can say nothing more.
        client_id: The id that the client gave it (`gateway.request_ids`); "" for none.
        streamed: Whether the answer is a stream of events.
        continued: How often its stream went on with another worker.
        context: Its place in a trace; None without traces.
    """

    request_id: str
    endpoint_id: str
    route: str
    arrival_ms: int
    started_ns: int
    key_id: str = ""
    worker_id: str = ""
    status: int = 0
    outcome: Outcome = Outcome.FAILED
    wait_ns: int = 0
    first_byte_ns: int | None = None
    head_sent: bool = False
    client_id: str = ""
    streamed: bool = False
    continued: int = 0
    context: TraceContext | None = None

    @classmethod
    def begin(cls, endpoint_id: str, path: str, *, clock: Clock, entropy: Callable[[int], bytes]) -> Self:
        """A request that arrives now.

        Args:
            endpoint_id: From path or host.
            path: What the endpoint sees of the path, with the query.
            clock: Time.
            entropy: Random bytes, for its id.
        """
        now_ms = clock.now_ms()
        return cls(
            request_id=new_id(now_ms, entropy),
            endpoint_id=endpoint_id,
            route=path.partition("?")[0],
            arrival_ms=now_ms,
            started_ns=clock.monotonic_ns(),
        )

    def row(
        self,
        ended_ns: int,
        *,
        tokens_in: int | None = None,
        tokens_out: int | None = None,
        estimated: bool = False,
    ) -> RequestRecord:
        """Its row, for everybody who is told of requests.

        Args:
            ended_ns: When it ended, on the monotonic clock.
            tokens_in: Tokens of the prompt; None when unknown.
            tokens_out: Tokens of the answer; None when unknown.
            estimated: Whether the tokens were not counted by who made them.
        """
        first = self.first_byte_ns
        return RequestRecord(
            id=self.request_id,
            road=Road.DATA,
            endpoint_id=self.endpoint_id[:64],
            key_id=self.key_id,
            worker_id=self.worker_id,
            route=self.route[:256],
            status=self.status,
            outcome=self.outcome,
            arrival_ms=self.arrival_ms,
            wait_ms=self.wait_ns // 1_000_000,
            first_token_ms=None if first is None else (first - self.started_ns) // 1_000_000,
            duration_ms=(ended_ns - self.started_ns) // 1_000_000,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            estimated=estimated,
            client_id=self.client_id,
            streamed=self.streamed,
            continued=self.continued,
            trace=self.context.trace if self.context is not None else "",
            parent_span=self.context.parent_span if self.context is not None else "",
        )
