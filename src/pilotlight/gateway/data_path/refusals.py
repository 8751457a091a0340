"""Why the data path does not serve a request, in words and with the right status."""

from __future__ import annotations

from pilotlight.core.admission import Admission, AdmissionReason
from pilotlight.core.deadlines import RETRY_AFTER_S_MAX, HoldBound, retry_after_s
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.usage import Outcome
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.refusal import RequestRefusedError
from pilotlight.ports.fleet import Fleet
from pilotlight.settings import LimitSettings

_RETRY_EXPIRED_S = 10
"""Arbitrary, for requests that were held for as long as may be while nobody knew how long it takes."""


class StartFailedError(Exception):
    """Held requests are answered with this when their endpoint gives up starting workers."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def too_large(limits: LimitSettings) -> RequestRefusedError:
    """The body is larger than may be."""
    return RequestRefusedError(
        413, f"request body exceeds {limits.body_bytes} bytes",
        type="invalid_request_error", code="payload_too_large",
    )  # fmt: skip


def body_late(limits: LimitSettings) -> RequestRefusedError:
    """The body did not come in time."""
    message = f"the request body did not arrive within {limits.body_s} s"
    return RequestRefusedError(408, message, outcome=Outcome.EXPIRED)


class Refusals:
    """Makes the refusals that depend on how an endpoint is doing.

    Args:
        fleet: Asked what a caller waited for.
        outlook: Asked for how long.
    """

    def __init__(self, *, fleet: Fleet, outlook: Outlook) -> None:
        self._fleet = fleet
        self._outlook = outlook

    def shed(self, endpoint: Endpoint, admission: Admission, limits: LimitSettings) -> RequestRefusedError:
        """The request is not even held."""
        retry_after_s = self._outlook.retry_after_s(endpoint, admission)
        if admission.reason is AdmissionReason.UNHEALTHY:
            return RequestRefusedError(
                503, self.progress(endpoint), type="server_error", code="start_failed",
                retry_after_s=retry_after_s, outcome=Outcome.SHED,
            )  # fmt: skip
        limit = (
            f"{limits.hold_requests} requests"
            if admission.reason is AdmissionReason.HOLD_FULL
            else f"{limits.hold_bytes} bytes of bodies"
        )
        return RequestRefusedError(
            429, f"endpoint {endpoint.id} already holds {limit}; {self.progress(endpoint)}",
            type="rate_limit_error", code="queue_full", retry_after_s=retry_after_s, outcome=Outcome.SHED,
        )  # fmt: skip

    def hopeless(self, endpoint: Endpoint, expected_ms: int | None, bound: HoldBound) -> RequestRefusedError:
        """The client will have given up before the request is served."""
        expected_s = (expected_ms or 0) / 1000
        return RequestRefusedError(
            429,
            f"the request would wait for about {expected_s:.0f} s, and its client gives up after"
            f" {bound.seconds:.0f} s; {self.progress(endpoint)}",
            type="rate_limit_error", code="deadline_unreachable",
            retry_after_s=retry_after_s(expected_ms, bound), outcome=Outcome.SHED,
        )  # fmt: skip

    def overdue(self, endpoint: Endpoint, expected_ms: int | None, bound: HoldBound) -> RequestRefusedError:
        """No slot came before the client gives up."""
        start_s = self._outlook.start_s(endpoint)
        wait_s = retry_after_s(expected_ms, bound) if start_s is None else min(start_s, RETRY_AFTER_S_MAX)
        return RequestRefusedError(
            504, f"no worker became free before the client's deadline; {self.progress(endpoint)}",
            type="timeout_error", code="deadline_exceeded", retry_after_s=wait_s, outcome=Outcome.EXPIRED,
        )  # fmt: skip

    def expired(self, endpoint: Endpoint, seconds: float) -> RequestRefusedError:
        """No slot came for as long as the request could be held."""
        message = f"no worker became free within {seconds:.4g} s; {self.progress(endpoint)}"
        return RequestRefusedError(
            503, message, type="server_error", code="no_worker",
            retry_after_s=self._outlook.start_s(endpoint) or _RETRY_EXPIRED_S, outcome=Outcome.EXPIRED,
        )  # fmt: skip

    def not_started(self, endpoint: Endpoint, error: StartFailedError) -> RequestRefusedError:
        """The endpoint gave up starting workers."""
        return RequestRefusedError(
            503, str(error), type="server_error", code="start_failed",
            retry_after_s=max(error.retry_after_s, self._outlook.start_s(endpoint) or 0),
            outcome=Outcome.FAILED,
        )  # fmt: skip

    def progress(self, endpoint: Endpoint) -> str:
        """What the endpoint's workers do, for a caller."""
        health = self._fleet.health(endpoint.id)
        if health.failure is not None and health.failures:
            return f"starting a worker failed {health.failures} times: {health.failure.sentence}"
        if health.throttled:
            return health.throttled
        workers = self._fleet.workers(endpoint.id)
        if not workers:
            return (
                "endpoint is paused (max workers 0)" if endpoint.workers_max == 0 else "no worker is starting"
            )
        return "workers: " + ", ".join(f"{worker.state} ({worker.stage})" for worker in workers)
