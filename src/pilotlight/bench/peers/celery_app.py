"""Celery with Redis: `REDIS_URL=… python celery_app.py SECONDS WINDOW` is the client."""

from __future__ import annotations

import os
import sys
from typing import Any

from celery import Celery  # type: ignore[import-not-found]
from window import drive  # type: ignore[import-not-found]

app = Celery("noop", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])
app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)


@app.task(name="noop")  # type: ignore[untyped-decorator]
def noop(payload: dict[str, Any]) -> int:
    """Do nothing."""
    return int(payload["t"])


if __name__ == "__main__":
    drive(
        lambda: noop.delay({"t": 1, "pad": "x" * 60}),
        lambda result: result.get(timeout=60),
        seconds=float(sys.argv[1]),
        window=int(sys.argv[2]),
    )
