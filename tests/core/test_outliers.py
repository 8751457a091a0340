"""Which workers are passed over for a while, and that there is always somebody left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.outliers import (
    FAILURES_MAX,
    PAUSE_MS,
    PAUSE_MS_MAX,
    PROBE_MS,
    SAMPLES_MIN,
    SLOW_MS,
    Judgement,
    Reason,
    WorkerHealth,
    judge,
)


class Fleet:
    """Workers, told what happened to them."""

    def __init__(self, count: int) -> None:
        self.health = {f"w{number}": WorkerHealth() for number in range(count)}
        self.now = 1_000

    def ended(
        self, worker: str, *, failed: bool = False, first_byte_ms: int | None = 50, slow: bool = False
    ) -> Judgement:
        judgement = judge(
            worker, self.health, failed=failed, first_byte_ms=first_byte_ms, slow=slow, now_ms=self.now
        )
        self.health[worker] = judgement.health
        return judgement

    def fail(self, worker: str, times: int = FAILURES_MAX) -> Judgement:
        for _ in range(times - 1):
            assert self.ended(worker, failed=True, first_byte_ms=None).pause_ms == 0
        return self.ended(worker, failed=True, first_byte_ms=None)

    def serve(self, times: int, *, first_byte_ms: int = 50) -> None:
        for _ in range(times):
            for worker in self.health:
                self.ended(worker, first_byte_ms=first_byte_ms)

    def takes(self, worker: str) -> bool:
        return self.health[worker].takes_from_ms <= self.now


def test_failures_in_a_row_suspend_a_worker_and_one_that_is_between_them_does_not() -> None:
    fleet = Fleet(2)
    fleet.fail("w0", FAILURES_MAX - 1)
    fleet.ended("w0")
    judgement = fleet.fail("w0")
    assert (judgement.reason, judgement.pause_ms) == (Reason.FAILURES, PAUSE_MS)
    assert not fleet.takes("w0")
    assert fleet.takes("w1")


def test_afterwards_one_request_decides() -> None:
    """1. One is let through, others are not. 2. It fails: twice the pause. 3. The next is served: all again."""
    fleet = Fleet(2)
    pause_ms = fleet.fail("w0").pause_ms
    fleet.now += pause_ms
    assert fleet.takes("w0")
    fleet.health["w0"] = fleet.health["w0"].probed(fleet.now)
    assert not fleet.takes("w0")
    judgement = fleet.ended("w0", failed=True, first_byte_ms=None)
    assert (judgement.reason, judgement.pause_ms) == (Reason.PROBE_FAILED, 2 * PAUSE_MS)
    fleet.now += judgement.pause_ms
    fleet.health["w0"] = fleet.health["w0"].probed(fleet.now)
    assert fleet.ended("w0").reason is Reason.WELL
    assert fleet.health["w0"].until_ms == 0
    assert fleet.health["w0"].probed(fleet.now) == fleet.health["w0"]


def test_a_long_answer_does_not_keep_a_worker_on_probation_from_others() -> None:
    fleet = Fleet(2)
    fleet.now += fleet.fail("w0").pause_ms
    fleet.health["w0"] = fleet.health["w0"].probed(fleet.now)
    fleet.now += PROBE_MS
    assert fleet.takes("w0")


def test_pauses_double_up_to_a_bound_and_are_forgotten_by_service() -> None:
    fleet, pauses = Fleet(2), []
    for _ in range(7):
        pauses.append(fleet.fail("w0", 1 if pauses else FAILURES_MAX).pause_ms)
        fleet.now += pauses[-1]
    assert pauses == [2_000, 4_000, 8_000, 16_000, 32_000, PAUSE_MS_MAX, PAUSE_MS_MAX]
    for _ in range(SAMPLES_MIN):
        fleet.ended("w0")
    assert fleet.fail("w0").pause_ms == PAUSE_MS


def test_what_was_sent_before_a_suspension_tells_nothing_new() -> None:
    fleet = Fleet(2)
    fleet.fail("w0")
    before = fleet.health["w0"]
    assert fleet.ended("w0", failed=True).pause_ms == 0
    assert fleet.ended("w0").health == before


def test_the_only_worker_and_more_than_half_of_them_are_never_suspended() -> None:
    assert Fleet(1).fail("w0", 50).reason is Reason.TOO_FEW_LEFT
    fleet = Fleet(3)
    assert fleet.fail("w0").pause_ms
    assert fleet.fail("w1").reason is Reason.TOO_FEW_LEFT
    fleet.now += PAUSE_MS
    assert fleet.ended("w1", failed=True).reason is Reason.TOO_FEW_LEFT, (
        "w0 is on probation, which is not back"
    )
    fleet.ended("w0")
    assert fleet.ended("w1", failed=True).pause_ms


def test_errors_that_others_do_not_have_suspend_a_worker() -> None:
    fleet = Fleet(3)
    fleet.serve(SAMPLES_MIN)
    last = [fleet.ended("w0", failed=number % 5 > 0) for number in range(60)]
    assert next(it.reason for it in last if it.pause_ms) is Reason.ERROR_RATE


def test_errors_that_all_of_them_have_suspend_nobody() -> None:
    fleet = Fleet(3)
    for number in range(100):
        for worker in fleet.health:
            assert fleet.ended(worker, failed=number % 5 > 0).pause_ms == 0


def test_a_worker_far_slower_than_the_others_is_suspended() -> None:
    fleet = Fleet(3)
    fleet.serve(SAMPLES_MIN)
    judgements = [fleet.ended("w0", first_byte_ms=SLOW_MS * 5, slow=True) for _ in range(20)]
    assert next(it.reason for it in judgements if it.pause_ms) is Reason.SLOW


def test_slow_for_a_good_reason_is_not_slow() -> None:
    fleet = Fleet(2)
    fleet.serve(SAMPLES_MIN)
    assert not any(fleet.ended("w0", first_byte_ms=SLOW_MS * 9).pause_ms for _ in range(99))
    crowd = Fleet(2)
    crowd.serve(SAMPLES_MIN, first_byte_ms=SLOW_MS * 3)
    assert not any(crowd.ended("w0", first_byte_ms=SLOW_MS * 5, slow=True).pause_ms for _ in range(99))
    new = Fleet(2)
    assert not any(new.ended("w0", first_byte_ms=SLOW_MS * 9, slow=True).pause_ms for _ in range(99)), (
        "there is nobody to compare it with"
    )


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 4_000)), max_size=250),
)
def test_most_workers_are_in_use_whatever_happens(count: int, events: list[tuple[int, int, int]]) -> None:
    """And whoever is suspended comes back: there is no state without an end."""
    fleet = Fleet(count)
    for number, kind, wait_ms in events:
        worker = f"w{number % count}"
        fleet.now += wait_ms // 10
        if fleet.takes(worker):
            fleet.health[worker] = fleet.health[worker].probed(fleet.now)
        judgement = fleet.ended(worker, failed=kind == 1, first_byte_ms=wait_ms, slow=kind == 2)
        assert bool(judgement.pause_ms) == (judgement.reason not in {Reason.WELL, Reason.TOO_FEW_LEFT})
        assert sum(it.until_ms != 0 for it in fleet.health.values()) <= count // 2
    fleet.now += PAUSE_MS_MAX + PROBE_MS
    assert all(fleet.takes(worker) for worker in fleet.health)
