"""What `gateway.metrics` has collected for one scrape: plain values for `gateway.exposition`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pilotlight.core.engine_capacity import EngineReading
from pilotlight.core.request_totals import Totals
from pilotlight.domain.job import JobCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker as it is told.

    Attributes:
        id: Its id.
        totals: What it has served; None for one that has served nothing.
        slots: How many it has; None for one that has none open.
        occupied: How many are in use.
        engine: What its engine said last; None for one that said nothing, or was not asked.
    """

    id: str
    totals: Totals | None
    slots: int | None = None
    occupied: int = 0
    engine: EngineReading | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointView:
    """An endpoint as it is told.

    Attributes:
        id: Its id.
        totals: Of all its requests.
        workers: Living ones, and others that served something not long ago.
        name: Its name; "" for one that does not exist any more.
        kind: What its workers are.
        model: Its model; "" for kinds that have none.
        states: Living workers by state.
        held: Requests that wait for a worker.
        in_flight: Requests that a worker has.
        jobs: Its queue; None where that is not known, or another gateway tells it.
    """

    id: str
    totals: Totals
    workers: Sequence[WorkerView] = ()
    name: str = ""
    kind: str = ""
    model: str = ""
    states: Mapping[str, int] = field(default_factory=dict)
    held: int = 0
    in_flight: int = 0
    jobs: JobCounts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is told.

    Attributes:
        endpoints: Existing ones, others that were called not long ago, and `NO_ENDPOINT`.
        rows_pending: Rows of the request log that are not written yet.
        rows_dropped: Rows given up.
        lines_dropped: Lines of the access log given up.
    """

    endpoints: Sequence[EndpointView]
    rows_pending: int = 0
    rows_dropped: int = 0
    lines_dropped: int = 0
