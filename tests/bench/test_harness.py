"""The load generators against the stand-in engine, as programs."""

import asyncio
import itertools
import json
import re

import pytest

from pilotlight.bench.errors import BenchError
from pilotlight.bench.harness.fair_share import Shape
from pilotlight.bench.harness.shared_prefix import PREFIX_WORDS, chats
from pilotlight.bench.harness.streams import Answer, Tally
from pilotlight.bench.harness.upstream import EVENT
from pilotlight.bench.harness.varied import varied
from pilotlight.bench.processes import Bench, environment, python_module

HARNESS = "pilotlight.bench.harness"
ROUTE = "/v1/chat/completions"


@pytest.fixture
def bench():
    with Bench() as bench:
        yield bench


@pytest.fixture
def engine(bench):
    """The port of a stand-in engine."""
    child = bench.start("engine", python_module(f"{HARNESS}.upstream", 0), stdout=True)
    return int(child.read_line())


def run(bench: Bench, name: str, *arguments: object, **variables: str):
    command = python_module(f"{HARNESS}.{name}", *arguments)
    env = environment(KEY="rpa_x", **variables)
    return json.loads(bench.run(name, command, env=env, timeout_s=30))


async def with_server(serve, ask):
    """What a blocking `ask(port)` gives while `serve` answers on that port."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        return await asyncio.to_thread(ask, server.sockets[0].getsockname()[1])


async def cut(reader, writer):
    await reader.read(1)
    writer.close()


def test_streams_sees_every_event_of_every_stream(bench, engine):
    seen = run(bench, "streams", engine, ROUTE, 8, 3, 50, 0, 0)
    assert (seen["streams"], seen["events"], seen["failed"], seen["failures"]) == (24, 1200, 0, [])
    assert 0 < seen["late_ms_p50"] <= seen["late_ms_p99"]
    assert 0 < seen["first_ms_p50"] <= seen["first_ms_p99"]


def test_paced_streams_take_their_time_are_all_open_at_once_and_share_several_paths(bench, engine):
    seen = run(bench, "streams", engine, f"{ROUTE},/v2/x/openai{ROUTE}", 20, 1, 11, 0.1, 0.2)
    assert (seen["events"], seen["failed"], seen["open_max"]) == (220, 0, 20)
    assert seen["seconds"] >= 1.0


def test_more_streams_than_descriptors_are_refused_by_name(bench):
    command = ["/bin/sh", "-c", 'ulimit -n 100; exec "$0" "$@"']
    command += python_module(f"{HARNESS}.streams", 1, ROUTE, 50, 1, 1, 0, 0)
    with pytest.raises(BenchError, match="50 streams need 114 open files, and this machine allows 100"):
        bench.run("streams", command, timeout_s=30)


async def test_streams_counts_events_that_never_came(bench):
    async def two_events(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        events = b"".join(EVENT % (number, 1) for number in range(2)) + b"data: [DONE]\n\n"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(events) + events)
        await writer.drain()
        writer.close()

    seen = await with_server(two_events, lambda port: run(bench, "streams", port, ROUTE, 2, 1, 12, 0, 0))
    assert (seen["events"], seen["failed"]) == (4, 20)
    assert "2 of 12 events" in seen["failures"][0]


async def test_streams_counts_a_connection_that_is_cut(bench):
    seen = await with_server(cut, lambda port: run(bench, "streams", port, ROUTE, 2, 1, 10, 0, 0))
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


def test_first_token_gives_pairs_of_every_road(bench, engine):
    seen = run(bench, "first_token", 25, f"direct={engine}:{ROUTE}", f"other={engine}:/v2/x/openai{ROUTE}")
    assert {name: len(samples) for name, samples in seen.items()} == {"direct": 25, "other": 25}
    assert all(sample > 0 for samples in seen.values() for sample in samples)


def test_tokens_refuses_streams_that_do_not_say_how_many_tokens_they_had(bench, engine):
    with pytest.raises(BenchError, match="expected 3 tokens"):
        run(bench, "tokens", engine, ROUTE, "m", 2, 3)


def test_a_fixed_rate_is_kept_on_every_road(bench, engine):
    seen = run(bench, "rate", 60, 1, f"direct={engine}:{ROUTE}", f"other={engine}:/v2/x/openai{ROUTE}")
    assert {name: len(road["took_ms"]) for name, road in seen["roads"].items()} == {"direct": 60, "other": 60}
    assert [road["failed"] for road in seen["roads"].values()] == [0, 0]


def test_neighbouring_varied_requests_differ_in_length_and_are_what_they_say():
    requests = list(itertools.islice(varied(80, ROUTE, "rpa_x"), 200))
    for head, body in requests:
        assert head.endswith(b"Content-Length: %d\r\n\r\n" % len(body))
        json.loads(body)
    assert all(len(one[1]) != len(other[1]) for one, other in itertools.pairwise(requests))
    assert len({body for _, body in requests}) == 200


async def test_varied_requests_send_head_and_body_apart(bench):
    """What the server's first read of a request holds after the head."""
    pieces = []

    async def serve(reader, writer):
        while head := await reader.read(65536):
            length = int(re.search(rb"Content-Length: (\d+)", head)[1])
            pieces.append(len(head.partition(b"\r\n\r\n")[2]))
            if not pieces[-1]:
                await reader.readexactly(length)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    seen = await with_server(serve, lambda port: run(bench, "varied", port, ROUTE, 1, 0.3))
    assert seen["requests"] == len(pieces)
    assert seen["failed"] == 0
    # Where the server is slow to wake, a body may have followed its head into the same read.
    assert 0 in pieces


