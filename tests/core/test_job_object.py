"""The job object (serverless-api.md §2.9) and the body of a webhook (§2.12)."""

from __future__ import annotations

import json

import msgspec
import pytest

from pilotlight.core.job_object import job_object, webhook_body
from pilotlight.domain.job import Job, JobStatus


def job(status: JobStatus, **changes: object) -> Job:
    values: dict[str, object] = {
        "id": "a-u1",
        "endpoint_id": "e",
        "status": status,
        "created_ms": 1_000,
        "queued_ms": 1_000,
        "expires_ms": 90_000,
        "execution_timeout_ms": 600,
        "retention_ms": 60,
    }
    return Job(**{**values, **changes})


def shown(record: Job) -> dict[str, object]:
    return json.loads(msgspec.json.encode(job_object(record)))


RAN = {"started_ms": 3_208, "worker_id": "w1", "attempt": 1}


def test_a_queued_job_is_its_id_and_status() -> None:
    assert shown(job(JobStatus.IN_QUEUE)) == {"id": "a-u1", "status": "IN_QUEUE"}


def test_a_taken_one_has_its_delay_and_worker() -> None:
    assert shown(job(JobStatus.IN_PROGRESS, **RAN)) == {
        "id": "a-u1",
        "status": "IN_PROGRESS",
        "delayTime": 2_208,
        "workerId": "w1",
    }


def test_the_delay_counts_from_the_last_requeue() -> None:
    record = job(JobStatus.IN_PROGRESS, **{**RAN, "queued_ms": 3_000, "retries": 1})
    assert (shown(record)["delayTime"], shown(record)["retries"]) == (208, 1)


def test_a_clock_that_went_back_makes_nothing_negative() -> None:
    record = job(JobStatus.COMPLETED, started_ms=900, worker_id="w1", finished_ms=800)
    assert (shown(record)["delayTime"], shown(record)["executionTime"]) == (0, 0)


def test_progress_is_shown_as_output_while_running() -> None:
    assert shown(job(JobStatus.IN_PROGRESS, **RAN, output=b'"42 %"'))["output"] == "42 %"


def test_a_completed_one() -> None:
    assert shown(job(JobStatus.COMPLETED, **RAN, finished_ms=8_332, output=b'{"text":"hello"}')) == {
        "id": "a-u1",
        "status": "COMPLETED",
        "delayTime": 2_208,
        "executionTime": 5_124,
        "workerId": "w1",
        "output": {"text": "hello"},
    }


def test_a_completed_one_without_output_has_no_such_key() -> None:
    assert "output" not in shown(job(JobStatus.COMPLETED, **RAN, finished_ms=8_332))


def test_an_output_of_null_is_an_output() -> None:
    assert shown(job(JobStatus.COMPLETED, **RAN, finished_ms=8_332, output=b"null"))["output"] is None


def test_error_and_output_coexist() -> None:
    fields = shown(job(JobStatus.FAILED, **RAN, finished_ms=8_332, error="bad", output=b'{"partial":1}'))
    assert (fields["error"], fields["output"]) == ("bad", {"partial": 1})


@pytest.mark.parametrize("status", [JobStatus.CANCELLED, JobStatus.TIMED_OUT])
def test_what_never_ran_has_no_times(status: JobStatus) -> None:
    assert set(shown(job(status, finished_ms=5_000))) == {"id", "status"}


def test_only_retries_that_happened_are_shown() -> None:
    assert "retries" not in shown(job(JobStatus.IN_PROGRESS, **RAN, retries=0))


def test_raw_json_passes_untouched() -> None:
    """Numbers that no double can hold, duplicate keys, blanks: the output is not ours to rewrite."""
    raw = b'{ "a": 12345678901234567890123, "a": 1.50e+400 , "\\u00e9": "\\ud83d" }'
    encoded = msgspec.json.encode(job_object(job(JobStatus.COMPLETED, **RAN, finished_ms=8_332, output=raw)))
    assert raw in encoded


def test_nothing_secret_is_shown() -> None:
    record = job(JobStatus.IN_PROGRESS, **RAN, s3_config=b"sealed", key_id="key", webhook="https://x/?t=1")
    assert b"sealed" not in msgspec.json.encode(job_object(record))
    assert set(shown(record)) == {"id", "status", "delayTime", "workerId"}


def test_a_webhook_gets_the_job_object_the_input_and_the_url() -> None:
    """The example of serverless-api.md §2.12, key by key."""
    record = job(
        JobStatus.COMPLETED,
        **RAN,
        finished_ms=8_332,
        output=b'{"text":"hello"}',
        webhook="https://example.com/hook",
    )
    body = json.loads(webhook_body(record, b'{"prompt":"hi"}'))
    assert body == {
        **shown(record),
        "input": {"prompt": "hi"},
        "webhook": "https://example.com/hook",
    }
    assert body["delayTime"] == 2_208
    assert body["executionTime"] == 5_124


def test_a_webhook_echoes_the_input_byte_for_byte() -> None:
    raw = b'[1.0, 12345678901234567890123,   "\\u0000"]'
    record = job(JobStatus.CANCELLED, finished_ms=8_332, webhook='https://example.com/"\\\u00e9')
    body = webhook_body(record, raw)
    assert raw in body
    assert json.loads(body)["webhook"] == record.webhook


def test_an_error_text_with_anything_in_it_stays_one_string() -> None:
    error = 'a "quote", a \\, a\nline, a \x00, é, 😀'
    record = job(JobStatus.FAILED, **RAN, finished_ms=8_332, error=error, webhook="https://x/")
    assert json.loads(webhook_body(record, b"1"))["error"] == error
