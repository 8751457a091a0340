"""OpenAI calls carried as jobs (serverless-api.md §2.15, `/openai/{path…}`)."""

from __future__ import annotations

import json

import pytest

from pilotlight.core.openai_jobs import failure_of, job_input, stream_text, wants_stream, whole_answer


def test_the_request_travels_unread():
    body = b'{"model": "x",  "n": 1.50}'
    assert job_input("/v1/chat/completions", body) == (
        b'{"openai_route":"/v1/chat/completions","openai_input":' + body + b"}"
    )
    assert json.loads(job_input("/v1/models", b"")) == {"openai_route": "/v1/models"}


@pytest.mark.parametrize(
    ("body", "streamed"),
    [
        (b'{"stream": true}', True),
        (b'{"stream":false}', False),
        (b"{}", False),
        (b'{"stream":null}', False),
        (b'{"stream":"true"}', True),
        (b'{"stream":1}', True),
        (b'{"stream":"False"}', False),
        (b'{"stream":0}', False),
    ],
)
def test_a_stream_is_what_asks_for_one(body, streamed):
    """vllm-worker.md §1.9: by the rule that our worker program goes by."""
    assert wants_stream(body) is streamed


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff", b"1", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(ValueError, match="must be a JSON object"):
        wants_stream(body)


def test_text_chunks_are_written_verbatim():
    """Mechanics 2: several events, or a part of one."""
    part = 'data: {"a":"ü"}\n\ndata: {"b'
    assert stream_text(json.dumps({"output": part}).encode()) == part.encode()
    assert stream_text(b'{"output":{"a":1}}') == b'data: {"a":1}\n\n'
    assert stream_text(b'{"output":"\\ud83d"}') == b"?"


@pytest.mark.parametrize(
    ("output", "chunks", "answer"),
    [
        (b'{"id":"x"}', [], b'{"id":"x"}'),
        (b'[{"id":"x"}]', [], b'{"id":"x"}'),
        (b"[1,2]", [], b"[1,2]"),
        (b"[]", [b'{"output":{"id":"y"}}'], b'{"id":"y"}'),
        (None, [b'{"output":1}', b'{"output":2}'], b"[1,2]"),
        (None, [], b"null"),
    ],
)
def test_the_answer_is_the_workers_one_value(output, chunks, answer):
    """Mechanics 3."""
    found = whole_answer(output, chunks)
    assert (found.status, found.body) == (200, answer)


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ({"object": "error", "message": "no such model", "code": 404}, 404),
        ({"error": {"message": "too long", "code": 400}}, 400),
        ({"error": {"message": "too long", "code": "context_length"}}, 500),
        ({"error": {"message": "?"}}, 500),
        ({"type": "error", "error": {"message": "?"}}, 500),
        ({"error": None, "id": "fine"}, 200),
        ({"object": "list", "code": 404}, 200),
    ],
)
def test_error_objects_get_their_true_status(value, status):
    """§12 item 38: the reference passes them as 200, which users reported as a bug."""
    assert whole_answer(json.dumps([value]).encode(), []).status == status


def test_a_success_that_owns_an_error_is_unwrapped():
    """vllm-worker.md §3.6: our worker program wraps it, because its error would fail the job."""
    failed = {"status": "failed", "error": {"message": "x", "code": 500}}
    output = json.dumps([{"response": failed, "openai_passthrough": True}]).encode()
    found = whole_answer(output, [])
    assert (found.status, json.loads(found.body)) == (200, failed)
    chunk = json.dumps({"output": {"response": failed, "openai_passthrough": True}}).encode()
    data = stream_text(chunk)
    assert (data[:6], json.loads(data[6:]), data[-2:]) == (b"data: ", failed, b"\n\n")
    for other in ({"response": 1, "openai_passthrough": False}, {"openai_passthrough": True, "a": 1}):
        assert json.loads(whole_answer(json.dumps([other]).encode(), []).body) == other


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("out of memory", 500, "out of memory"),
        ('{"error":{"message":"engine gone","code":503}}', 503, "engine gone"),
        ('{"error":{"message":"odd","code":true}}', 500, "odd"),
        ('{"error_type":"<class \'ValueError\'>","error_message":"boom"}', 500, "boom"),
        ('{"error":"plain","code":429}', 429, "plain"),
        ("{'message': 'bad', 'code': 7}", 500, "{'message': 'bad', 'code': 7}"),
        ("[" * 100_000, 500, "[" * 100_000),
    ],
)
def test_failures_name_their_status_where_they_have_one(error, status, message):
    """Mechanics 4."""
    failure = failure_of(error)
    assert (failure.status, failure.message) == (status, message)
