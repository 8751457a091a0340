"""What is kept of a long stream; called by `desk` as chunks come in.

What nobody has read is bounded by the store, with every chunk. What has been read stays for readers with a
cursor (serverless-api.md §12 item 13), and would fill the disk with a job that streams for days.
"""

from __future__ import annotations

import structlog

from pilotlight.errors import StoreError
from pilotlight.gateway.jobs.links import HandOut
from pilotlight.ports.store import JobStore

_log = structlog.get_logger()

_SLICE = 1_000
"""Chunks forgotten in one go, so that other users of the store get their turn."""


async def forget_read(store: JobStore, hand_out: HandOut, *, limit_bytes: int) -> None:
    """Forget what was read of a stream, each time that `limit_bytes` more have been stored of it."""
    if hand_out.streamed <= limit_bytes:
        return
    hand_out.streamed = 0
    try:
        while await store.trim_chunks(hand_out.job_id, limit=_SLICE) == _SLICE:
            pass
    except StoreError as error:
        # What the worker posted is stored, and it must not post it again.
        _log.warning("stream_not_trimmed", job_id=hand_out.job_id, error=str(error))
