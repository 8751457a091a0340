"""Whether the accounts of a soak add up: every request has exactly one row, which says what its client saw."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .asks import GARBAGE_ID
from .site import Sent, Site

_OUTCOMES = {
    "exact": {"ok"},
    "error_event": {"failed", "timed_out"},
    "cut": {"failed", "timed_out"},
    # Whether the answer was faster than the farewell, nobody can tell.
    "left": {"ok", "disconnected", "rejected", "failed", "shed", "expired", "timed_out"},
}


def check_accounts(site: Site, jobs: Mapping[str, str]) -> Counter[str]:
    """Compare what was sent with the access log and the request log of a gateway that has ended.

    Args:
        site: Whose; what does not add up is reported there.
        jobs: Job id → endpoint id.

    Returns:
        Counts: rows by outcome, streams that were continued.
    """
    counts: Counter[str] = Counter()
    lines = list(access_log(site.home))
    by_client: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["road"] == "data":
            by_client.setdefault(line.get("client_id", ""), []).append(line)
        counts[f"rows.{line['road']}.{line['outcome']}"] += 1
        counts["streams_continued"] += line.get("continued", 0)
    for line in by_client.pop("", []):
        counts["rows_of_garbage"] += line["endpoint_id"] == GARBAGE_ID
        if line["endpoint_id"] != GARBAGE_ID or line["key_id"]:
            site.report(f"a row of nobody: {line}")
    if counts["rows_of_garbage"] > site.counts["garbage.refused"] + site.counts["garbage.closed"]:
        site.report(f"{counts['rows_of_garbage']} rows of garbage, more than was sent")
    for name, sent in site.sent.items():
        problem = problem_with(sent, by_client.pop(name, []))
        if problem:
            site.report(f"row of {name}, {sent}: {problem}")
    for name, found in by_client.items():
        site.report(f"rows of {name}, which was never sent: {found}")
    counts["strangers"] = sum(not line["key_id"] for line in lines)
    _check_stored(site, lines, jobs)
    return counts


def streams_lost(log: Path) -> Counter[str]:
    """Why streams could not go on with another worker, as the gateway's own log tells it."""
    found: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        if " stream_lost " in line:
            reason = re.search(r"reason=('[^']*'|\"[^\"]*\"|\S+)", line)
            found[re.sub(r"\d+", "N", reason[1].strip("'\"")) if reason else line] += 1
    return found


def access_log(home: Path) -> Iterator[dict[str, Any]]:
    """All lines, of the older files, too."""
    for file in sorted((home / "access").glob("access.log*"), reverse=True):
        with file.open() as text:
            yield from map(json.loads, text)


def problem_with(sent: Sent, rows: list[dict[str, Any]]) -> str:
    """What is wrong with the rows of a request; "" if nothing is."""
    if len(rows) != 1:
        return "" if not rows and sent.end == "left_early" else f"{len(rows)} rows: {rows}"
    (row,) = rows
    if row["endpoint_id"] != sent.target:
        return f"of another endpoint: {row}"
    if sent.status and row["status"] != sent.status:
        return f"another status: {row}"
    if sent.status == 401:
        return "" if row["key_id"] == "" else f"a stranger with a key: {row}"
    outcomes = _OUTCOMES.get(sent.end)
    if outcomes is not None and row["outcome"] not in outcomes:
        return f"another outcome: {row}"
    if outcomes is None and sent.status >= 400 and row["outcome"] in {"ok", "disconnected"}:
        return f"a failure that looks like none: {row}"
    if sent.usage is not None and "tokens_out" in row:
        counted = (row.get("tokens_in"), row["tokens_out"])
        if counted != sent.usage or row.get("estimated"):
            return f"other tokens than {sent.usage}: {row}"
    return ""


def _check_stored(site: Site, lines: list[dict[str, Any]], jobs: Mapping[str, str]) -> None:
    """The request log holds the same rows, but for those of strangers."""
    with contextlib.closing(sqlite3.connect(site.home / "pilotlight.db")) as connection:
        stored = connection.execute("SELECT id, road, endpoint_id, status, outcome FROM requests").fetchall()
    told = Counter(
        (line["id"], line["road"], line["endpoint_id"], line["status"], line["outcome"])
        for line in lines
        if line["key_id"]
    )
    for row in Counter(stored) - told:
        site.report(f"in the request log, but not in the access log: {row}")
    for told_row in told - Counter(stored):
        site.report(f"in the access log, but not in the request log: {told_row}")
    of_jobs = Counter(row[0] for row in stored if row[1] == "job")
    for job_id, endpoint_id in jobs.items():
        if of_jobs[job_id] != 1:
            site.report(f"{of_jobs[job_id]} rows of job {job_id} of {endpoint_id}")
