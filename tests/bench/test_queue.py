"""`pilotlight bench queue`: the arithmetic, the clients' wire, and the whole of it with tiny numbers."""

import asyncio
import json
import os
import shutil
import subprocess
import sys

import pytest

from pilotlight.bench.figures import Report
from pilotlight.bench.harness.job_clients import PAYLOAD_BYTES, payload
from pilotlight.bench.harness.lean import lean_connect, lean_request, target_of
from pilotlight.bench.queue import UNITS, fsync_ms, run
from pilotlight.bench.queue_load import Load
from pilotlight.bench.queue_peers import PEERS, Celery, postgresql_program, start_peers
from pilotlight.cli.root import UsageError

COMMAND = [sys.executable, "-c", "from pilotlight.cli import main; main()", "bench", "queue"]
TINY = Load(
    seconds=1,
    rounds=1,
    connections=4,
    batch_workers=1,
    single_workers=1,
    polling_workers=1,
    window=16,
    rate=20,
    deep=8000,
    shallow_per_s=8000,
    peers=(),
)
SERVERS = {"redis-server": shutil.which("redis-server"), "postgresql": postgresql_program("postgres")}
MISSING = [name for name, found in SERVERS.items() if found is None]
DEEP = {"deep_submit_ratio", "deep_take_ratio", "deep_rss_mb", "deep_health_ms", "deep_purge_ms"}


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_payloads_have_the_size_that_is_stated_whatever_moment_they_hold():
    for moment in (0, 1, 10**18):
        body = payload(moment)
        assert (len(body), json.loads(body)["input"]["t"]) == (PAYLOAD_BYTES, moment)


def test_the_time_of_the_disk_is_measured_and_leaves_nothing_behind(tmp_path):
    assert fsync_ms(tmp_path, count=3) > 0
    assert list(tmp_path.iterdir()) == []


def test_worker_urls_become_port_and_target():
    assert target_of("http://127.0.0.1:8400/v2/e/job-take/w?gpu=cpu") == (8400, "/v2/e/job-take/w?gpu=cpu")
    assert target_of("http://127.0.0.1/x") == (80, "/x")


async def test_the_lean_client_reads_answers_in_pieces_empty_ones_and_a_lost_connection():
    answers = [
        [b"HTTP/1.1 200 OK\r\ncontent-", b'length: 4\r\nx: y\r\n\r\n{"', b'":'],
        [b"HTTP/1.1 204 No Content\r\n\r\n"],
        [],
    ]
    seen = []

    async def serve(reader, writer):
        for pieces in answers:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        connection = await lean_connect(server.sockets[0].getsockname()[1])
        request = lean_request("GET", "/v2/e/status/j", "secret")
        assert await connection.ask(request) == (200, b'{"":')
        assert await connection.ask(request) == (204, b"")
        assert await connection.ask(request) == (0, b"")
    assert seen[0].startswith(b"GET /v2/e/status/j HTTP/1.1\r\n")
    assert b"authorization: Bearer secret\r\n" in seen[0]


def test_an_unknown_peer_is_refused_by_name():
    with pytest.raises(
        UsageError, match="'rq'; there are celery-redis, dramatiq-redis, procrastinate-postgresql"
    ):
        start_peers(None, ("rq",))


def test_without_peers_nothing_is_installed_or_started(monkeypatch, tmp_path):
    monkeypatch.setenv("PILOTLIGHT_CACHE", str(tmp_path))
    assert start_peers(None, ()) == []
    assert list(tmp_path.iterdir()) == []


def test_of_several_workers_of_a_peer_the_fastest_counts(monkeypatch, tmp_path):
    peer = Celery(tmp_path / "python", {})
    rates = iter([100.0, 300.0])
    monkeypatch.setattr(peer, "_measure", lambda *_: next(rates))
    assert len(peer.workers()) == 2
    assert peer.measure(None, seconds=1, window=1) == 300.0


@pytest.mark.parametrize("option", [["--rounds", "0"], ["--deep", "-1"], ["--peers", "rq"]])
def test_wrong_usage_ends_with_2(option):
    done = subprocess.run([*COMMAND, *option], capture_output=True, timeout=60, check=False)
    assert done.returncode == 2


@pytest.mark.timeout(300)
def test_every_figure_is_printed_and_no_job_is_lost(capsys):
    """A real gateway with real workers, and a deep queue of a few hundred jobs."""
    run(TINY, Report("queue", as_json=True))
    figures = {line["metric"]: line for line in printed(capsys)}
    assert figures.keys() == UNITS.keys() | DEEP
    assert {line["case"] for line in figures.values()} == {"pilotlight"}
    assert figures["failed_jobs"]["value"] == 0
    assert all(line["value"] > 0 for name, line in figures.items() if name.endswith(("_per_s", "_ratio")))


@pytest.mark.timeout(300)
@pytest.mark.skipif(bool(MISSING) and not os.environ.get("CI"), reason=f"not installed: {', '.join(MISSING)}")
def test_peers_are_measured_beside_it(capsys):
    """Real Redis, PostgreSQL and worker runtimes, for a moment each."""
    load = Load(
        seconds=1, rounds=1, connections=4, batch_workers=1, single_workers=1, polling_workers=1, window=16,
        rate=20, deep=0,
    )  # fmt: skip
    run(load, Report("queue", as_json=True))
    out, error = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    rates = {
        line["case"]: line["value"] for line in lines if line["metric"] == "end_to_end_single_jobs_per_s"
    }
    assert rates.keys() == {"pilotlight", *PEERS}
    assert all(rate > 0 for rate in rates.values())
    assert all(f"queue: {case}: accepted work is " in error for case in rates)
