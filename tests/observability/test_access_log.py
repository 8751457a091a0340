"""The access log: its lines, its bounds, and a disk that will not take them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
import threading

import pytest

from pilotlight.domain.usage import Outcome, Road
from pilotlight.gateway.access_log import ACCESS_LOG, AccessLog, lines_of
from pilotlight.settings import AccessLogSettings


def written(home):
    """All lines, oldest first."""
    path = home / ACCESS_LOG
    older = sorted(path.parent.glob("access.log.*"), key=lambda each: -int(each.suffix[1:]))
    return [
        json.loads(line) for each in (*older, path) if each.exists() for line in each.read_text().splitlines()
    ]


def test_a_line_has_what_a_row_has_and_nothing_that_says_nothing(row, clock):
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    full = row(
        client_id="mine",
        estimated=True,
        continued=1,
        outcome=Outcome.FAILED,
        trace=trace,
        parent_span="a" * 16,
    )
    begin = {"time": "2026-06-01T12:05:04Z", "event": "request", "error": "stream_cut"}
    assert json.loads(lines_of([full])) == begin | {
        name: getattr(full, name) for name in full.__struct_fields__
    }
    bare = row(
        road=Road.JOB, key_id="", worker_id="", wait_ms=0, first_token_ms=None, duration_ms=0, tokens_in=None,
        tokens_out=None, streamed=False,
    )  # fmt: skip
    assert json.loads(lines_of([bare])) == {
        "time": "2026-06-01T12:05:04Z", "event": "request", "id": "0123456789abcdef", "road": "job",
        "endpoint_id": "ep", "key_id": "", "route": "/v1/chat/completions", "status": 200, "outcome": "ok",
        "arrival_ms": clock.now,
    }  # fmt: skip


def test_what_strangers_write_stays_within_its_line(row):
    line = lines_of([row(route='/\n{"event":"forged"}\x1b[2J', endpoint_id='"\r\n')])
    assert line.count(b"\n") == 1
    assert b"\x1b" not in line
    assert json.loads(line)["endpoint_id"] == '"\r\n'


async def test_lines_are_written_in_order_by_their_owner_alone(tmp_path, row):
    log = AccessLog(AccessLogSettings(), tmp_path)
    log.note([row(id=str(number)) for number in range(100)])
    log.note([row(id="100")])
    await log.close()
    assert [line["id"] for line in written(tmp_path)] == [str(number) for number in range(101)]
    assert stat.S_IMODE((tmp_path / ACCESS_LOG).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / ACCESS_LOG).parent.stat().st_mode) == 0o700
    again = AccessLog(AccessLogSettings(), tmp_path)
    again.note([row(id="101")])
    await again.close()
    assert len(written(tmp_path)) == 102


async def test_files_are_rotated_and_the_oldest_go(tmp_path, row):
    bound = 1024 * 1024
    log = AccessLog(AccessLogSettings(file_bytes=bound, older_files=2), tmp_path)
    for number in range(150):
        log.note([row(id=f"{number * 100 + each}") for each in range(100)])
    await log.close()
    files = list((tmp_path / ACCESS_LOG).parent.iterdir())
    assert sorted(each.name for each in files) == ["access.log", "access.log.1", "access.log.2"]
    assert all(bound // 2 < each.stat().st_size <= bound for each in files if each.suffix != ".log")
    assert (tmp_path / ACCESS_LOG).stat().st_size <= bound
    requests = [int(line["id"]) for line in written(tmp_path)]
    assert requests == list(range(15_000 - len(requests), 15_000))


async def test_lines_that_cannot_be_written_are_counted_and_the_next_ones_are_tried(tmp_path, row):
    blocked = (tmp_path / ACCESS_LOG).parent
    blocked.write_text("a file where the folder should be")
    log = AccessLog(AccessLogSettings(), tmp_path)
    log.note([row(), row()])
    await log.close()
    assert log.lines_dropped == 2
    blocked.unlink()
    log.note([row(id="later")])
    await log.close()
    assert [line["id"] for line in written(tmp_path)] == ["later"]
    assert log.lines_dropped == 2


async def test_a_disk_that_hangs_holds_up_nobody_and_loses_what_is_too_much(tmp_path, row, monkeypatch):
    """1. The first batch hangs. 2. What comes meanwhile is kept up to a bound. 3. It goes on when the disk does."""
    loop, hangs, goes_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    log = AccessLog(AccessLogSettings(), tmp_path)
    append = log._file.append

    def slow(lines):
        loop.call_soon_threadsafe(hangs.set)
        goes_on.wait()
        append(lines)

    monkeypatch.setattr(log._file, "append", slow)
    log.note([row(id="first")])
    await hangs.wait()
    for _ in range(210):
        log.note([row()] * 100)
    assert log.lines_dropped == 1100
    goes_on.set()
    await log.close()
    assert len(written(tmp_path)) == 19_901


async def test_a_disk_that_fills_up_takes_whole_lines_only(tmp_path, row, monkeypatch):
    log = AccessLog(AccessLogSettings(), tmp_path)
    log.note([row(id="before")])
    await log.close()
    write = os.write

    def fill(descriptor, data):
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr("pilotlight.gateway.access_log.os.write", fill)
    log.note([row(id="lost")])
    await log.close()
    monkeypatch.undo()
    log.note([row(id="after")])
    await log.close()
    assert [line["id"] for line in written(tmp_path)] == ["before", "after"]
    assert log.lines_dropped == 1


async def test_lines_go_to_stderr(tmp_path, row, capsys):
    log = AccessLog(AccessLogSettings(target="stderr"), tmp_path)
    log.note([row()])
    await log.close()
    assert json.loads(capsys.readouterr().err)["id"] == "0123456789abcdef"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"target": "syslog"}, {"file_bytes": 100}, {"older_files": 0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AccessLogSettings(**settings)
