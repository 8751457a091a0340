"""The judge of the soaks knows a wrong answer when it sees one."""

from __future__ import annotations

import json
import random

import pytest

from pilotlight.testing.fake_tokens import answer_tokens, prompt_tokens, read_prompt

from .asks import CHAT, Ask, counted
from .judge import StreamJudge, WrongError, check_refusal, check_whole
from .ledger import problem_with
from .site import Sent
from .wire import Head

_, ANSWER = counted("q1", 3)
ASK = Ask("stream", b"", ANSWER, stream=True, usage=True)
HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}


def event(**fields) -> str:
    return json.dumps(HEAD | fields)


def said(text: str, reason: str | None = None) -> str:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": reason}])


EVENTS = [
    event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]),
    *(said(" q1-1"), said(" q1-2"), said(" q1-3", "stop")),
    *(event(choices=[], usage=USAGE), "[DONE]"),
]
ERROR = json.dumps({"error": {"message": "gone", "type": "server_error", "param": None, "code": 502}})


def verdict(events: list[str], ask: Ask = ASK) -> str:
    judge = StreamJudge(ask)
    for each in events:
        judge.feed(f"data: {each}\n\n".encode(), chunk_end=True)
    return judge.finish()


def test_right_streams():
    assert verdict(EVENTS) == "exact"
    assert verdict([*EVENTS[:2], said(" q1-2 q1-3", "stop"), *EVENTS[4:]]) == "exact", (
        "merged, as vLLM does it"
    )
    for end in ([ERROR], [ERROR, "[DONE]"]):
        assert verdict([*EVENTS[:3], *end]) == "error_event"


@pytest.mark.parametrize(
    "events",
    [
        EVENTS[:-1], EVENTS[:3], [], [*EVENTS[:2], *EVENTS[3:]], [*EVENTS[:2], *EVENTS[1:]],
        [*EVENTS[:1], EVENTS[2], EVENTS[1], *EVENTS[3:]], [*EVENTS[:2], said(" q2-2"), *EVENTS[3:]],
        [*EVENTS[:4], "[DONE]"], [*EVENTS[:5], *EVENTS[4:]], [*EVENTS, EVENTS[1]], [*EVENTS[:2], EVENTS[0], *EVENTS[2:]],
        [*EVENTS[:2], EVENTS[2].replace('"c"', '"d"'), *EVENTS[3:]], [*EVENTS[:3], said(" q1-3", "length"), *EVENTS[4:]],
        [*EVENTS[:4], event(choices=[], usage={**USAGE, "completion_tokens": 2}), "[DONE]"],
        [*EVENTS[:2], event(choices=[{"index": 0, "delta": {}, "token_ids": [1], "finish_reason": None}]), *EVENTS[2:]],
        [*EVENTS[:2], '{"error": "gone"}'], [*EVENTS[:2], ERROR, *EVENTS[2:]], [*EVENTS[:2], "{"],
        [*EVENTS[:2], ERROR.replace("gone", "internal server error, request 1")],
    ],
    ids=lambda events: str(len(events)),
)  # fmt: skip
def test_wrong_streams(events):
    with pytest.raises(WrongError):
        verdict(events)


def test_usage_that_nobody_asked_for():
    with pytest.raises(WrongError):
        verdict(EVENTS, Ask("stream", b"", ANSWER, stream=True))


def test_torn_events():
    judge = StreamJudge(ASK)
    judge.feed(b"data: {", chunk_end=False)
    with pytest.raises(WrongError):
        judge.feed(b'"id"', chunk_end=True)


def whole(text: str = ANSWER.text, usage: dict = USAGE) -> bytes:
    choices = [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]
    return json.dumps({"choices": choices, "usage": usage}).encode()


def test_whole_answers():
    check_whole(ASK, whole())
    for wrong in (whole(" q1-1 q1-2"), whole(usage={**USAGE, "total_tokens": 8}), whole()[:-1], b"{}"):
        with pytest.raises(WrongError):
            check_whole(ASK, wrong)
    check_refusal(ASK, Head(429, {"retry-after": "1"}), ERROR.encode())
    for head, body in ((Head(429, {}), ERROR), (Head(502, {}), "gone")):
        with pytest.raises(WrongError):
            check_refusal(ASK, head, body.encode())


ROW = {"endpoint_id": "e", "status": 200, "outcome": "ok", "key_id": "k", "tokens_in": 4, "tokens_out": 3}


@pytest.mark.parametrize(
    "rows",
    [
        [], [ROW, ROW], [{**ROW, "status": 500}], [{**ROW, "outcome": "failed"}], [{**ROW, "tokens_out": 2}],
        [{**ROW, "estimated": True}], [{**ROW, "endpoint_id": "f"}],
    ],
)  # fmt: skip
def test_rows_that_do_not_add_up(rows):
    assert problem_with(Sent("e", "exact", 200, (4, 3)), rows)
    assert not problem_with(Sent("e", "exact", 200, (4, 3)), [ROW])
    assert not problem_with(Sent("e", "left_early", 0, None), [])


def test_the_vocabulary_of_the_stand_in():
    """Any text and any number of words of its answer are told from their tokens; what does not follow is refused."""
    choice = random.Random(1)
    for _ in range(50):
        text = " ".join(
            "wört"[: choice.randint(1, 4)] * choice.randint(1, 9) for _ in range(choice.randint(1, 9))
        )
        done = choice.randint(0, 9)
        assert read_prompt([*prompt_tokens(text), *answer_tokens(0, done)]) == (text, done)
    assert read_prompt([7, 8]) == ("7 8", 0)
    for wrong in (
        [*answer_tokens(1, 2)],
        [*answer_tokens(0, 2), *answer_tokens(1, 1)],
        [*answer_tokens(0, 1), 7],
    ):
        with pytest.raises(ValueError, match=r"answer"):
            read_prompt(wrong)


def test_requests_of_all_kinds_are_http():
    for pieces, chunked in ((1, False), (3, False), (3, True)):
        ask = Ask("x", b"0123456789", route=CHAT, pieces=pieces, chunked=chunked)
        head, _, body = b"".join(ask.request("h", "/v2/e/openai", "k", "q1")).partition(b"\r\n\r\n")
        assert head.startswith(b"POST /v2/e/openai/v1/chat/completions HTTP/1.1\r\nHost: h\r\n")
        assert body == (b"4\r\n0123\r\n4\r\n4567\r\n2\r\n89\r\n0\r\n\r\n" if chunked else b"0123456789")
