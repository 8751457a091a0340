"""What the gateway does with a job's `s3Config`: seal it, open it for the worker, store large results.

The configuration holds credentials, so it is sealed from submission to hand-out and wiped at the terminal
state (`core.lifecycle`). A result over the limit goes into the job's bucket, and the job is told where it is
(serverless-api.md §2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import structlog
from msgspec.structs import replace

from pilotlight.core.lifecycle import ResultPosted
from pilotlight.domain.job import Job
from pilotlight.errors import NotFoundError, PilotlightError
from pilotlight.ports.store import JobStore

_log = structlog.get_logger()


class Seal(Protocol):
    """Keeps bytes unreadable for whoever reads the store."""

    def seal(self, job_id: str, data: bytes) -> bytes:
        """The data encrypted, bound to the job."""
        ...

    def unseal(self, job_id: str, sealed: bytes) -> bytes:
        """The data again. PilotlightError when that is impossible for good, with words for users."""
        ...


class Uploader(Protocol):
    """Stores a result in a bucket."""

    async def upload(self, job_id: str, config_bytes: bytes, body: bytes) -> dict[str, object]:
        """Where it is now. PilotlightError when it could not be stored, with the reason."""
        ...


@dataclass(frozen=True, slots=True)
class Outsize:
    """A result that is too large for the queue.

    Attributes:
        failed: The event that fails the job, should there be no other place for the result.
        output: Raw JSON; None when there is nothing to be saved.
    """

    failed: ResultPosted
    output: bytes | None


class Buckets:
    """Seals, opens and uses the `s3Config` of jobs.

    Args:
        secret: Seals.
        uploader: Stores results.
        store: Where the sealed configuration of a job is.
    """

    def __init__(self, secret: Seal, uploader: Uploader, store: JobStore) -> None:
        self._secret = secret
        self._uploader = uploader
        self._store = store

    def seal(self, job_id: str, config: bytes) -> bytes:
        """A configuration as it may be stored."""
        return self._secret.seal(job_id, config)

    def opened(self, jobs: Sequence[Job]) -> tuple[Sequence[Job], Sequence[tuple[Job, str]]]:
        """Jobs as a worker may have them, and those whose configuration cannot be read, with the reason."""
        if not any(job.s3_config for job in jobs):
            return jobs, []
        readable: list[Job] = []
        lost: list[tuple[Job, str]] = []
        for job in jobs:
            try:
                plain = self._secret.unseal(job.id, job.s3_config) if job.s3_config else None
                readable.append(replace(job, s3_config=plain))
            except PilotlightError as error:
                lost.append((job, str(error)))
        return readable, lost

    async def settle(self, job_id: str, outsize: Outsize) -> ResultPosted:
        """The event for a result that is too large: completed when its bucket has it, else failed.

        Raises:
            StoreError: The job could not be read; the worker may post again.
        """
        failed = outsize.failed
        if outsize.output is None:
            return failed
        try:
            job = await self._store.job(job_id)
        except NotFoundError:
            return failed
        if not job.s3_config:
            return failed
        try:
            config = self._secret.unseal(job_id, job.s3_config)
            place = await self._uploader.upload(job_id, config, outsize.output)
        except PilotlightError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - the worker would be told to post the same again, in vain
            _log.exception("upload_broken", job_id=job_id)
            reason = type(error).__name__
        else:
            _log.info("result_uploaded", job_id=job_id, endpoint_id=job.endpoint_id, size=place["bytes"])
            return replace(failed, error=None, output=msgspec.json.encode({"s3": place}))
        _log.warning("upload_failed", job_id=job_id, endpoint_id=job.endpoint_id, reason=reason)
        return replace(failed, error=f"{failed.error}; storing it in the job's bucket failed: {reason}")
