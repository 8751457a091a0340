"""What loops and gateway need from the outside, as small Protocols by role.

Every store implements the store ports; `tests/contract` holds one suite for all implementations.
"""

from __future__ import annotations

from pilotlight.ports.clock import Clock
from pilotlight.ports.cluster import Cluster, WorkerExit, WorkerSpec
from pilotlight.ports.store import (
    BatchStore,
    Chunk,
    ChunkFate,
    EndpointStore,
    JobStore,
    KeyStore,
    RequestLog,
    StartLog,
    Store,
    StoreListener,
    UsageStore,
    WebhookStore,
    WorkerStore,
)
from pilotlight.ports.traffic import Traffic, TrafficReader

__all__ = [
    "BatchStore",
    "Chunk",
    "ChunkFate",
    "Clock",
    "Cluster",
    "EndpointStore",
    "JobStore",
    "KeyStore",
    "RequestLog",
    "StartLog",
    "Store",
    "StoreListener",
    "Traffic",
    "TrafficReader",
    "UsageStore",
    "WebhookStore",
    "WorkerExit",
    "WorkerSpec",
    "WorkerStore",
]
