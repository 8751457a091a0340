"""Logs of workers: capture, bounds, rotation, tail, follow, prune."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from pathlib import Path

import pytest

from pilotlight.clusters.capture import LINE_BYTES_MAX, LineSplitter
from pilotlight.clusters.logs import WorkerLogs
from pilotlight.errors import InvalidInputError

from .conftest import count_descriptors

NOW_MS = 1_780_315_504_123


@pytest.fixture
def clock():
    return {"ms": NOW_MS}


@pytest.fixture
async def logs(tmp_path, clock):
    logs = WorkerLogs(tmp_path / "logs", log_bytes=10_000, now_ms=lambda: clock["ms"])
    yield logs
    await logs.close()


async def write(logs: WorkerLogs, worker_id: str, data: bytes, end: str = "") -> None:
    descriptor = logs.open(worker_id)
    await asyncio.to_thread(write_all, descriptor, data)
    os.close(descriptor)
    await logs.finish(worker_id, end)


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


async def texts(logs: WorkerLogs, worker_id: str, lines: int = 5000) -> list[str]:
    return [line.text for line in await logs.tail(worker_id, lines)]


async def test_lines_are_stamped_and_numbered(logs):
    """serverless-api.md §7.4: id is a timestamp and a sequence, source is container or system."""
    await write(logs, "w1", b"Worker ready.\nsecond\nunfinished", "exited with status 0")
    lines = await logs.tail("w1")
    assert [(line.sequence, line.source, line.text) for line in lines] == [
        (1, "container", "Worker ready."),
        (2, "container", "second"),
        (3, "container", "unfinished"),
        (4, "system", "exited with status 0"),
    ]
    assert lines[0].ts_ms == NOW_MS
    assert lines[0].timestamp == "2026-06-01T12:05:04.123Z"
    assert lines[0].id == "2026-06-01T12:05:04.123Z/000000000001"


async def test_files_are_for_the_owner_only(logs, tmp_path):
    await write(logs, "w1", b"x\n")
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "logs" / "w1.log").stat().st_mode & 0o777 == 0o600


async def test_tail_gives_the_newest_lines_and_those_since_a_moment(logs, clock):
    descriptor = logs.open("w1")
    for number in range(1, 5):
        clock["ms"] = NOW_MS + number * 1000
        await asyncio.wrap_future(logs.note("w1", f"note {number}"))
    os.close(descriptor)
    assert await texts(logs, "w1", 2) == ["note 3", "note 4"]
    assert await texts(logs, "w1", 0) == []
    since = await logs.tail("w1", 100, since_ms=NOW_MS + 2000)
    assert [line.text for line in since] == ["note 2", "note 3", "note 4"]


async def test_an_unknown_worker_has_no_lines(logs):
    assert await logs.tail("nobody") == []
    assert [line async for line in logs.follow("nobody", 0)] == []
    await logs.finish("nobody")


@pytest.mark.parametrize("worker_id", ["", "../secret", "a/b", "a.log", "x" * 65])
async def test_ids_cannot_leave_the_folder(logs, worker_id):
    with pytest.raises(InvalidInputError, match="worker id"):
        await logs.tail(worker_id)
    with pytest.raises(InvalidInputError, match="worker id"):
        logs.open(worker_id)


async def test_rotation_bounds_the_files_and_keeps_the_newest_lines(logs, tmp_path):
    await write(logs, "w1", b"".join(b"line %06d of many\n" % number for number in range(5000)))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "logs").iterdir()}
    assert set(sizes) == {"w1.log", "w1.log.1"}
    assert max(sizes.values()) <= 10_000
    lines = await logs.tail("w1", 5000)
    assert lines[-1].text == "line 004999 of many"
    assert lines[-1].sequence == 5000
    numbers = [line.sequence for line in lines]
    assert numbers == list(range(numbers[0], 5001))
    assert len(numbers) > 10_000 // 70


async def test_numbers_go_on_when_a_log_is_opened_again(logs):
    await write(logs, "w1", b"one\n")
    await write(logs, "w1", b"two\n")
    await asyncio.wrap_future(logs.note("w1", "three"))
    assert [(line.sequence, line.text) for line in await logs.tail("w1")] == [
        (1, "one"),
        (2, "two"),
        (3, "three"),
    ]


async def test_a_torn_last_line_of_a_killed_gateway_is_left_out(logs, tmp_path):
    await write(logs, "w1", b"one\n")
    with (tmp_path / "logs" / "w1.log").open("ab") as file:
        file.write(b"2026-06-01T12:05:04.123Z 0000")
    assert await texts(logs, "w1") == ["one"]
    await write(logs, "w1", b"two\n")
    assert await texts(logs, "w1") == ["one", "two"]


async def test_long_lines_are_cut(logs):
    await write(logs, "w1", b"a" * 300_000 + b"\nshort\n")
    first, second = await texts(logs, "w1")
    assert first == "a" * LINE_BYTES_MAX + " [cut]"
    assert second == "short"


async def test_control_characters_and_broken_text_do_not_reach_a_terminal(logs):
    await write(logs, "w1", b"\x1b[31mred\x1b[0m\ttab \x1b]0;title\x07\x08\xff\xc2\x9b31m \xc3\xa9\n")
    assert await texts(logs, "w1") == ["red\ttab ��\ufffd31m é"]


async def test_a_progress_bar_leaves_its_last_state(logs):
    await write(logs, "w1", b"\rloading 0%\rloading 50%\rloading 100%\r\nloaded\r\n")
    assert await texts(logs, "w1") == ["loading 100%", "loaded"]


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_lines_do_not_depend_on_how_the_bytes_arrive(size):
    data = b"one\r\ntwo\n\n50%\r100%\nlong " + b"x" * 9000 + b"\nlast"
    splitter = LineSplitter()
    lines = [
        line for start in range(0, len(data), size) for line in splitter.feed(data[start : start + size])
    ]
    lines += splitter.flush()
    assert lines[:4] == [b"one", b"two", b"", b"100%"]
    assert lines[4] == (b"long " + b"x" * 9000)[:LINE_BYTES_MAX] + b" [cut]"
    assert lines[5:] == [b"last"]


async def test_follow_gives_old_lines_then_new_ones_then_ends_with_the_worker(logs):
    descriptor = logs.open("w1")
    os.write(descriptor, b"one\ntwo\n")
    seen: list[str] = []
    arrived = {name: asyncio.Event() for name in ("two", "three")}

    async def follow() -> None:
        async for line in logs.follow("w1", 1):
            seen.append(line.text)
            if line.text in arrived:
                arrived[line.text].set()

    task = asyncio.create_task(follow())
    await arrived["two"].wait()
    os.write(descriptor, b"three\n")
    await arrived["three"].wait()
    os.close(descriptor)
    await logs.finish("w1", "exited with status 0")
    await task
    assert seen == ["two", "three", "exited with status 0"]
    assert logs._followers == {}


async def test_follow_without_a_number_gives_new_lines_only(logs):
    descriptor = logs.open("w1")
    await asyncio.wrap_future(logs.note("w1", "old"))
    lines = logs.follow("w1")
    first = asyncio.ensure_future(anext(lines))
    while not logs._followers:
        await asyncio.sleep(0)
    # The follower has to look at what there is before anything is new to it.
    while not first.done():
        await asyncio.wrap_future(logs.note("w1", "new"))
    assert (await first).text == "new"
    await lines.aclose()
    os.close(descriptor)


async def test_following_through_rotations_repeats_nothing_and_keeps_the_order(logs):
    numbers: list[int] = []

    async def follow() -> None:
        numbers.extend([line.sequence async for line in logs.follow("w1", 0)])

    descriptor = logs.open("w1")
    task = asyncio.create_task(follow())
    for number in range(300):
        await asyncio.to_thread(os.write, descriptor, b"line %03d with some more text in it\n" % number)
    os.close(descriptor)
    await logs.finish("w1")
    await task
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 300


async def test_a_worker_beyond_its_rate_loses_lines_but_is_never_hung(tmp_path):
    logs = WorkerLogs(tmp_path, log_bytes=1_000_000, bytes_per_s=10_000)
    await write(logs, "w1", b"x" * 99 + b"\n" + (b"y" * 99 + b"\n") * 80_000, "end")
    lines = await logs.tail("w1", 5000)
    left_out = [line.text for line in lines if "left out" in line.text]
    assert re.fullmatch(
        r"\d+ lines \(\d+ bytes\) were left out: more than 10000 bytes per second", left_out[0]
    )
    kept = sum(line.source == "container" for line in lines)
    lost = sum(int(text.split()[0]) for text in left_out)
    # A line that is cut by the limit in the middle belongs to neither or to the lost ones.
    assert 80_001 - len(left_out) <= kept + lost <= 80_001 + len(left_out)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 200_000
    assert lines[-1].text == "end"
    await logs.close()


async def test_a_disk_that_cannot_be_written_costs_lines_only(logs, monkeypatch):
    descriptor = logs.open("w1")
    real = os.write
    full = asyncio.Event()
    loop = asyncio.get_running_loop()

    def write_to_full_disk(target, data):
        if b" container " in bytes(data):
            loop.call_soon_threadsafe(full.set)
            raise OSError(28, "No space left on device")
        return real(target, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_to_full_disk)
        real(descriptor, b"one\ntwo\n")
        await full.wait()
        # Behind what the thread is doing just now.
        await asyncio.wrap_future(logs._ensure_thread().submit(lambda: None))
    real(descriptor, b"three\n")
    os.close(descriptor)
    await logs.finish("w1")
    assert await texts(logs, "w1") == ["2 lines were lost: the log could not be written", "three"]


async def test_finish_does_not_wait_for_a_stranger_who_holds_the_pipe(logs):
    descriptor = logs.open("w1")
    os.write(descriptor, b"one\n")
    await logs.finish("w1", "end")
    assert await texts(logs, "w1") == ["one", "end"]
    with contextlib.suppress(BrokenPipeError):
        os.write(descriptor, b"late\n")
    os.close(descriptor)


async def test_prune_deletes_old_logs_of_ended_workers_only(logs, tmp_path):
    await write(logs, "old", b"x\n" * 2000)
    await write(logs, "new", b"x\n")
    descriptor = logs.open("living")
    folder = tmp_path / "logs"
    for name in ("old.log", "old.log.1", "living.log"):
        os.utime(folder / name, (1000, 1000))
    assert await logs.prune(2_000_000) == 2
    assert {path.name for path in folder.iterdir()} == {"new.log", "living.log"}
    os.close(descriptor)


async def test_close_ends_the_thread_and_reading_still_works(tmp_path: Path):
    logs = WorkerLogs(tmp_path, log_bytes=1000)
    descriptor = logs.open("w1")
    os.write(descriptor, b"one\n")
    os.close(descriptor)
    descriptors = count_descriptors()
    await logs.close()
    await logs.close()
    assert count_descriptors() < descriptors
    assert await texts(logs, "w1") == ["one"]
