"""The schedule of vllm-worker.md §2.1: its table through the shaper, and where sizes come from (§10 point 2)."""

from __future__ import annotations

from typing import Any

import pytest
from tests.worker.engine_events import completion_events

from pilotlight.worker.batching import EVERY_EVENT, BatchSizes, batch_sizes
from pilotlight.worker.errors import InputError
from pilotlight.worker.input_settings import InputSettings, StreamFormat
from pilotlight.worker.inputs import plan_request
from pilotlight.worker.outputs import make_shaper
from pilotlight.worker.sse import SseSplitter

TABLE = [
    ((50, 1, 3), 200, [1, 3, 9, 27, 50, 50, 50, 10]),
    ((50, 1, 3), 10, [1, 3, 6]),
    ((50, 1, 3), 40, [1, 3, 9, 27]),
    ((50, 1, 3), 1, [1]),
    ((10, 2, 1.5), 30, [2, 3, 5, 7, 10, 3]),
    ((3, 1, 2), 9, [1, 2, 3, 3]),
    ((10, 10, 3), 30, [10, 10, 10]),
    ((10, 20, 3), 30, [10, 10, 10]),
    ((10, 1, 1), 30, [10, 10, 10]),
    ((10, 1, 0.5), 30, [10, 10, 10]),
    ((10, 0, 3), 30, [10, 10, 10]),
    ((50, 1, 3), 0, []),
]


def items_of(pieces: int, settings: InputSettings, **fields: Any) -> list[Any]:
    """What a native stream of so many pieces over all its sequences becomes."""
    request = plan_request({"prompt": "x", "stream": True, **fields}, settings)
    n = fields.get("sampling_params", {}).get("n", 1)
    shaper = make_shaper(request)
    data = "".join(completion_events(pieces, n)).encode()
    out = [item for event in SseSplitter().feed(data) for item in shaper.feed(event)]
    return out + shaper.flush()


def sizes_of(items: list[Any]) -> list[int]:
    return [sum(len(choice["tokens"]) for choice in item["choices"]) for item in items]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("sizes", "pieces", "expected"), TABLE)
def test_the_table(sizes: tuple[int, int, float], pieces: int, expected: list[int], n: int) -> None:
    """One counter for all sequences: the sizes of items are the same for one and for two of them."""
    items = items_of(pieces, InputSettings(batch=BatchSizes(*sizes)), sampling_params={"n": n})
    assert sizes_of(items) == expected
    assert all(len(item["choices"]) == n for item in items)


@pytest.mark.parametrize("n", [1, 2])
def test_usage_is_cumulative_and_counts_tokens(n: int) -> None:
    items = items_of(10, InputSettings(batch=BatchSizes(4, 4, 1)), sampling_params={"n": n})
    assert [item["usage"]["output"] for item in items] == [4, 8, 10]
    assert [item["usage"]["input"] for item in items] == [5, 5, 5]


def test_sequences_without_news_have_no_tokens() -> None:
    """The first item holds one piece of the first of two sequences."""
    first = items_of(6, InputSettings(), sampling_params={"n": 2})[0]
    assert [choice["tokens"] for choice in first["choices"]] == [["0.0"], []]


def test_a_flush_leaves_the_next_size_as_it_was() -> None:
    """§2.4: what a pause in the stream cuts short does not count as an item of the schedule."""
    request = plan_request({"prompt": "x", "stream": True}, InputSettings(batch=BatchSizes(50, 2, 3)))
    shaper = make_shaper(request)
    events = SseSplitter().feed("".join(completion_events(10, 1)).encode())
    assert not shaper.feed(events[0])
    assert shaper.pending
    assert sizes_of(shaper.flush()) == [1]
    assert not shaper.pending
    assert shaper.flush() == []
    assert not shaper.feed(events[1])
    assert sizes_of(shaper.feed(events[2])) == [2]


def test_the_request_wins_over_the_environment_and_zero_means_the_environment() -> None:
    """§1.2, §2.3."""
    environment = InputSettings.from_environment(
        {
            "DEFAULT_BATCH_SIZE": "8",
            "DEFAULT_MIN_BATCH_SIZE": "2",
            "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": "2",
        }
    )
    assert sizes_of(items_of(20, environment)) == [2, 4, 8, 6]
    assert sizes_of(items_of(20, environment, max_batch_size=4)) == [2, 4, 4, 4, 4, 2]
    assert sizes_of(items_of(20, environment, max_batch_size="4", batch_size_growth_factor=1)) == [4] * 5
    assert sizes_of(items_of(20, environment, min_batch_size=4)) == [4, 8, 8]
    assert sizes_of(items_of(20, environment, batch_size=5)) == [2, 4, 5, 5, 4]
    assert sizes_of(items_of(20, environment, max_batch_size=4, batch_size=5)) == [2, 4, 4, 4, 4, 2]
    zeros = {"max_batch_size": 0, "min_batch_size": None, "batch_size_growth_factor": "0"}
    assert sizes_of(items_of(20, environment, **zeros)) == [2, 4, 8, 6]


def test_the_names_that_the_older_worker_really_read_count_less_than_the_documented_ones() -> None:
    """§2.3, quirk not reproduced."""
    older = {"MIN_BATCH_SIZE": "4", "BATCH_SIZE_GROWTH_FACTOR": "1.5"}
    assert InputSettings.from_environment(older).batch == BatchSizes(50, 4, 1.5)
    both = {**older, "DEFAULT_MIN_BATCH_SIZE": "2", "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": "2.5"}
    assert InputSettings.from_environment(both).batch == BatchSizes(50, 2, 2.5)


@pytest.mark.parametrize(
    "key", ["max_batch_size", "batch_size", "min_batch_size", "batch_size_growth_factor"]
)
@pytest.mark.parametrize("value", [-1, "many", True, [], {}, "nan", "-2"])
def test_bad_sizes_are_refused_by_name(key: str, value: Any) -> None:
    """§1.2: negative or non-numeric is a 400."""
    with pytest.raises(InputError) as caught:
        batch_sizes({key: value}, EVERY_EVENT)
    assert (caught.value.status, caught.value.param) == (400, key)


def test_sizes_beside_an_openai_route() -> None:
    """§1.9, §2.3, §8 A9: the environment's unless the job names its own; named events one by one."""
    chat = {"openai_route": "/v1/chat/completions", "openai_input": {"messages": [], "stream": True}}
    assert plan_request(chat, InputSettings()).batch == BatchSizes(50, 1, 3)
    assert plan_request({**chat, "max_batch_size": 1}, InputSettings()).batch.maximum == 1
    assert plan_request({**chat, "max_batch_size": 1}, InputSettings()).stream_format is StreamFormat.SSE
    messages = {"openai_route": "/v1/messages", "openai_input": {"a": 1, "stream": True}}
    assert plan_request(messages, InputSettings()).batch == EVERY_EVENT
    assert plan_request({**messages, "batch_size": 7}, InputSettings()).batch.maximum == 7
    assert plan_request({"route": "/v1/completions", "body": {"stream": 1}}, InputSettings()).stream is True
