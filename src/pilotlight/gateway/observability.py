"""Puts together what observes requests: metrics, access log, traces. `bootstrap` makes one."""

from __future__ import annotations

from typing import Protocol

from pilotlight.errors import SettingsError
from pilotlight.gateway.access_log import AccessLog
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.metrics import EngineReader, FleetReader, JobReader, Metrics, SlotReader
from pilotlight.gateway.recorder import Observer, RequestRecorder
from pilotlight.gateway.trace_context import Tracer
from pilotlight.ports.clock import Clock
from pilotlight.settings import Settings


class Tracing(Tracer, Observer, Protocol):
    """What `gateway.tracing` is to others."""


class Leader(Protocol):
    """Knows whether this gateway has the workers."""

    @property
    def leading(self) -> bool:
        """Whether it does at this moment."""
        ...


class Parts(Protocol):
    """What observability needs of an installation, under the names it has there."""

    @property
    def settings(self) -> Settings:
        """What is wanted."""
        ...

    @property
    def recorder(self) -> RequestRecorder:
        """Tells of requests."""
        ...

    @property
    def directory(self) -> Directory:
        """Endpoints and keys."""
        ...

    @property
    def slots(self) -> SlotReader:
        """Slots and held requests."""
        ...

    @property
    def fleet(self) -> FleetReader:
        """Workers of this gateway."""
        ...

    @property
    def store(self) -> JobReader:
        """Queues."""
        ...

    @property
    def clock(self) -> Clock:
        """Time."""
        ...

    @property
    def engine_load(self) -> EngineReader:
        """What engines said of themselves."""
        ...

    @property
    def leadership(self) -> Leader:
        """Whether this gateway has the workers; asked when metrics are."""
        ...


class Observability:
    """Everything that is told of requests. Started, told and closed by the recorder.

    Args:
        parts: The installation.

    Attributes:
        metrics: Answers `/metrics`.
        tracer: Gives requests their spans; None without traces.

    Raises:
        SettingsError: Traces are wanted and OpenTelemetry is not installed.
    """

    def __init__(self, parts: Parts) -> None:
        settings, recorder = parts.settings, parts.recorder
        access_log = None
        if settings.access_log.target != "off":
            access_log = AccessLog(settings.access_log, settings.home)
            recorder.observe(access_log)
        self.metrics = Metrics(
            directory=parts.directory,
            slots=parts.slots,
            fleet=parts.fleet,
            jobs=parts.store,
            clock=parts.clock,
            rows=recorder,
            engines=parts.engine_load,
            leads=lambda: parts.leadership.leading,
            public=settings.metrics.open,
            lines_dropped=lambda: access_log.lines_dropped if access_log is not None else 0,
        )
        recorder.observe(self.metrics)
        tracing = tracing_of(settings)
        self.tracer: Tracer | None = tracing
        if tracing is not None:
            recorder.observe(tracing)


def tracing_of(settings: Settings) -> Tracing | None:
    """What gives requests their spans and sends them; None where no traces are wanted.

    Raises:
        SettingsError: They are, and OpenTelemetry is not installed.
    """
    if not settings.tracing.enabled:
        return None
    try:
        # Heavy, and not there for everybody.
        from pilotlight.gateway.tracing import Tracing as Spans  # noqa: PLC0415 - see above
    except ImportError as error:
        raise SettingsError(
            f"tracing.enabled is set, and {error.name} is not installed; install the extra `tracing`"
            " (requirements/tracing.lock names what is in it), or unset it"
        ) from error
    return Spans()
