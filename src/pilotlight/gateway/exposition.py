"""The text that Prometheus reads, made of plain values. Imported and run when it is asked for.

`gateway.metrics` collects a `View` on the event loop and has it rendered in a thread. Names and help texts of
all metrics are here and nowhere else; docs/guides/observability.md lists them, and a test holds it to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pilotlight import __version__
from pilotlight.core.engine_capacity import EngineReading
from pilotlight.core.request_totals import ErrorClass, Histogram, Totals
from pilotlight.gateway.metrics_view import EndpointView, View

_US = 1_000_000


def render(view: View, accept: str) -> tuple[bytes, str]:
    """The metrics in the format that a scraper prefers, and its Content-Type.

    Args:
        view: What to tell.
        accept: The request's Accept header; "" for none.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Installation(view))
    ProcessCollector(registry=registry)
    try:
        encode, media_type = choose_encoder(accept)
    except (TypeError, ValueError):
        # A version that is no number.
        encode, media_type = choose_encoder("")
    return encode(registry), media_type


class _Installation(Collector):
    """Our own metrics."""

    def __init__(self, view: View) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        view = self._view
        yield InfoMetricFamily("pilotlight", "The gateway that answers.", value={"version": __version__})
        yield from _about(view.endpoints)
        per_endpoint = _Requests("pilotlight_", ["endpoint"], complete=True)
        per_worker = _Requests("pilotlight_worker_", ["endpoint", "worker"], complete=False)
        for endpoint in view.endpoints:
            per_endpoint.add([endpoint.id], endpoint.totals)
            for worker in endpoint.workers:
                if worker.totals is not None:
                    per_worker.add([endpoint.id, worker.id], worker.totals)
        yield from per_endpoint.families
        yield from per_worker.families
        yield from _load(view.endpoints)
        yield GaugeMetricFamily(
            "pilotlight_request_log_pending_rows",
            "Rows of the request log that are not written yet.",
            value=view.rows_pending,
        )
        yield CounterMetricFamily(
            "pilotlight_request_log_dropped_rows",
            "Rows of the request log given up because the store could not write them.",
            value=view.rows_dropped,
        )
        yield CounterMetricFamily(
            "pilotlight_access_log_dropped_lines",
            "Lines of the access log given up because they could not be written.",
            value=view.lines_dropped,
        )


class _Requests:
    """The families that are made of `Totals`.

    Args:
        prefix: Of their names.
        labels: Names of the labels that say whose totals they are.
        complete: Whether to tell of errors that have not happened, too.
    """

    def __init__(self, prefix: str, labels: list[str], *, complete: bool) -> None:
        self._complete = complete
        of = "a worker had" if "worker" in labels else "ended"
        self._requests = CounterMetricFamily(
            f"{prefix}requests",
            f"Requests and jobs that {of}, by route, outcome and class of the HTTP status.",
            labels=[*labels, "route", "outcome", "status"],
        )
        self._errors = CounterMetricFamily(
            f"{prefix}request_errors",
            f"Those that {of} and did not end well, by the reason.",
            labels=[*labels, "error"],
        )
        self._tokens = CounterMetricFamily(
            f"{prefix}tokens",
            "Tokens of prompts and of completions, where the engine counted them.",
            labels=[*labels, "kind"],
        )
        self._continued = CounterMetricFamily(
            f"{prefix}streams_continued", "Times a stream went on with another worker.", labels=labels
        )
        self._duration = HistogramMetricFamily(
            f"{prefix}request_duration_seconds",
            "From arrival to the end of the answer, of requests that a worker had.",
            labels=labels,
        )
        self._wait = HistogramMetricFamily(
            f"{prefix}request_queue_seconds",
            "From arrival to a worker, of requests that a worker had; includes its start.",
            labels=labels,
        )
        self._first_token = HistogramMetricFamily(
            f"{prefix}time_to_first_token_seconds",
            "From arrival to the first event of a streamed answer; includes the wait for a worker.",
            labels=labels,
        )
        self._between_tokens = HistogramMetricFamily(
            f"{prefix}inter_token_latency_seconds",
            "Mean of each streamed answer: from the first event to the end, per token after the first.",
            labels=labels,
        )

    @property
    def families(self) -> list[Metric]:
        """All of them."""
        counters = [self._requests, self._errors, self._tokens, self._continued]
        return [*counters, self._duration, self._wait, self._first_token, self._between_tokens]

    def add(self, labels: list[str], totals: Totals) -> None:
        """Add a sample of each family."""
        for (route, outcome, status), count in totals.requests.items():
            digit = f"{status}xx" if status else "none"
            self._requests.add_metric([*labels, route, outcome.value, digit], count)
        # A rate does not see the first of its kind where nothing was told before; of workers it were many.
        for error in ErrorClass if self._complete else totals.errors:
            self._errors.add_metric([*labels, error.value], totals.errors.get(error, 0))
        self._tokens.add_metric([*labels, "prompt"], totals.tokens_in)
        self._tokens.add_metric([*labels, "completion"], totals.tokens_out)
        self._continued.add_metric(labels, totals.continued)
        _add(self._duration, labels, totals.duration)
        _add(self._wait, labels, totals.wait)
        _add(self._first_token, labels, totals.first_token)
        _add(self._between_tokens, labels, totals.between_tokens)


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    buckets: list[tuple[str, float]] = []
    below = 0
    for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
        below += count
        buckets.append((str(bound / _US), below))
    buckets.append(("+Inf", below + histogram.counts[-1]))
    family.add_metric(labels, buckets, histogram.total / _US)


