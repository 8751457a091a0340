"""The job road: a durable queue with RunPod's job API in front and RunPod's worker protocol behind.

`service` is what can be done with jobs, `desk` what workers may ask and tell, `dispatcher` brings the two
together, `ledger` is the only place where a job changes. `routes` is the clients' HTTP face; the workers'
is `gateway.worker_protocol`.
"""

from __future__ import annotations

from pilotlight.gateway.jobs.routes import job_routes
from pilotlight.gateway.jobs.service import JobService

__all__ = ["JobService", "job_routes"]
