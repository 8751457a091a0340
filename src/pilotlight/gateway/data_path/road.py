"""Where requests enter the data path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pilotlight.domain.usage import RequestRecord
from pilotlight.gateway.call import ClientCall
from pilotlight.gateway.data_path.exchange import OpenAIExchange
from pilotlight.gateway.data_path.opened import Opened
from pilotlight.gateway.data_path.patience import Patience
from pilotlight.gateway.data_path.refusals import Refusals
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.head import Head
from pilotlight.gateway.jobs.rates import RateTable
from pilotlight.gateway.key_limits import KeyLimits
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.slots import SlotTable
from pilotlight.gateway.trace_context import Tracer
from pilotlight.gateway.upstream import UpstreamPool
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet
from pilotlight.settings import LimitSettings


class Observed(Protocol):
    """Told how a worker did, before its slot is given back (`FleetRouter.observed`)."""

    def __call__(self, worker_id: str, /, *, failed: bool, first_byte_ms: int | None) -> None:
        """A request that the worker had has ended, after so many ms until the first byte of its answer."""
        ...


def _nobody(_worker_id: str, /, *, failed: bool, first_byte_ms: int | None) -> None:
    """Where nothing is made of how workers do."""


class DataPath:
    """Serves calls of the OpenAI routes of endpoints whose engines it reaches (`gateway.call.CallRoad`).

    Args:
        directory: Endpoints and keys.
        slots: Admission and the hold.
        pool: Connections to engines.
        fleet: Asked only to say what a caller waited for.
        outlook: Asked to say for how long.
        clock: Time.
        limits: Bounds.
        entropy: Random bytes, for request ids.
        record: Takes the row of the request log.
        key_limits: Counts what keys ask for.
        observed: Told how workers do.
        rates: Rate limits of the profile in use; None for none.
        tracer: Gives requests their spans; None for none.
    """

    def __init__(
        self,
        *,
        directory: Directory,
        slots: SlotTable,
        pool: UpstreamPool,
        fleet: Fleet,
        outlook: Outlook,
        clock: Clock,
        limits: LimitSettings,
        entropy: Callable[[int], bytes],
        record: Callable[[RequestRecord], None],
        key_limits: KeyLimits,
        observed: Observed = _nobody,
        rates: RateTable | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.directory = directory
        self.slots = slots
        self.pool = pool
        self.outlook = outlook
        self.clock = clock
        self.limits = limits
        self.entropy = entropy
        self.record = record
        self.observed = observed
        self.rates = rates
        self.tracer = tracer
        self.key_limits = key_limits
        self.patience = Patience(slots)
        self.refusals = Refusals(fleet=fleet, outlook=outlook)

    def serve(self, call: ClientCall) -> OpenAIExchange:
        """Begin to serve a call of `/v2/{endpoint}/openai/…`."""
        exchange = OpenAIExchange(self, call)
        exchange.enter()
        return exchange

    def is_current(self, head: Head) -> bool:
        """Whether nothing has changed since a request with this head was served."""
        memo = head.memo
        return type(memo) is Opened and memo.epoch == self.directory.epoch