def _about(endpoints: Sequence[EndpointView]) -> Iterator[Metric]:
    about = GaugeMetricFamily(
        "pilotlight_endpoint_info",
        "1 for each endpoint; joins its name, kind and model to its id.",
        labels=["endpoint", "name", "kind", "model"],
    )
    for endpoint in endpoints:
        if endpoint.name:
            about.add_metric([endpoint.id, endpoint.name, endpoint.kind, endpoint.model], 1)
    yield about


def _load(endpoints: Sequence[EndpointView]) -> Iterator[Metric]:
    """What goes on at this moment."""
    workers = GaugeMetricFamily("pilotlight_workers", "Workers by state.", labels=["endpoint", "state"])
    held = GaugeMetricFamily(
        "pilotlight_requests_held", "Requests that wait for a worker.", labels=["endpoint"]
    )
    running = GaugeMetricFamily(
        "pilotlight_requests_in_flight", "Requests that a worker has.", labels=["endpoint"]
    )
    jobs = GaugeMetricFamily(
        "pilotlight_jobs", "Jobs that are queued, and that a worker has.", labels=["endpoint", "status"]
    )
    slots = GaugeMetricFamily(
        "pilotlight_worker_slots",
        "Requests and jobs a worker takes at a time.",
        labels=["endpoint", "worker"],
    )
    occupied = GaugeMetricFamily(
        "pilotlight_worker_slots_occupied",
        "Requests and jobs a worker has, that hold one of its slots.",
        labels=["endpoint", "worker"],
    )
    engine = _Engines()
    for endpoint in endpoints:
        for state, count in endpoint.states.items():
            workers.add_metric([endpoint.id, state], count)
        if endpoint.name:
            held.add_metric([endpoint.id], endpoint.held)
            running.add_metric([endpoint.id], endpoint.in_flight)
        if endpoint.jobs is not None:
            jobs.add_metric([endpoint.id, "queued"], endpoint.jobs.queued)
            jobs.add_metric([endpoint.id, "in_progress"], endpoint.jobs.in_progress)
        for worker in endpoint.workers:
            if worker.slots is not None:
                slots.add_metric([endpoint.id, worker.id], worker.slots)
                occupied.add_metric([endpoint.id, worker.id], worker.occupied)
            if worker.engine is not None:
                engine.add([endpoint.id, worker.id], worker.engine)
    yield from (workers, held, running, jobs, slots, occupied, *engine.families)


class _Engines:
    """What engines said of themselves when they were asked last: the few figures by which slots are given."""

    def __init__(self) -> None:
        labels = ["endpoint", "worker"]
        self._requests = GaugeMetricFamily(
            "pilotlight_worker_engine_requests",
            "Sequences that the engine runs, and that wait in it.",
            labels=[*labels, "state"],
        )
        self._cache = GaugeMetricFamily(
            "pilotlight_worker_engine_cache_ratio", "Share of the engine's KV cache in use.", labels=labels
        )
        self._preemptions = CounterMetricFamily(
            "pilotlight_worker_engine_preemptions",
            "Times the engine threw out a running sequence for want of cache.",
            labels=labels,
        )

    @property
    def families(self) -> list[Metric]:
        """All of them."""
        return [self._requests, self._cache, self._preemptions]

    def add(self, labels: list[str], reading: EngineReading) -> None:
        """Add a sample of each family."""
        self._requests.add_metric([*labels, "running"], reading.running)
        self._requests.add_metric([*labels, "waiting"], reading.waiting)
        self._cache.add_metric(labels, reading.cache_use)
        self._preemptions.add_metric(labels, reading.preemptions)
