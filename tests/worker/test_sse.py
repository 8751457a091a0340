"""Events cut at any byte come out whole: vllm-worker.md §6.3, §7, §10 point 4."""

from __future__ import annotations

from typing import Any

import pytest
from tests.worker.engine_events import chat_events

from pilotlight.worker import sse
from pilotlight.worker.input_settings import InputSettings
from pilotlight.worker.inputs import plan_request
from pilotlight.worker.outputs import make_shaper
from pilotlight.worker.sse import EventTooLongError, SseSplitter

STREAM = (
    'data: {"a": "größe 漢字"}\n\n: keep-alive\n\nevent: x\r\ndata: one\r\ndata: two\r\n\r\ndata: [DONE]\n\n'
).encode()


def _events(parts: list[bytes]) -> list[sse.SseEvent]:
    splitter = SseSplitter()
    return [event for part in parts for event in splitter.feed(part)] + splitter.close()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_any_cut_gives_the_same_events(size: int) -> None:
    events = _events([STREAM[at : at + size] for at in range(0, len(STREAM), size)])
    assert [(event.name, event.data) for event in events] == [
        ("", '{"a": "größe 漢字"}'),
        ("", ""),
        ("x", "one\ntwo"),
        ("", "[DONE]"),
    ]
    assert [event.is_comment for event in events] == [False, True, False, False]
    assert events[0].text == 'data: {"a": "größe 漢字"}\n\n'
    assert events[2].text == "event: x\ndata: one\ndata: two\n\n"


def test_a_missing_blank_line_at_the_end_loses_nothing() -> None:
    assert [event.data for event in _events([b"data: a\n\ndata: [DONE]"])] == ["a", "[DONE]"]
    assert _events([b"data: a\n\n\n\n"])[0].data == "a"


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 10)
    with pytest.raises(EventTooLongError):
        SseSplitter().feed(b"data: more than ten bytes")


SPOKEN = [" grüß", "e", " 漢", "字", " 🎈", "", " \u2028x"]
STREAMED = ": keep-alive\n\n".join(chat_events(SPOKEN)).encode()


@pytest.mark.parametrize("stream_format", ["tokens", "sse"])
def test_native_items_do_not_depend_on_where_the_network_cut(stream_format: str) -> None:
    """Every pair of bytes is torn apart once, so every character of several bytes is, too."""
    job_input = {
        "messages": [{"role": "user", "content": "x"}],
        "stream": True,
        "stream_format": stream_format,
    }
    request = plan_request(job_input, InputSettings())

    def items(*parts: bytes) -> list[Any]:
        splitter, shaper = SseSplitter(), make_shaper(request)
        out = [item for part in parts for event in splitter.feed(part) for item in shaper.feed(event)]
        out += [item for event in splitter.close() for item in shaper.feed(event)]
        return out + shaper.flush()

    whole = items(STREAMED)
    assert "\ufffd" not in repr(whole)
    assert "keep-alive" not in repr(whole)
    if stream_format == "tokens":
        assert [text for item in whole for text in item["choices"][0]["tokens"]] == SPOKEN
    for cut in range(1, len(STREAMED)):
        assert items(STREAMED[:cut], STREAMED[cut:]) == whole


def test_a_missing_end_mark_costs_nothing_and_is_not_made_up() -> None:
    """`[DONE]` is passed on when the engine sent it (§3.6)."""
    request = plan_request({"openai_input": {"messages": [], "stream": True}}, InputSettings())
    text = "".join(chat_events(["a", "b"])).removesuffix("data: [DONE]\n\n")
    splitter, shaper = SseSplitter(), make_shaper(request)
    out = [item for event in splitter.feed(text.encode()) for item in shaper.feed(event)] + shaper.flush()
    assert "".join(out) == text
    assert shaper.failure is None
