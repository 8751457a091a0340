"""The moments of a start, read from the engine's log and noted by the worker program. Pure.

Finer than the stages that are reported as they come: these go to the platform once, with the report that the
worker is ready or has failed. The markers were read off real starts of vLLM 0.32.
"""

from __future__ import annotations

import re
from typing import Final

IMPORTING: Final = "importing"
LAUNCHED: Final = "launched"
WARMING_UP: Final = "warming_up"
REGISTERING: Final = "registering"
READY: Final = "ready"

_MARKERS: Final = (
    ("config", re.compile(r"\[api_utils\.py:\d+\].* version \d|non-default args: |Resolved architecture: ")),
    (
        "loading_weights",
        re.compile(r"Starting to load model|Loading model from scratch|Loading \w+ checkpoint shards"),
    ),
    (
        "kv_cache",
        re.compile(
            r"Loading weights took|Model loading took|Available KV cache memory|GiB for KV cache"
            r"|KV cache size:|Using \w+ KV cache layout"
        ),
    ),
    (
        "compiling",
        re.compile(
            r"Warming up model for the compilation|Dynamo bytecode transform|Cache the graph for"
            r"|Compiling a graph for|Directly load the compiled graph|Capturing CUDA graphs"
        ),
    ),
)
"""Stage and what says that it begins. An engine that says nothing of it has no such stage."""


class Timeline:
    """When each stage of one start began, in milliseconds since the epoch; the first word counts."""

    def __init__(self) -> None:
        self._moments: dict[str, int] = {}

    def note(self, stage: str, at_ms: int) -> None:
        """Says that a stage begins; of no effect where it has begun before."""
        self._moments.setdefault(stage, at_ms)

    def read(self, line: str, at_ms: int) -> None:
        """Takes a line of the engine's log."""
        for stage, pattern in _MARKERS:
            if stage not in self._moments and pattern.search(line):
                self._moments[stage] = at_ms
                return

    def rows(self) -> list[tuple[str, int]]:
        """(stage, moment) in the order of their moments."""
        return sorted(self._moments.items(), key=lambda row: row[1])
