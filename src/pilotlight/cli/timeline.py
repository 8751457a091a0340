"""The story of a job as rows of a table; `pilotlight status --timeline` prints them."""

from __future__ import annotations

import re
from datetime import datetime

from pilotlight.cli.output import duration
from pilotlight.client.models import JobStory

BAR_CHARS = 32
"""Width of the whole story."""

REASON_CHARS = 100
"""How much of a reason a person is shown; the whole error is in the job's JSON."""

_MESSAGE = re.compile(r'"error_message": ?"((?:[^"\\]|\\.)*)"')
"""Where the RunPod library puts what went wrong (serverless-api.md §4.5)."""


def draw_timeline(story: JobStory) -> list[list[object]]:
    """Rows: event, time since the submission, a bar until the next event, attempt, worker, reason."""
    events = story["timeline"]
    moments = [datetime.fromisoformat(event["at"]) for event in events]
    if not moments:
        return []
    offsets = [(moment - moments[0]).total_seconds() for moment in moments]
    scale = BAR_CHARS / max(0.001, offsets[-1])
    rows: list[list[object]] = []
    for event, offset, following in zip(events, offsets, [*offsets[1:], offsets[-1]], strict=True):
        before, length = round(offset * scale), round((following - offset) * scale)
        bar = " " * before + "█" * length if following > offset else " " * max(0, before - 1) + "▏"
        rows.append(
            [
                event["event"],
                f"+{duration(max(0.0, offset))}",
                bar.ljust(BAR_CHARS),
                event.get("attempt"),
                event.get("workerId"),
                short_reason(event.get("reason", "")),
            ]
        )
    return rows


def short_reason(text: str) -> str:
    """What went wrong in one short line: the message of an error document, else the beginning of the text."""
    found = _MESSAGE.search(text)
    if found is not None and "{" in text:
        text = text[: text.index("{")] + found.group(1)
    line = " ".join(text.split())
    return line if len(line) <= REASON_CHARS else line[: REASON_CHARS - 1] + "…"
