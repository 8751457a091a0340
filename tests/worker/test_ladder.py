"""Which rung is tried, and what is said of those above."""

from __future__ import annotations

import pytest

from pilotlight.domain.worker import Failure, Rung
from pilotlight.worker.ladder import REASON_CHARS_MAX, Ladder


@pytest.mark.parametrize(
    ("replaced", "known", "launcher", "rung", "word"),
    [
        (False, True, True, Rung.LAUNCHABLE, ""),
        (False, True, False, Rung.COLD, "no launcher"),
        (False, False, True, Rung.PLAIN, "no manifest"),
        (True, True, True, Rung.PLAIN, "replaces vLLM"),
    ],
)
def test_the_best_rung_that_can_be_tried(
    *, replaced: bool, known: bool, launcher: bool, rung: Rung, word: str
) -> None:
    ladder = Ladder(replaced=replaced, known=known, launcher=launcher)
    assert ladder.rung is rung
    assert word in ladder.note
    assert bool(ladder.note) == bool(word)


def test_a_user_who_wants_processes_spawned_gets_that() -> None:
    ladder = Ladder(replaced=False, known=True, launcher=True, method="spawn")
    assert (ladder.rung, ladder.note) == (Rung.PLAIN, "VLLM_WORKER_MULTIPROC_METHOD is spawn")
    assert Ladder(replaced=False, known=True, launcher=True, method="fork").rung is Rung.LAUNCHABLE


def test_each_step_down_is_remembered_with_its_reason() -> None:
    ladder = Ladder(replaced=False, known=True, launcher=True)
    ladder.step_down("one")
    assert (ladder.rung, ladder.note) == (Rung.COLD, "one")
    ladder.step_down("two" * REASON_CHARS_MAX)
    assert ladder.rung is Rung.PLAIN
    assert len(ladder.note) == len("one; ") + REASON_CHARS_MAX
    ladder = Ladder(replaced=False, known=True, launcher=True)
    ladder.fall("at once")
    assert (ladder.rung, ladder.note) == (Rung.PLAIN, "at once")


@pytest.mark.parametrize(
    ("kind", "loading", "repeated"),
    [
        ("engine_exited", False, True),
        ("engine_exited", True, True),
        ("missing_module", True, True),
        ("engine_stuck", False, True),
        ("killed", False, True),
        ("killed", True, False),
        ("out_of_memory", True, False),
        ("unknown_architecture", False, False),
        ("start_timeout", False, False),
        ("bad_flag", False, False),
    ],
)
def test_what_may_be_the_rung_s_fault_is_repeated_once_at_the_bottom(
    *, kind: str, loading: bool, repeated: bool
) -> None:
    failure = Failure(kind=kind, cause="x")
    for launcher in (True, False):
        ladder = Ladder(replaced=False, known=True, launcher=launcher)
        assert ladder.may_repeat(failure, loading=loading) is repeated
        ladder.fall("it failed")
        assert not ladder.may_repeat(failure, loading=loading)
