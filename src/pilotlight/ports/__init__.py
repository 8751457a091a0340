"""What loops and gateway need from the outside, as small Protocols by role.

Every store implements the store ports; `tests/contract` holds one suite for all implementations.
"""

from __future__ import annotations

from pilotlight.ports.clock import Clock
from pilotlight.ports.cluster import Cluster, WorkerExit, WorkerSpec
from pilotlight.ports.store import (
    Chunk,
    EndpointStore,
    JobStore,
    KeyStore,
    RequestLog,
    StartLog,
    Store,
    UsageStore,
    WorkerStore,
)
from pilotlight.ports.traffic import Traffic, TrafficReader

__all__ = [
    "Chunk",
    "Clock",
    "Cluster",
    "EndpointStore",
    "JobStore",
    "KeyStore",
    "RequestLog",
    "StartLog",
    "Store",
    "Traffic",
    "TrafficReader",
    "UsageStore",
    "WorkerExit",
    "WorkerSpec",
    "WorkerStore",
]
