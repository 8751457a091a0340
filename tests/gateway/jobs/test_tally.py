"""What the log says of ended jobs."""

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from pilotlight.domain.job import Job, JobStatus
from pilotlight.gateway.jobs.tally import JobTally

JOB = Job(
    id="j1",
    endpoint_id="ep1",
    created_ms=1,
    queued_ms=1,
    expires_ms=9,
    execution_timeout_ms=9,
    retention_ms=9,
)


async def test_good_ends_are_summed_up_and_bad_ones_told_up_to_a_bound():
    tally = JobTally()
    with capture_logs() as lines:
        for _ in range(50):
            tally.ended(replace(JOB, status=JobStatus.COMPLETED), "ResultPosted")
            tally.ended(replace(JOB, status=JobStatus.FAILED), "ResultPosted")
        tally.ended(replace(JOB, status=JobStatus.CANCELLED), "Cancelled")
        tally.ended(replace(JOB, endpoint_id="ep2", status=JobStatus.TIMED_OUT), "TtlReached")
        tally.close()
        tally.close()
    told = [line for line in lines if line["log_level"] == "info"]
    failed = [line for line in told if line["event"] == "job_finished" and line["endpoint_id"] == "ep1"]
    assert len(failed) == 20
    assert {line["status"] for line in failed} == {"FAILED"}
    sums = {line["endpoint_id"]: line for line in told if line["event"] == "jobs_finished"}
    assert sums["ep1"] == {
        "event": "jobs_finished", "log_level": "info", "endpoint_id": "ep1",
        "completed": 50, "failed": 50, "cancelled": 1,
    }  # fmt: skip
    assert sums["ep2"]["timed_out"] == 1


@pytest.mark.parametrize("status", [JobStatus.COMPLETED, JobStatus.FAILED])
async def test_each_job_has_its_line_for_who_asks_for_details(status):
    tally = JobTally()
    with capture_logs() as lines:
        tally.ended(replace(JOB, status=status), "ResultPosted")
        tally.close()
    assert lines[0]["event"] == "job_finished"
    assert (lines[0]["job_id"], lines[0]["reason"]) == ("j1", "ResultPosted")
