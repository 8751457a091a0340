"""What the writer knows without asking the database: jobs, inputs, numbers and purges as of the last commit.

One thread writes the file and no other process does, so what it wrote last is what stands there. Operations
of the writer look here before they look into the database. The event loop has a shelf of jobs, too, from
which `SqliteStore.job` answers without the reader: most jobs are read soon after they were written.

Everything that changes or deletes a job says so, with `put`, `drop` or `clear`, inside its transaction. That
counts for the operations behind it at once, and not at all when the transaction is rolled back. After the
commit it goes to the loop together with the answers. Nothing else ever comes in: what a reader finds may be
out of date by the time it is there.
"""

from __future__ import annotations

from pilotlight.domain.job import Job

JOBS_MAX = 20_000
"""Jobs kept; those written longest ago go first."""

BYTES_MAX = 64 * 1024 * 1024
"""Bytes that jobs may take together, and as many that the inputs of waiting ones may take."""

_JOB_BYTES_MAX = 1024 * 1024
"""A larger one is not kept: it would cost a thousand others their place, and to read it costs more anyway."""

_RECORD_BYTES = 1_000
_ATTEMPT_BYTES = 800
"""About what a record and each of its ended attempts take besides the texts."""

_INPUT_BYTES_MAX = 256 * 1024
"""A larger input is read from the database: its copying is what costs then."""

_INPUT_BYTES = 200
"""About what an input takes besides its bytes."""

Known = tuple[Job, int]
"""A job without its input, and its number in the database (`seq`)."""


Changes = tuple[bool, dict[str, Known | None]]
"""Whether all jobs are to be forgotten, and what then became of which; None for one that was deleted."""


class JobShelf:
    """Jobs without inputs, by id, so many of those that were changed last.

    Args:
        count_max: How many are kept.
        bytes_max: How many bytes they may take.
    """

    def __init__(self, *, count_max: int = JOBS_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._jobs: dict[str, Known] = {}
        self._bytes = 0

    def get(self, job_id: str) -> Known | None:
        """The job and its number; None when it is not here."""
        return self._jobs.get(job_id)

    def take_over(self, changes: Changes) -> None:
        """Be as after the changes of a transaction."""
        cleared, said = changes
        jobs = self._jobs
        if cleared:
            jobs.clear()
            self._bytes = 0
        size = self._bytes
        for job_id, known in said.items():
            # Taken out and put in anew, for the oldest change has to be the first.
            if (before := jobs.pop(job_id, None)) is not None:
                size -= _bytes_of(before[0])
            if known is not None and (added := _bytes_of(known[0])) <= _JOB_BYTES_MAX:
                jobs[job_id] = known
                size += added
        self._bytes = size
        while len(jobs) > self._count_max or self._bytes > self._bytes_max:
            job, _ = jobs.pop(next(iter(jobs)))
            self._bytes -= _bytes_of(job)


class KnownJobs:
    """A shelf as the running transaction of the writer sees it, and changes it."""

    def __init__(self) -> None:
        self._committed = JobShelf()
        # What the transaction said of which job, and whether it forgot all that was there before.
        self._said: dict[str, Known | None] = {}
        self._cleared = False

    def get(self, job_id: str) -> Known | None:
        """The job as the running transaction sees it; None when it is not known here."""
        if job_id in self._said:
            return self._said[job_id]
        return None if self._cleared else self._committed.get(job_id)

    def put(self, job: Job, seq: int) -> None:
        """Say how a job stands now, without its input."""
        self._said[job.id] = (job, seq)

    def drop(self, job_id: str) -> None:
        """Say that a job is gone."""
        self._said[job_id] = None

    def clear(self) -> None:
        """Say that any job may have changed or be gone."""
        self._said = {}
        self._cleared = True

    def commit(self) -> Changes:
        """Take over what was said; returns it for others who keep jobs."""
        changes = (self._cleared, self._said)
        self._committed.take_over(changes)
        self.roll_back()
        return changes

    def roll_back(self) -> None:
        """Forget what was said."""
        self._said = {}
        self._cleared = False


class KnownInputs:
    """Inputs of queued jobs, by id, for the writer alone: it spares a take a row of the database per job.

    Unlike jobs they may stay when their job is gone, for nobody asks for them then; so for ids that come
    again they have to be put in again, or everything has to be cleared.

    Args:
        bytes_max: How many bytes they may take.
    """

    def __init__(self, *, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._inputs: dict[str, bytes] = {}
        self._bytes = 0

    def put(self, job_id: str, body: bytes) -> None:
        """Keep the input of a job that is being queued; those kept longest make room."""
        self.take(job_id)
        if len(body) > _INPUT_BYTES_MAX:
            return
        self._inputs[job_id] = body
        self._bytes += len(body) + _INPUT_BYTES
        while self._bytes > self._bytes_max:
            self.take(next(iter(self._inputs)))

    def take(self, job_id: str) -> bytes | None:
        """The input of a job, which is not kept any longer; None when it is not there."""
        body = self._inputs.pop(job_id, None)
        if body is not None:
            self._bytes -= len(body) + _INPUT_BYTES
        return body

    def clear(self) -> None:
        """Keep none."""
        self._inputs.clear()
        self._bytes = 0


class Knowledge:
    """All that a thread knows between its transactions.

    Attributes:
        jobs: Jobs that were written.
        inputs: What came with those that wait.
        purges: How often the queue of an endpoint has been purged.
        last_seq: The highest number a job was given; None when the database has to be asked.
    """

    __slots__ = ("inputs", "jobs", "last_seq", "purges")

    def __init__(self) -> None:
        self.jobs = KnownJobs()
        self.inputs = KnownInputs()
        self.purges: dict[str, int] = {}
        self.last_seq: int | None = None

    def commit(self) -> Changes:
        """Keep what the transaction found out; returns what became of jobs."""
        return self.jobs.commit()

    def roll_back(self) -> None:
        """Forget it, and what it may have made wrong."""
        self.jobs.roll_back()
        self.inputs.clear()
        self.purges.clear()
        self.last_seq = None


def _bytes_of(job: Job) -> int:
    # Written out, for it is asked some ten times in the life of a job.
    size = _RECORD_BYTES
    if job.output is not None:
        size += len(job.output)
    if job.error is not None:
        size += len(job.error)
    if job.webhook is not None:
        size += len(job.webhook)
    if job.s3_config is not None:
        size += len(job.s3_config)
    if job.attempts:
        size += _ATTEMPT_BYTES * len(job.attempts)
    return size
