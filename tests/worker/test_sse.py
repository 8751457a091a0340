"""Events cut at any byte come out whole: vllm-worker.md §6.3, §10 item 4."""

from __future__ import annotations

import pytest

from pilotlight.worker import sse
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
