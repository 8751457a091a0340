"""Streams on the data path: whole events, usage taken out where it was not asked for, tokens counted."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.gateway.events import EventStream, TokenCount, is_plain_chunk

CONTENT = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"\xc3\xa9\xe2\x82\xac"}}]}\n\n'
USAGE = (
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}\n\n'
)
DONE = b"data: [DONE]\n\n"
STREAM = CONTENT * 3 + USAGE + DONE


def passed(pieces, *, hide_usage):
    count = TokenCount()
    stream = EventStream(count, hide_usage=hide_usage)
    out = [stream.feed(piece) for piece in pieces]
    return out, stream, count


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=12))
def test_however_the_bytes_are_cut_only_whole_events_leave(cuts):
    edges = [0, *sorted(set(cuts)), len(STREAM)]
    out, stream, count = passed([STREAM[a:b] for a, b in itertools.pairwise(edges)], hide_usage=True)
    assert b"".join(out) == CONTENT * 3 + DONE
    assert all(piece == b"" or piece.endswith(b"\n\n") for piece in out)
    assert (count.tokens_in, count.tokens_out, stream.events, stream.complete) == (7, 3, 3, True)


def test_usage_that_was_asked_for_stays():
    out, _, count = passed([STREAM], hide_usage=False)
    assert b"".join(out) == STREAM
    assert count.tokens_out == 3


def test_usage_beside_choices_is_counted_and_stays():
    """continuous_usage_stats puts usage into every event (vllm-worker.md §6.3)."""
    event = b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
    out, stream, count = passed([event], hide_usage=True)
    assert (b"".join(out), count.tokens_out, stream.events) == (event, 2, 1)


def test_the_word_usage_in_a_text_is_not_usage():
    event = b'data: {"choices":[{"index":0,"delta":{"content":"the \\"usage\\" of"}}]}\n\n'
    out, stream, count = passed([event], hide_usage=True)
    assert (b"".join(out), count.tokens_out, stream.events) == (event, None, 1)


def test_what_ends_a_stream_or_tells_of_an_error_does_neither_in_a_text():
    event = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"event: error, data: [DONE]"}}]}\n\n'
    out, stream, _ = passed([event, event + event], hide_usage=True)
    assert (b"".join(out), stream.events, stream.complete, stream.failed) == (event * 3, 3, False, False)
    _, stream, _ = passed([event + b"event: error\ndata: {}\n\n" + DONE], hide_usage=True)
    assert (stream.complete, stream.failed) == (True, True)


def test_nothing_is_lost_of_an_event_that_is_too_long_to_wait_for():
    long = b'data: {"id":"c","usage":null,"choices":[{"index":0,"delta":{"content":"%b' % (b"x" * 2**22)
    pieces = [b'data: {"id":"c"', CONTENT.removeprefix(b'data: {"id":"c"'), long, b'"}}]}\n\n']
    for begin in ([], pieces[:2]):
        out, _, _ = passed([*begin, *pieces[2:]], hide_usage=True)
        assert b"".join(out) == b"".join([*begin, *pieces[2:]])


def test_responses_and_messages_streams_carry_usage_of_their_own():
    responses = b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":{"input_tokens":4,"output_tokens":9}}}\n\n'
    out, _, count = passed([responses], hide_usage=False)
    assert (b"".join(out), count.tokens_in, count.tokens_out) == (responses, 4, 9)
    messages = (
        b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":4,"output_tokens":0}}}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":5}}\n\n'
    )
    out, _, count = passed([messages], hide_usage=False)
    assert (b"".join(out), count.tokens_in, count.tokens_out) == (messages, 4, 5)


def test_an_error_event_marks_the_stream_as_failed():
    event = b'data: {"error":{"message":"boom","code":500}}\n\n'
    out, stream, _ = passed([CONTENT, event, DONE], hide_usage=True)
    assert stream.failed
    assert out[1] == event


def test_a_stream_that_ends_inside_an_event_gives_the_rest():
    out, stream, _ = passed([CONTENT + b"data: {"], hide_usage=True)
    assert out == [CONTENT]
    assert stream.rest() == b"data: {"
    assert stream.rest() == b""


def test_lines_may_end_with_cr_lf():
    event = b'data: {"choices":[{"index":0}]}\r\n\r\n'
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\r\n\r\n'
    out, stream, count = passed([event[:9], event[9:] + usage[:5], usage[5:]], hide_usage=True)
    assert out == [b"", event, b""]
    assert (stream.events, count.tokens_out) == (1, 2)


def test_a_messages_stream_that_is_cut_has_no_count_of_its_own():
    start = b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":4,"output_tokens":0}}}\n\n'
    _, _, count = passed([start], hide_usage=False)
    assert (count.tokens_in, count.tokens_out) == (4, None)
    _, stream, _ = passed([b'event: error\ndata: {"type":"error"}\n\n'], hide_usage=False)
    assert stream.failed


def test_an_absurd_count_is_not_taken():
    event = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":99999999999999999}}\n\n'
    assert passed([event], hide_usage=True)[2].tokens_out is None


@pytest.mark.parametrize("end", [b"", b"}"])
def test_a_chunk_is_known_whatever_its_size(end):
    for size in (*range(1, 5000), *range(5000, 1, -7)):
        data = b'data: {"id":' + b"x" * size + end + b"\n\n"
        assert is_plain_chunk(b"%x\r\n%b\r\n" % (len(data), data))


@pytest.mark.parametrize(
    "piece",
    [
        b"",
        b"\r\n",
        b"1",
        b"0\r\n\r\n",
        b'10\r\ndata: {"id":1}\n\n',
        b'10\r\ndata: {"id":1}\n\n\n\n',
        b'010\r\ndata: {"id":1}\n\n\r\n',
        b'10;a=b\r\ndata: {"id":1}\n\n\r\n',
        b'11\r\ndata: {"id":1}\n\n\r\n',
        b'f\r\ndata: {"id":1}\n\n\r\n',
        b'10\r\nDATA: {"id":1}\n\n\r\n',
        b'22\r\ndata: {"id":1}\n\ndata: {"id":12}\n\n\r\n',
        b'10\r\ndata: {"id":1}\n\n\r\n10\r\ndata: {"id":1}\n\n\r\n',
        b'1f\r\ndata: {"id":1,"usage":"none"}\n\n\r\n',
        b"e\r\ndata: [DONE]\n\n\r\n",
    ],
)
def test_everything_else_is_looked_at_more_closely(piece):
    for _ in range(2):
        assert not is_plain_chunk(piece)


def test_what_comes_next_begins_an_event_where_something_has_come_and_nothing_is_left_of_it():
    stream = EventStream(TokenCount(), hide_usage=False)
    assert not stream.at_boundary
    stream.feed(b'data: {"id":0}\n\n')
    assert stream.at_boundary
    stream.feed(b'data: {"id":')
    assert not stream.at_boundary
    stream.feed(b"1}\n\n")
    assert stream.at_boundary
