"""The life of a job (serverless-api.md §2.10): every event in every status, leases, retries, the story."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pilotlight.core import lifecycle
from pilotlight.core.lifecycle import (
    EXECUTION_TIMEOUT_ERROR,
    JOB_TRANSITIONS,
    STREAM_BEGUN,
    TTL_ERROR,
    Applied,
    Cancelled,
    Confirmed,
    Effect,
    ExecutionTimedOut,
    InvalidTransitionError,
    JobEvent,
    PlatformInterrupted,
    Progressed,
    ResultPosted,
    Retried,
    Taken,
    TtlReached,
    WorkerLost,
    apply,
    transition_table,
    ttl_window_ms,
)
from pilotlight.domain.job import ATTEMPTS_KEPT, WIPED, Attempt, Job, JobStatus

QUEUED, RUNNING = JobStatus.IN_QUEUE, JobStatus.IN_PROGRESS
COMPLETED, FAILED = JobStatus.COMPLETED, JobStatus.FAILED
CANCELLED, TIMED_OUT = JobStatus.CANCELLED, JobStatus.TIMED_OUT
TERMINAL = (COMPLETED, FAILED, CANCELLED, TIMED_OUT)

# Written down a second time, from the contract: what is not here changes nothing.
EXPECTED: dict[tuple[JobStatus, type], set[JobStatus]] = {
    (QUEUED, Taken): {RUNNING},
    (QUEUED, Cancelled): {CANCELLED},
    (QUEUED, TtlReached): {TIMED_OUT},
    (RUNNING, Confirmed): {RUNNING},
    (RUNNING, Progressed): {RUNNING},
    (RUNNING, ResultPosted): {COMPLETED, FAILED, QUEUED},
    (RUNNING, WorkerLost): {QUEUED, FAILED},
    (RUNNING, PlatformInterrupted): {QUEUED},
    (RUNNING, Cancelled): {CANCELLED},
    (RUNNING, ExecutionTimedOut): {FAILED},
    (RUNNING, TtlReached): {TIMED_OUT},
    (FAILED, Retried): {QUEUED},
    (TIMED_OUT, Retried): {QUEUED},
}

Make = Callable[[int], JobEvent]
NOW = 5_000
EVENTS: dict[type, list[Make]] = {
    Taken: [lambda now: Taken(worker_id="w1", now_ms=now)],
    Confirmed: [lambda now: Confirmed(worker_id="w1", now_ms=now)],
    Progressed: [lambda now: Progressed(worker_id="w1", now_ms=now, output=b"42")],
    ResultPosted: [
        lambda now: ResultPosted(worker_id="w1", now_ms=now, output=b"1"),
        lambda now: ResultPosted(worker_id="w1", now_ms=now),
        lambda now: ResultPosted(worker_id="w1", now_ms=now, error="no", output=b"{}"),
        lambda now: ResultPosted(worker_id="w1", now_ms=now, error="died", retryable=True),
    ],
    WorkerLost: [lambda now: WorkerLost(worker_id="w1", now_ms=now, reason="gone")],
    PlatformInterrupted: [lambda now: PlatformInterrupted(now_ms=now)],
    Cancelled: [lambda now: Cancelled(now_ms=now)],
    ExecutionTimedOut: [lambda now: ExecutionTimedOut(now_ms=now)],
    TtlReached: [lambda now: TtlReached(now_ms=now)],
    Retried: [lambda now: Retried(now_ms=now, expires_ms=now + 1_000)],
}
OF_A_WORKER = (Confirmed, Progressed, ResultPosted, WorkerLost)
OF_AN_ATTEMPT = (*OF_A_WORKER, PlatformInterrupted, ExecutionTimedOut)


def job_in(status: JobStatus, **changes: object) -> Job:
    """A job that has come to a status the usual way, at 1,000 queued, 2,000 taken by w1, 3,000 ended."""
    job = Job(
        id="a",
        endpoint_id="e",
        created_ms=1_000,
        queued_ms=1_000,
        expires_ms=90_000,
        execution_timeout_ms=600,
        retention_ms=60,
    )
    if status is not QUEUED:
        job = replace(job, status=status, attempt=1, worker_id="w1", started_ms=2_000)
    if status.terminal:
        job = replace(job, finished_ms=3_000)
    return replace(job, **changes)


def variants(status: JobStatus) -> Iterator[Job]:
    """Jobs in a status that differ in everything a decision may look at."""
    for retries, maximum, read, confirmed in itertools.product(
        (0, 1), (0, 1, 2), (False, True), (None, 2_500)
    ):
        yield job_in(
            status,
            retries=min(retries, maximum),
            retries_max=maximum,
            chunk_read=read,
            confirmed_ms=confirmed,
        )


def running(**changes: object) -> Job:
    return job_in(RUNNING, **changes)


def chain(job: Job, *events: JobEvent) -> Applied:
    """Apply several events that all count; the answer to the last one."""
    applied = None
    for event in events:
        applied = apply(job, event)
        assert applied.changed, event
        job = applied.after
    assert applied is not None
    return applied


class TestTable:
    def test_it_says_what_the_contract_says(self) -> None:
        assert {pair: set(targets) for pair, targets in JOB_TRANSITIONS.items()} == EXPECTED

    @pytest.mark.parametrize("event", EVENTS)
    @pytest.mark.parametrize("status", JobStatus)
    def test_exactly_these_statuses_follow(self, status: JobStatus, event: type) -> None:
        """Over every variant of job and event each status of the table is reached, and no other one."""
        reached = set()
        for job, make in itertools.product(variants(status), EVENTS[event]):
            applied = apply(job, make(NOW))
            assert applied.before is job
            if applied.changed:
                reached.add(applied.after.status)
            else:
                assert applied.after is job
        assert reached == EXPECTED.get((status, event), set())

    @pytest.mark.parametrize("event", EVENTS)
    @pytest.mark.parametrize("status", JobStatus)
    def test_what_has_no_entry_changes_nothing_and_says_why(self, status: JobStatus, event: type) -> None:
        if (status, event) in EXPECTED:
            return
        expected = Effect.IGNORED_TERMINAL if status in TERMINAL else Effect.IGNORED_STATE
        for make in EVENTS[event]:
            applied = apply(job_in(status), make(NOW))
            assert applied.effect is expected
            assert applied.after is applied.before
            assert not applied.finished
            assert not applied.requeued
            assert applied.freed_worker_id is None

    def test_every_event_is_covered_here(self) -> None:
        assert set(EVENTS) == set(JobEvent.__args__)

    @pytest.mark.parametrize("status", [COMPLETED, CANCELLED])
    def test_completed_and_cancelled_are_terminal_for_good(self, status: JobStatus) -> None:
        assert not [pair for pair in JOB_TRANSITIONS if pair[0] is status]

    def test_a_rule_that_leads_elsewhere_is_a_programmers_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            lifecycle, "JOB_TRANSITIONS", {(RUNNING, Cancelled): frozenset({JobStatus.COMPLETED})}
        )
        with pytest.raises(InvalidTransitionError, match="job a: IN_PROGRESS -> CANCELLED by Cancelled"):
            apply(running(), Cancelled(now_ms=NOW))

    def test_it_cannot_be_changed_at_run_time(self) -> None:
        with pytest.raises(TypeError):
            JOB_TRANSITIONS[COMPLETED, Cancelled] = frozenset({CANCELLED})  # type: ignore[index]

    def test_it_prints_one_row_per_status_and_event(self) -> None:
        rows = transition_table().splitlines()
        assert rows[:2] == ["| from | event | to |", "|---|---|---|"]
        assert len(rows) == 2 + len(EXPECTED)
        assert "| IN_PROGRESS | ResultPosted | COMPLETED, FAILED, IN_QUEUE |" in rows

    def test_the_docs_show_it(self) -> None:
        page = Path(__file__).parents[2] / "docs" / "reference" / "job-states.md"
        assert transition_table() in page.read_text(encoding="utf-8"), "run tools/reference.py"


class TestLease:
    """The token of a hand-out is (worker, attempt); worker-protocol.md §1 rule 20."""

    @pytest.mark.parametrize("event", OF_A_WORKER)
    def test_another_workers_event_is_refused(self, event: type) -> None:
        for make in EVENTS[event]:
            applied = apply(running(), replace(make(NOW), worker_id="w2"))
            assert (applied.effect, applied.after) == (Effect.IGNORED_OTHER_ATTEMPT, applied.before)

    @pytest.mark.parametrize("attempt", [0, 1, 3])
    @pytest.mark.parametrize("event", OF_AN_ATTEMPT)
    def test_an_event_of_another_attempt_is_refused(self, event: type, attempt: int) -> None:
        for make in EVENTS[event]:
            applied = apply(running(attempt=2), replace(make(NOW), attempt=attempt))
            assert (applied.effect, applied.after) == (Effect.IGNORED_OTHER_ATTEMPT, applied.before)

    @pytest.mark.parametrize("attempt", [2, None])
    @pytest.mark.parametrize("event", OF_AN_ATTEMPT)
    def test_an_event_of_the_attempt_or_of_no_named_one_counts(
        self, event: type, attempt: int | None
    ) -> None:
        for make in EVENTS[event]:
            assert apply(running(attempt=2), replace(make(NOW), attempt=attempt)).changed

    def test_an_interruption_may_name_its_worker(self) -> None:
        event = PlatformInterrupted(now_ms=NOW, worker_id="w2")
        assert apply(running(), event).effect is Effect.IGNORED_OTHER_ATTEMPT
        assert apply(running(), replace(event, worker_id="w1")).requeued

    def test_the_same_worker_with_the_same_job_again_is_another_attempt(self) -> None:
        """A result of the first hand-out reaches the gateway after the second one to the same worker."""
        again = chain(
            running(),
            WorkerLost(worker_id="w1", now_ms=3_000, reason="silent"),
            Taken(worker_id="w1", now_ms=3_500),
        ).after
        late = ResultPosted(worker_id="w1", now_ms=4_000, output=b"1", attempt=1)
        assert apply(again, late).effect is Effect.IGNORED_OTHER_ATTEMPT
        assert apply(again, replace(late, attempt=2)).after.status is COMPLETED

    @pytest.mark.parametrize("event", [Cancelled(now_ms=NOW), TtlReached(now_ms=NOW)])
    def test_a_client_and_the_clock_need_no_token(self, event: JobEvent) -> None:
        assert apply(running(attempt=7, worker_id="w9"), event).finished


class TestTake:
    def test_an_attempt_begins_fresh(self) -> None:
        job = job_in(QUEUED, output=b"old", error="old", first_output_ms=1, confirmed_ms=1)
        after = apply(job, Taken(worker_id="w1", now_ms=2_000)).after
        assert after == replace(
            job,
            status=RUNNING,
            attempt=1,
            worker_id="w1",
            started_ms=2_000,
            output=None,
            error=None,
            first_output_ms=None,
            confirmed_ms=None,
        )
        assert after.delay_ms == 1_000

    def test_a_second_take_is_ignored(self) -> None:
        assert apply(running(), Taken(worker_id="w2", now_ms=NOW)).effect is Effect.IGNORED_STATE


class TestWhileRunning:
    def test_only_the_first_confirmation_counts(self) -> None:
        """The reaper measures silence from hand-out to the first sign (worker-protocol.md §5)."""
        confirmed = apply(running(), Confirmed(worker_id="w1", now_ms=2_100))
        assert confirmed.after.confirmed_ms == 2_100
        second = apply(confirmed.after, Confirmed(worker_id="w1", now_ms=2_200))
        assert (second.effect, second.after) == (Effect.IGNORED_STATE, confirmed.after)

    def test_progress_replaces_progress_and_confirms(self) -> None:
        first = apply(running(), Progressed(worker_id="w1", now_ms=2_100, output=b"1")).after
        second = apply(first, Progressed(worker_id="w1", now_ms=2_200, output=b"2")).after
        assert (second.output, second.confirmed_ms, second.status) == (b"2", 2_100, RUNNING)

    @pytest.mark.parametrize("status", TERMINAL)
    def test_progress_after_the_end_is_ignored(self, status: JobStatus) -> None:
        """worker-protocol.md §1 rule 16, serverless-api.md §2.10: it must not overwrite a terminal job."""
        job = job_in(status, output=b"final")
        applied = apply(job, Progressed(worker_id="w1", now_ms=NOW, output=b"99 %"))
        assert (applied.effect, applied.after) == (Effect.IGNORED_TERMINAL, job)

    def test_progress_is_gone_from_a_job_that_fails_or_is_cancelled(self) -> None:
        job = running(output=b"50")
        for event in (Cancelled(now_ms=NOW), ExecutionTimedOut(now_ms=NOW), TtlReached(now_ms=NOW)):
            assert apply(job, event).after.output is None


class TestResult:
    def test_output_means_completed(self) -> None:
        applied = apply(running(), ResultPosted(worker_id="w1", now_ms=NOW, output=b"[1]"))
        after = applied.after
        assert (after.status, after.output, after.error, after.finished_ms) == (COMPLETED, b"[1]", None, NOW)
        assert after.execution_ms == 3_000
        assert applied.finished
        assert applied.freed_worker_id == "w1"

    def test_no_output_means_completed_too(self) -> None:
        """serverless-api.md §2.9: an empty result is dropped by the worker SDK."""
        after = apply(running(), ResultPosted(worker_id="w1", now_ms=NOW)).after
        assert (after.status, after.output) == (COMPLETED, None)

    def test_an_error_and_an_output_may_coexist(self) -> None:
        event = ResultPosted(worker_id="w1", now_ms=NOW, error="bad", output=b'{"partial":1}')
        after = apply(running(), event).after
        assert (after.status, after.error, after.output) == (FAILED, "bad", b'{"partial":1}')

    def test_an_empty_error_is_an_error(self) -> None:
        assert apply(running(), ResultPosted(worker_id="w1", now_ms=NOW, error="")).after.status is FAILED

    @pytest.mark.parametrize("first", EVENTS[ResultPosted])
    @pytest.mark.parametrize("second", EVENTS[ResultPosted])
    def test_a_second_result_changes_nothing(self, first: Make, second: Make) -> None:
        ended = apply(running(retries_max=0), first(3_000)).after
        assert ended.status.terminal
        late = apply(ended, second(4_000))
        assert (late.effect, late.after) == (Effect.IGNORED_TERMINAL, ended)

    def test_a_result_after_the_cancel_changes_nothing(self) -> None:
        cancelled = apply(running(), Cancelled(now_ms=3_000)).after
        late = apply(cancelled, ResultPosted(worker_id="w1", now_ms=3_001, output=b"1"))
        assert (late.effect, late.after.output) == (Effect.IGNORED_TERMINAL, None)

    def test_a_result_after_the_loss_changes_nothing(self) -> None:
        lost = apply(running(), WorkerLost(worker_id="w1", now_ms=3_000, reason="silent")).after
        late = apply(lost, ResultPosted(worker_id="w1", now_ms=3_001, output=b"1"))
        assert (late.effect, late.after) == (Effect.IGNORED_STATE, lost)


class TestRetries:
    @pytest.mark.parametrize("maximum", range(6))
    def test_so_many_losses_are_forgiven(self, maximum: int) -> None:
        """serverless-api.md §2.10: queued again with `retries` + 1, then FAILED with the text clients match on."""
        job = running(retries_max=maximum)
        for number in range(1, maximum + 1):
            applied = apply(job, WorkerLost(worker_id="w1", now_ms=3_000 + number, reason="gone"))
            assert applied.requeued
            assert applied.freed_worker_id == "w1"
            assert (applied.after.retries, applied.after.queued_ms) == (number, 3_000 + number)
            job = apply(applied.after, Taken(worker_id="w1", now_ms=4_000)).after
        end = apply(job, WorkerLost(worker_id="w1", now_ms=NOW, reason="gone"))
        assert end.finished
        assert (end.after.status, end.after.error) == (FAILED, f"job timed out after {maximum} retries")
        assert end.after.retries == maximum

    @pytest.mark.parametrize("maximum", range(6))
    def test_so_many_retryable_errors_are_forgiven(self, maximum: int) -> None:
        job = running(retries_max=maximum)
        error = ResultPosted(worker_id="w1", now_ms=3_000, error="engine died", retryable=True, output=b"1")
        for _ in range(maximum):
            requeued = apply(job, error)
            assert requeued.requeued
            assert requeued.after.output is None
            job = apply(requeued.after, Taken(worker_id="w1", now_ms=4_000)).after
        end = apply(job, error).after
        assert (end.status, end.error, end.output, end.retries) == (FAILED, "engine died", b"1", maximum)

    def test_losses_and_retryable_errors_share_the_count(self) -> None:
        job = chain(
            running(retries_max=1),
            ResultPosted(worker_id="w1", now_ms=3_000, error="died", retryable=True),
            Taken(worker_id="w2", now_ms=3_100),
        ).after
        assert apply(job, WorkerLost(worker_id="w2", now_ms=NOW, reason="gone")).after.status is FAILED

    def test_a_requeued_job_has_no_trace_of_the_attempt_but_its_story(self) -> None:
        job = running(output=b"progress", confirmed_ms=2_100, first_output_ms=2_200, s3_config=b"sealed")
        after = apply(job, WorkerLost(worker_id="w1", now_ms=3_000, reason="gone")).after
        assert (after.worker_id, after.started_ms, after.confirmed_ms, after.first_output_ms) == (None,) * 4
        assert (after.output, after.error, after.finished_ms, after.s3_config) == (
            None,
            None,
            None,
            b"sealed",
        )
        assert after.delay_ms is None

    @pytest.mark.parametrize("maximum", range(6))
    def test_a_job_whose_stream_was_read_is_lost_as_often_as_any(self, maximum: int) -> None:
        """serverless-api.md §2.10, worker-protocol.md §7.2: the stream of the new attempt begins anew."""
        job = running(retries_max=maximum)
        for number in range(1, maximum + 1):
            lost = WorkerLost(worker_id="w1", now_ms=3_000, reason="worker died")
            applied = apply(replace(job, chunk_read=True), lost)
            assert applied.requeued
            assert (applied.after.retries, applied.after.chunk_read) == (number, False)
            job = apply(applied.after, Taken(worker_id="w1", now_ms=4_000)).after
        end = apply(
            replace(job, chunk_read=True), WorkerLost(worker_id="w1", now_ms=NOW, reason="gone")
        ).after
        assert (end.status, end.error) == (FAILED, f"job timed out after {maximum} retries")

    @pytest.mark.parametrize("event", [event for event in EVENTS[ResultPosted] if event(0).retryable])
    def test_a_retryable_error_after_a_chunk_was_read_is_forgiven_too(self, event: Make) -> None:
        """vllm-worker.md §3.7."""
        after = apply(running(chunk_read=True, retries_max=1), event(NOW)).after
        assert (after.status, after.retries, after.chunk_read) == (QUEUED, 1, False)

    @pytest.mark.parametrize("read", [False, True])
    @pytest.mark.parametrize("maximum", range(6))
    def test_an_interruption_by_us_uses_up_no_retry(self, maximum: int, read: bool) -> None:
        """serverless-api.md §13 item 8: a restart of the gateway ends no job, whatever of it was read."""
        job = running(retries_max=maximum, retries=maximum)
        for _ in range(8):
            interrupted = apply(replace(job, chunk_read=read), PlatformInterrupted(now_ms=3_000))
            assert interrupted.requeued
            assert (interrupted.after.retries, interrupted.after.chunk_read) == (maximum, False)
            job = apply(interrupted.after, Taken(worker_id="w1", now_ms=4_000)).after


class TestTimeouts:
    def test_running_too_long(self) -> None:
        applied = apply(running(retries_max=5), ExecutionTimedOut(now_ms=NOW))
        assert (applied.after.status, applied.after.error) == (FAILED, "executionTimeout exceeded")
        assert EXECUTION_TIMEOUT_ERROR == "executionTimeout exceeded"
        assert applied.freed_worker_id == "w1"

    @pytest.mark.parametrize("status", [QUEUED, RUNNING])
    def test_living_too_long(self, status: JobStatus) -> None:
        applied = apply(job_in(status), TtlReached(now_ms=NOW))
        assert (applied.after.status, applied.after.error) == (TIMED_OUT, TTL_ERROR)
        assert applied.freed_worker_id == ("w1" if status is RUNNING else None)
        assert (applied.after.execution_ms is None) == (status is QUEUED)

    def test_the_timeout_of_an_attempt_that_is_over_is_refused(self) -> None:
        """The clock looked before the job was lost and handed out again."""
        job = running(attempt=2)
        assert apply(job, ExecutionTimedOut(now_ms=NOW, attempt=1)).effect is Effect.IGNORED_OTHER_ATTEMPT


class TestCancel:
    @pytest.mark.parametrize("status", [QUEUED, RUNNING])
    def test_a_living_job_ends(self, status: JobStatus) -> None:
        applied = apply(job_in(status), Cancelled(now_ms=NOW))
        assert (applied.after.status, applied.after.error, applied.after.finished_ms) == (
            CANCELLED,
            None,
            NOW,
        )

    @pytest.mark.parametrize("status", TERMINAL)
    def test_an_ended_one_keeps_its_status(self, status: JobStatus) -> None:
        """serverless-api.md §2.15: cancelling twice is no error."""
        assert apply(job_in(status), Cancelled(now_ms=NOW)).after.status is status

    def test_nobody_can_take_it_any_more(self) -> None:
        cancelled = apply(job_in(QUEUED), Cancelled(now_ms=NOW)).after
        assert apply(cancelled, Taken(worker_id="w1", now_ms=NOW)).effect is Effect.IGNORED_TERMINAL


class TestRetriedByTheClient:
    """serverless-api.md §2.15, `/retry`."""

    @pytest.mark.parametrize("status", [FAILED, TIMED_OUT])
    def test_same_id_new_time_to_live_nothing_left_of_the_end(self, status: JobStatus) -> None:
        job = job_in(status, error="bad", output=b"1", retries=1, chunk_read=True, input=b"{}")
        applied = apply(job, Retried(now_ms=NOW, expires_ms=99_000))
        after = applied.after
        assert applied.requeued
        assert applied.freed_worker_id is None
        assert (after.id, after.input, after.created_ms) == (job.id, job.input, job.created_ms)
        assert (after.status, after.queued_ms, after.expires_ms) == (QUEUED, NOW, 99_000)
        assert (after.output, after.error, after.finished_ms) == (None, None, None)
        assert (after.retries, after.chunk_read, after.attempt) == (0, False, 1)

    @pytest.mark.parametrize("status", [QUEUED, RUNNING, COMPLETED, CANCELLED])
    def test_from_nowhere_else(self, status: JobStatus) -> None:
        assert not apply(job_in(status), Retried(now_ms=NOW, expires_ms=99_000)).changed

    def test_twice_is_once(self) -> None:
        event = Retried(now_ms=NOW, expires_ms=99_000)
        first = apply(job_in(FAILED), event).after
        assert apply(first, event).effect is Effect.IGNORED_STATE

    def test_the_story_keeps_the_attempt_that_failed_with_its_own_end(self) -> None:
        job = job_in(FAILED, error="bad")
        [attempt] = apply(job, Retried(now_ms=NOW, expires_ms=99_000)).after.attempts
        assert (attempt.number, attempt.worker_id, attempt.ended_ms) == (1, "w1", 3_000)
        assert attempt.reason == "retried after FAILED: bad"

    def test_a_late_result_of_the_failed_attempt_changes_nothing(self) -> None:
        job = chain(
            job_in(FAILED), Retried(now_ms=NOW, expires_ms=99_000), Taken(worker_id="w1", now_ms=NOW)
        ).after
        late = ResultPosted(worker_id="w1", now_ms=NOW + 1, output=b"old", attempt=1)
        assert apply(job, late).effect is Effect.IGNORED_OTHER_ATTEMPT

    def test_it_may_be_lost_as_often_as_a_new_one(self) -> None:
        job = chain(
            job_in(FAILED, retries=1, retries_max=1),
            Retried(now_ms=NOW, expires_ms=99_000),
            Taken(worker_id="w1", now_ms=NOW),
        ).after
        assert apply(job, WorkerLost(worker_id="w1", now_ms=NOW, reason="gone")).requeued

    def test_without_its_s3_config_it_cannot_run(self) -> None:
        job = job_in(FAILED, s3_config=WIPED)
        applied = apply(job, Retried(now_ms=NOW, expires_ms=99_000))
        assert (applied.effect, applied.after) == (Effect.IGNORED_WIPED, job)


class TestTimeToLive:
    """How long a job had to live, which a retry by its client gives it again (serverless-api.md §2.10)."""

    def test_of_a_new_job(self) -> None:
        assert ttl_window_ms(job_in(QUEUED, created_ms=1_000, queued_ms=1_000, expires_ms=21_000)) == 20_000

    @pytest.mark.parametrize(
        "loss",
        [
            WorkerLost(worker_id="w1", now_ms=4_000, reason="gone"),
            PlatformInterrupted(now_ms=4_000),
            ResultPosted(worker_id="w1", now_ms=4_000, error="died", retryable=True),
        ],
    )
    def test_a_lost_attempt_changes_nothing(self, loss: JobEvent) -> None:
        job = running(created_ms=1_000, queued_ms=1_000, expires_ms=21_000)
        assert ttl_window_ms(chain(job, loss).after) == 20_000
        assert ttl_window_ms(chain(job, loss, Taken(worker_id="w2", now_ms=5_000)).after) == 20_000

    @pytest.mark.parametrize("lost", [False, True])
    def test_the_same_after_every_retry(self, lost: bool) -> None:
        """Counted from the retry, not from the submission or from what was queued again in between."""
        job, now = job_in(QUEUED, created_ms=1_000, queued_ms=1_000, expires_ms=21_000), 1_000
        for _ in range(ATTEMPTS_KEPT + 5):
            events: list[JobEvent] = [Taken(worker_id="w1", now_ms=now + 1_000)]
            if lost:
                events += [
                    WorkerLost(worker_id="w1", now_ms=now + 2_000, reason="gone"),
                    Taken(worker_id="w1", now_ms=now + 3_000),
                ]
            events.append(ResultPosted(worker_id="w1", now_ms=now + 4_000, error="no"))
            failed = chain(job, *events).after
            assert ttl_window_ms(failed) == 20_000
            now += 10_000
            job = apply(failed, Retried(now_ms=now, expires_ms=now + ttl_window_ms(failed))).after
            assert (ttl_window_ms(job), job.expires_ms - job.queued_ms) == (20_000, 20_000)

    @pytest.mark.parametrize("interruptions", [1, ATTEMPTS_KEPT - 1, ATTEMPTS_KEPT, 2 * ATTEMPTS_KEPT])
    def test_however_often_it_was_interrupted_after_the_retry(self, interruptions: int) -> None:
        """The story forgets its oldest attempts; how long the job had must not be forgotten with them."""
        job = job_in(FAILED, created_ms=1_000, queued_ms=1_000, expires_ms=21_000)
        job = apply(job, Retried(now_ms=1_000_000, expires_ms=1_020_000)).after
        for number in range(interruptions):
            now = 1_000_100 + number
            job = chain(job, Taken(worker_id="w1", now_ms=now), PlatformInterrupted(now_ms=now)).after
        assert ttl_window_ms(job) == 20_000

    def test_of_a_job_that_ended_in_the_queue(self) -> None:
        job = job_in(QUEUED, created_ms=1_000, queued_ms=1_000, expires_ms=21_000)
        for now in (21_000, 50_000, 90_000):
            ended = apply(job, TtlReached(now_ms=now)).after
            assert ttl_window_ms(ended) == 20_000
            job = apply(ended, Retried(now_ms=now + 5_000, expires_ms=now + 25_000)).after


class TestS3Config:
    @pytest.mark.parametrize("status", [QUEUED, RUNNING])
    def test_every_terminal_state_wipes_it(self, status: JobStatus) -> None:
        job = job_in(status, s3_config=b"sealed", retries_max=0)
        ends = 0
        for makes in EVENTS.values():
            for make in makes:
                applied = apply(job, make(NOW))
                if applied.finished:
                    ends += 1
                    assert applied.after.s3_config == WIPED
                else:
                    assert applied.after.s3_config == b"sealed"
        assert ends >= 2

    def test_a_job_that_had_none_stays_without(self) -> None:
        assert apply(running(), Cancelled(now_ms=NOW)).after.s3_config is None


class TestStory:
    def test_an_ended_attempt_is_told_in_full(self) -> None:
        job = running(confirmed_ms=2_100, first_output_ms=2_200)
        after = apply(job, WorkerLost(worker_id="w1", now_ms=3_000, reason="no heartbeat for 30 s")).after
        assert after.attempts == (
            Attempt(
                number=1,
                worker_id="w1",
                queued_ms=1_000,
                started_ms=2_000,
                confirmed_ms=2_100,
                first_output_ms=2_200,
                ended_ms=3_000,
                reason="no heartbeat for 30 s",
            ),
        )

    @pytest.mark.parametrize(
        ("read", "reason", "told"),
        [
            (False, "gone", "gone"),
            (True, "gone", f"gone{STREAM_BEGUN}"),
            (True, "x" * 10_000, "x" * 500 + STREAM_BEGUN),
        ],
    )
    @pytest.mark.parametrize("event", [WorkerLost, PlatformInterrupted])
    def test_an_attempt_says_when_its_stream_had_begun(
        self, event: type, read: bool, reason: str, told: str
    ) -> None:
        """worker-protocol.md §7.2: the break between two attempts is marked."""
        interrupted = event(worker_id="w1", now_ms=3_000, reason=reason)
        [attempt] = apply(running(chunk_read=read), interrupted).after.attempts
        assert attempt.reason == told

    def test_a_job_that_ends_keeps_the_attempts_before(self) -> None:
        job = chain(
            running(),
            WorkerLost(worker_id="w1", now_ms=3_000, reason="gone"),
            Taken(worker_id="w2", now_ms=3_100),
            WorkerLost(worker_id="w2", now_ms=3_200, reason="gone too"),
        ).after
        assert job.status is FAILED
        assert [each.reason for each in job.attempts] == ["gone"]
        assert (job.worker_id, job.started_ms, job.finished_ms) == ("w2", 3_100, 3_200)

    def test_it_is_bounded_in_number_and_length(self) -> None:
        job = running()
        for number in range(2 * ATTEMPTS_KEPT):
            reason = f"{number:03d} " + "x" * 10_000
            job = chain(
                job,
                PlatformInterrupted(now_ms=3_000, reason=reason),
                Taken(worker_id="w1", now_ms=3_000),
            ).after
        assert len(job.attempts) == ATTEMPTS_KEPT
        assert [each.number for each in job.attempts] == list(range(ATTEMPTS_KEPT + 1, 2 * ATTEMPTS_KEPT + 1))
        assert {len(each.reason) for each in job.attempts} == {500}


@given(
    st.lists(
        st.tuples(
            st.sampled_from([make for makes in EVENTS.values() for make in makes]),
            st.sampled_from(["w1", "w2"]),
            st.sampled_from([None, 0, 1, 2, 3]),
        ),
        max_size=30,
    ),
    st.integers(0, 5),
)
def test_whatever_happens_in_whatever_order(
    happenings: list[tuple[Make, str, int | None]], maximum: int
) -> None:
    """Every step is one of the table; retries never exceed their maximum; an end stays but for `Retried`."""
    job = job_in(QUEUED, retries_max=maximum, s3_config=None)
    for moment, (make, worker, attempt) in enumerate(happenings, 2_000):
        event = make(moment)
        if hasattr(event, "worker_id"):
            event = replace(event, worker_id=worker)
        if hasattr(event, "attempt"):
            event = replace(event, attempt=attempt)
        applied = apply(job, event)
        after = applied.after
        if applied.changed:
            assert after.status in EXPECTED[job.status, type(event)]
            assert not job.status.terminal or type(event) is Retried
        else:
            assert after is job
        assert after.attempt - job.attempt == (applied.changed and type(event) is Taken)
        assert 0 <= after.retries <= maximum
        assert (after.finished_ms is not None) == after.status.terminal
        assert (after.worker_id is None) <= (after.status is not RUNNING)
        job = after
