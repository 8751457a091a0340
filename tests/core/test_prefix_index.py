"""What is remembered of prompts: as much as was sent, the latest longest, and no more than is allowed."""

from __future__ import annotations

import zlib
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.prefix_index import BOUNDARIES, Look, PrefixIndex


def prompt(text: str) -> list[int]:
    """Hashes of the beginnings of a text, one for each letter."""
    return [zlib.crc32(text[: length + 1].encode()) for length in range(len(text))]


PROMPTS = st.text("ab", min_size=1, max_size=12).map(prompt)


def test_boundaries_are_close_at_first_and_then_a_quarter_apart() -> None:
    assert BOUNDARIES[:10] == (0, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560)
    assert BOUNDARIES[-5:] == (32768, 40960, 49152, 57344, 65536)
    assert all(low < high <= max(low + 256, low * 1.25) for low, high in pairwise(BOUNDARIES))


def test_a_prompt_is_known_as_far_as_it_agrees_with_what_was_sent() -> None:
    index = PrefixIndex()
    index.note("w", prompt("aabb"))
    index.note("w", prompt("aaab"))
    index.note("other", prompt("b"))
    assert index.look("w", prompt("aabba"))[:2] == (4, 1)
    assert index.look("w", prompt("aaaba"))[:2] == (4, 2)
    assert index.look("w", prompt("aab"))[:2] == (3, 1)
    assert index.look("w", prompt("aa"))[:2] == (2, 2)
    assert index.look("w", prompt("b")) == Look(0, 0, fresh=6, empty=False)
    assert index.look("other", prompt("ba")) == Look(1, 3, fresh=1, empty=False)
    assert index.look("nobody", prompt("a")) == Look(0, 0, fresh=0, empty=True)


def test_a_worker_that_is_forgotten_knows_nothing() -> None:
    index = PrefixIndex()
    index.note("w", prompt("ab"))
    index.forget("w")
    index.forget("w")
    assert index.look("w", prompt("ab")) == Look(0, 0, 0, empty=True)


def test_what_was_new_to_a_worker_counts_for_a_while() -> None:
    """1. Only what it did not know counts. 2. A new worker is not far behind the others, so that it does not
    get everything. 3. Older work fades against newer."""
    index = PrefixIndex()
    index.note("v", range(200))
    index.note("v", range(201))
    index.note("w", range(2000, 2200))
    assert [index.look(worker, [7]).fresh for worker in "vw"] == [201, 273]
    assert index.look("new", [7]).fresh == 73
    index.note("new", [7])
    index.note("w", range(3000, 3300))
    assert [index.look(worker, [7]).fresh for worker in ("v", "w", "new")] == [100, 286, 37]


def test_what_was_not_used_for_longest_goes_first_and_of_a_prompt_its_end() -> None:
    index = PrefixIndex(blocks_max=5)
    index.note("w", prompt("abab"))
    index.note("w", prompt("bbb"))
    assert index.look("w", prompt("abab"))[0] == 2
    assert index.look("w", prompt("bbb"))[0] == 3


@given(st.lists(st.tuples(st.sampled_from("vw"), PROMPTS), max_size=30), PROMPTS)
def test_halving_finds_what_counting_finds(sent: list[tuple[str, list[int]]], asked: list[int]) -> None:
    """Against a model without bounds, and with them against what it may know at most."""
    index, bounded = PrefixIndex(), PrefixIndex(blocks_max=4)
    seen: dict[str, set[int]] = {"v": set(), "w": set()}
    for worker, blocks in sent:
        index.note(worker, blocks)
        bounded.note(worker, blocks)
        seen[worker].update(blocks)
    for worker, blocks in seen.items():
        known = next((n for n, block in enumerate(asked) if block not in blocks), len(asked))
        assert index.look(worker, asked).known == known
        assert bounded.look(worker, asked).known <= min(4, known)
    if sent:
        worker, blocks = sent[-1]
        assert bounded.look(worker, blocks).known == min(4, len(blocks))
