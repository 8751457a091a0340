"""Benchmarks of Pilotlight on this machine: `pilotlight bench gateway|queue|coldstart|throughput|…`.

Each command starts everything that it needs on free loopback ports in a temporary folder, measures
Pilotlight and its reference alternately in one run, and prints one JSON line per figure.
`docs/guides/benchmarks.md` says what the figures mean. `app` is loaded when it is used, so that the load
generators in `harness`, programs of their own inside this package, start without a command line.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.commands").app