async def test_varied_counts_what_is_not_answered(bench):
    seen = await with_server(cut, lambda port: run(bench, "varied", port, ROUTE, 1, 0.2))
    assert seen["requests"] == 0
    assert seen["failed"] > 0
    assert all(failure.startswith("lost: ") for failure in seen["failures"])


def test_chats_share_beginnings_within_a_turn_and_never_between_turns():
    turns = [list(chats("m", 3, 4, turn)) for turn in (1, 2)]
    assert turns[0] == list(chats("m", 3, 4, 1))
    beginnings = []
    for turn in turns:
        assert sorted(group for group, _ in turn) == [0] * 4 + [1] * 4 + [2] * 4
        by_group = {(group, body["messages"][0]["content"]) for group, body in turn}
        assert len(by_group) == 3
        assert len({body["messages"][1]["content"] for _, body in turn}) == 12
        beginnings += [content for _, content in by_group]
    assert len({content[:20] for content in beginnings}) == 6
    assert all(len(content.split()) > PREFIX_WORDS for content in beginnings)


def test_shared_prefix_times_every_first_token(bench, engine):
    """The stand-in answers no chat that does not say how it is to be answered."""
    with pytest.raises(BenchError, match="status 200, the answer ends"):
        run(bench, "shared_prefix", engine, ROUTE, "m", 2, 2, 2, 1, 0)


def test_light_keys_wait_for_nobody_at_an_engine_without_slots(bench, engine):
    shape = Shape(
        seconds=1, greedy=3, greedy_tokens=10, light_tokens=2, think_s=0.1, token_s=0.01, model="m", seed=1
    )
    keys = ",".join(f"rpa_{number}" for number in range(4))
    seen = run(bench, "fair_share", engine, ROUTE, shape.as_argument(), KEYS=keys)
    assert (seen["failed"], len(seen["wait_ms"])) == (0, len(seen["first_ms"]))
    assert all(wait <= first for wait, first in zip(seen["wait_ms"], seen["first_ms"], strict=True))
    assert all(tokens > 0 for tokens in seen["tokens"].values())


async def test_refused_requests_of_keys_are_counted_and_end_it(bench):
    async def refuse(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    shape = Shape(
        seconds=60, greedy=2, greedy_tokens=1, light_tokens=1, think_s=0.01, token_s=0, model="m", seed=1
    )
    ask = shape.as_argument()
    seen = await with_server(refuse, lambda port: run(bench, "fair_share", port, ROUTE, ask, KEYS="a,b"))
    assert seen["failed"] >= 100
    assert "status 429" in seen["failures"][0]
