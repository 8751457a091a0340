"""Identifiers have the shapes that clients know (serverless-api.md §1)."""

import re
import uuid

import pytest

from pilotlight.domain.ids import job_id


@pytest.mark.parametrize(("sync", "prefix"), [(False, ""), (True, "sync-")])
def test_a_job_id_is_a_random_uuid_by_its_form(sync, prefix):
    made = job_id(bytes(range(16)), sync=sync, created_ms=1_782_000_000_000)
    assert re.fullmatch(rf"{prefix}[0-9a-f-]{{36}}-u1", made)
    number = uuid.UUID(made.removeprefix("sync-").removesuffix("-u1"))
    assert (number.version, number.variant) == (4, uuid.RFC_4122)


def test_ids_of_jobs_go_up_with_time_and_differ_within_one_millisecond():
    """Neighbours in an index: what makes a submission into a long queue as cheap as into an empty one."""
    moments = [1, 255, 256, 1_782_000_000_000, 1_782_000_000_001]
    made = [job_id(bytes([255 - n] * 16), sync=False, created_ms=at) for n, at in enumerate(moments)]
    assert made == sorted(made)
    same = {job_id(bytes(6) + bytes([n] * 10), sync=False, created_ms=5) for n in range(50)}
    assert len(same) == 50
