"""dramatiq with Redis: `REDIS_URL=… python dramatiq_app.py SECONDS WINDOW` is the client."""

from __future__ import annotations

import os
import sys
from typing import Any

import dramatiq  # type: ignore[import-not-found]
from dramatiq.brokers.redis import RedisBroker  # type: ignore[import-not-found]
from dramatiq.results import Results  # type: ignore[import-not-found]
from dramatiq.results.backends import RedisBackend  # type: ignore[import-not-found]
from window import drive  # type: ignore[import-not-found]

_broker = RedisBroker(url=os.environ["REDIS_URL"])
_broker.add_middleware(Results(backend=RedisBackend(url=os.environ["REDIS_URL"])))
dramatiq.set_broker(_broker)


@dramatiq.actor(store_results=True)  # type: ignore[untyped-decorator]
def noop(payload: dict[str, Any]) -> int:
    """Do nothing."""
    return int(payload["t"])


if __name__ == "__main__":
    drive(
        lambda: noop.send({"t": 1, "pad": "x" * 60}),
        lambda message: message.get_result(block=True, timeout=60_000),
        seconds=float(sys.argv[1]),
        window=int(sys.argv[2]),
    )
