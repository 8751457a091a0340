"""Starts of workers as a waterfall of their stages; `pilotlight starts` prints it. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise

from pilotlight.cli.output import duration, size
from pilotlight.cli.progress import describe_failure
from pilotlight.client.models import Start

Line = list[tuple[str, str]]
"""Pieces of text, each with a Rich style."""

BAR_CHARS_MAX = 60
BAR_CHARS_MIN = 10
"""A terminal with less room than that for bars gets none."""

_TIME_CHARS = 8
_INDENT = "  "
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")
_OUTCOMES = {"ready": "green", "failed": "bold red"}
_BEFORE_PROCESS = frozenset({"decision", "placement"})


def draw_starts(starts: Sequence[Start], width: int) -> list[Line]:
    """Starts one below the other, their bars on one scale.

    Args:
        starts: As the gateway tells them.
        width: Columns that there are; what does not fit goes on in the next line.
    """
    label_chars = max(
        (len(_label(stage["stage"])) for start in starts for stage in start["stages"]), default=0
    )
    room = width - len(_INDENT) - label_chars - _TIME_CHARS - 2 * len(_INDENT) - 1
    bar_chars = min(room, BAR_CHARS_MAX) if room >= BAR_CHARS_MIN else 0
    scale = bar_chars / max(1, *(_length_ms(start) for start in starts))
    lines: list[Line] = []
    for start in starts:
        if lines:
            lines.append([])
        lines += _head(start, width)
        lines += _stages(start, label_chars, scale)
        lines += _remarks(start, width)
    return lines


def draw_bar(begin: float, end: float) -> str:
    """A bar between two places of a line, in columns: its length is right to an eighth, and never 0."""
    eighths = max(1, round((end - begin) * 8))
    return " " * int(begin + 0.5) + "█" * (eighths // 8) + _EIGHTHS[eighths % 8]


def _head(start: Start, width: int) -> Iterator[Line]:
    """Worker, revision, rung, outcome, times and memory, on as many lines as they need."""
    outcome = start.get("outcome") or "starting"
    ready_ms, first_ms = start.get("ready_after_ms"), start.get("first_token_after_ms")
    memory_bytes = start.get("memory_bytes")
    parts = [
        (start["worker_id"], "bold"),
        (f"revision {start['version']}", ""),
        (start.get("rung") or "unknown rung", "bold cyan"),
        (outcome, _OUTCOMES.get(outcome, "yellow")),
    ]
    if ready_ms is not None:
        parts.append((f"ready in {_time(ready_ms)}", ""))
    elif start["stages"]:
        parts.append((f"after {_time(_length_ms(start))}", ""))
    if first_ms is not None:
        parts.append((f"first token in {_time(first_ms)}", ""))
    if memory_bytes is not None:
        parts.append((size(memory_bytes), ""))
    line: Line = []
    used = 0
    for text, style in parts:
        if line and used + len(_INDENT) + len(text) > width:
            yield line
            line, used = [], 0
            line.append((_INDENT, ""))
            used = len(_INDENT)
        elif line:
            line.append((_INDENT, ""))
            used += len(_INDENT)
        line.append((text, style))
        used += len(text)
    yield line


def _stages(start: Start, label_chars: int, scale: float) -> Iterator[Line]:
    """A line for each stage with how long it took, and its bar where there is room for bars."""
    stages = start["stages"]
    for stage, following in pairwise(stages):
        begin_ms, end_ms = stage["after_ms"], following["after_ms"]
        line = [
            (f"{_INDENT}{_label(stage['stage']):<{label_chars}}{_INDENT}", ""),
            (f"{_time(end_ms - begin_ms):>{_TIME_CHARS}}", ""),
        ]
        if scale:
            line.append((_INDENT + draw_bar(begin_ms * scale, end_ms * scale), _bar_style(stage["stage"])))
        yield line
    if stages:
        last = stages[-1]["stage"]
        yield [(f"{_INDENT}{_label(last)}", _OUTCOMES.get(last, "green" if last == "first_token" else ""))]


def _remarks(start: Start, width: int) -> Iterator[Line]:
    """Why it came from no better rung, and why it failed."""
    remarks = [(f"note: {start['note']}", "dim")] if start.get("note") else []
    if failure := start.get("failure"):
        remarks.append((f"failed: {describe_failure(failure)}", "red"))
    for text, style in remarks:
        wrapped = textwrap.wrap(text, max(20, width), initial_indent=_INDENT, subsequent_indent=_INDENT * 2)
        yield from ([(line, style)] for line in wrapped)


def _bar_style(stage: str) -> str:
    if stage in _BEFORE_PROCESS:
        return "dim"
    return "green" if stage == "ready" else "cyan"


def _label(stage: str) -> str:
    return stage.replace("_", " ")


def _time(ms: int) -> str:
    return duration(ms / 1000)


def _length_ms(start: Start) -> int:
    """From the decision to the last stage."""
    return start["stages"][-1]["after_ms"] if start["stages"] else 0
