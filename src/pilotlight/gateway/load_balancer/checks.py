"""One health check of a load-balancing worker; `loops.health_checks` decides when, and what it means."""

from __future__ import annotations

from pilotlight.domain.worker import Address
from pilotlight.gateway.upstream import UpstreamError, UpstreamPool
from pilotlight.loops.health_checks import CheckOutcome

_HEADERS = ((b"connection", b"close"), (b"user-agent", b"pilotlight-health-check"))


async def check_health(address: Address, path: str, *, timeout_s: float) -> CheckOutcome:
    """What a worker answers, on a connection of its own.

    Args:
        address: Where it listens.
        path: Its health route.
        timeout_s: Longest wait for the head of the answer.
    """
    where = f"GET {path} on {address.url.removeprefix('http://')}"
    pool = UpstreamPool(idle_s=1)
    try:
        response = await pool.request(address, "GET", path, _HEADERS, b"", timeout_s=timeout_s)
    except UpstreamError as error:
        detail = f"{where}: {error}"
        if error.timed_out:
            detail = f"{where}: no answer within {timeout_s:g} s"
        return CheckOutcome(status=None, silent=error.timed_out, detail=detail)
    response.close()
    return CheckOutcome(status=response.status, silent=False, detail=f"{where}: {response.status}")
