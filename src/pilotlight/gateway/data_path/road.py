"""Where requests enter the data path."""

from __future__ import annotations

from collections.abc import Callable

from pilotlight.domain.usage import RequestRecord
from pilotlight.gateway.call import ClientCall
from pilotlight.gateway.data_path.desk import Desk
from pilotlight.gateway.data_path.exchange import OpenAIExchange
from pilotlight.gateway.data_path.opened import Opened
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.head import Head
from pilotlight.gateway.jobs.rates import RateTable
from pilotlight.gateway.trace_context import Tracer
from pilotlight.gateway.upstream import UpstreamPool
from pilotlight.ports.clock import Clock
from pilotlight.settings import LimitSettings


class DataPath:
    """Serves calls of the OpenAI routes of endpoints whose engines it reaches (`gateway.call.CallRoad`).

    Args:
        directory: Endpoints and keys.
        desk: Gives slots.
        pool: Connections to engines.
        clock: Time.
        limits: Bounds.
        entropy: Random bytes, for request ids.
        record: Takes the row of the request log.
        rates: Rate limits of the profile in use; None for none.
        tracer: Gives requests their spans; None for none.
    """

    def __init__(
        self,
        *,
        directory: Directory,
        desk: Desk,
        pool: UpstreamPool,
        clock: Clock,
        limits: LimitSettings,
        entropy: Callable[[int], bytes],
        record: Callable[[RequestRecord], None],
        rates: RateTable | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.directory = directory
        self.desk = desk
        self.pool = pool
        self.clock = clock
        self.limits = limits
        self.entropy = entropy
        self.record = record
        self.rates = rates
        self.tracer = tracer

    def serve(self, call: ClientCall) -> OpenAIExchange:
        """Begin to serve a call of `/v2/{endpoint}/openai/…`."""
        exchange = OpenAIExchange(self, call)
        exchange.enter()
        return exchange

    def is_current(self, head: Head) -> bool:
        """Whether nothing has changed since a request with this head was served."""
        memo = head.memo
        return type(memo) is Opened and memo.epoch == self.directory.epoch
