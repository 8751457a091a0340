"""The load generators against the stand-in engine, as programs."""

import asyncio
import json

import pytest

from pilotlight.bench.errors import BenchError
from pilotlight.bench.harness.streams import Answer, Tally
from pilotlight.bench.harness.upstream import EVENT
from pilotlight.bench.processes import Bench, environment, python_module

HARNESS = "pilotlight.bench.harness"
ROUTE = "/v1/chat/completions"


@pytest.fixture
def bench():
    with Bench() as bench:
        yield bench


def start_engine(bench: Bench, events: int, pause_s: float = 0.0) -> int:
    child = bench.start("engine", python_module(f"{HARNESS}.upstream", 0, events, pause_s), stdout=True)
    return int(child.read_line())


def run(bench: Bench, name: str, *arguments: object):
    command = python_module(f"{HARNESS}.{name}", *arguments)
    return json.loads(bench.run(name, command, env=environment(KEY="rpa_x"), timeout_s=30))


def test_streams_sees_every_event_of_every_stream(bench):
    seen = run(bench, "streams", start_engine(bench, 50), 8, 3, 50, ROUTE)
    assert (seen["streams"], seen["events"], seen["failed"], seen["failures"]) == (24, 1200, 0, [])
    assert 0 < seen["late_ms_p50"] <= seen["late_ms_p99"]
    assert 0 < seen["first_ms_p50"] <= seen["first_ms_p99"]


def test_streams_counts_events_that_never_came(bench):
    seen = run(bench, "streams", start_engine(bench, 50), 2, 1, 60, ROUTE)
    assert (seen["events"], seen["failed"]) == (100, 20)
    assert "50 of 60 events" in seen["failures"][0]


async def test_streams_counts_a_connection_that_is_cut(bench):
    async def cut(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(cut, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        seen = await asyncio.to_thread(run, bench, "streams", port, 2, 1, 10, ROUTE)
    assert (seen["events"], seen["failed"]) == (0, 20)
    assert "lost after event 0" in seen["failures"][0]


def test_an_answer_finds_events_that_are_cut_anywhere_and_those_out_of_order():
    stream = b"".join(EVENT % (number, 1) for number in (0, 1, 3)) + b"data: [DONE]\n\n"
    for size in (1, 7, 100, len(stream)):
        tally = Tally()
        answer = Answer(tally)
        for at in range(0, len(stream), size):
            answer.on_body(stream[at : at + size])
        assert answer.done
        assert len(tally.late_ms) == 3
        assert len(tally.first_ms) == 1
        assert tally.failures == ["event 000003 where 2 was due"]


def test_first_token_gives_pairs_of_every_road(bench):
    port = start_engine(bench, 3)
    seen = run(bench, "first_token", 25, f"direct={port}:{ROUTE}", f"other={port}:/v2/x/openai{ROUTE}")
    assert {name: len(samples) for name, samples in seen.items()} == {"direct": 25, "other": 25}
    assert all(sample > 0 for samples in seen.values() for sample in samples)


def test_tokens_refuses_streams_that_do_not_say_how_many_tokens_they_had(bench):
    port = start_engine(bench, 3)
    with pytest.raises(BenchError, match="expected 3 tokens"):
        run(bench, "tokens", port, ROUTE, "m", 2, 3)
