"""The same over a port that processes share: what they serve, what they refuse, and what they hand over."""

from __future__ import annotations

from contextlib import suppress

import psutil
import pytest
import pytest_asyncio

from .conftest import running
from .test_connections import (  # noqa: F401 - tests
    test_a_client_that_says_no_more_gets_all_or_nothing,
    test_a_client_that_waits_is_told_to_go_on,
    test_a_client_that_waits_may_send_chunks,
    test_a_request_behind_a_stream_waits_for_its_end,
    test_an_old_client_gets_one_answer_that_it_can_read,
    test_answers_come_in_the_order_of_the_requests,
    test_chunks_may_be_cut_anywhere,
    test_close_is_kept_and_nothing_after_it_is_read,
    test_half_a_request_of_a_half_closed_connection_is_none,
    test_head_is_get_without_a_body,
    test_many_requests_at_once_are_answered_one_by_one,
    test_requests_in_pieces_of_any_size_are_answered_one_by_one,
    test_what_concerns_this_connection_only_is_not_passed_on,
    test_what_is_broken_behind_a_request_does_not_break_its_answer,
)
from .test_grammar import (  # noqa: F401 - tests
    test_a_length_and_a_coding_together_are_refused,
    test_no_tunnel_is_opened,
    test_what_is_correct_is_served,
)
from .test_leaving import (  # noqa: F401 - tests
    test_after_an_answer,
    test_at_any_moment,
    test_in_the_middle_of_a_request,
    test_in_the_middle_of_a_stream,
    test_while_the_engine_thinks,
    test_while_waiting_for_a_slot,
    test_with_requests_in_the_pipeline,
)
from .test_limits import (  # noqa: F401 - tests
    test_a_client_that_goes_on_sending_can_read_why_it_is_refused,
    test_a_client_that_never_reads_and_leaves_frees_everything,
    test_a_client_that_only_asks_is_not_read_from,
    test_a_head_without_end_is_refused,
    test_an_engine_waits_for_a_client_that_reads_slowly,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(tmp_path_factory):
    async with running(tmp_path_factory.mktemp("h"), processes=2) as site:
        fronts = _fronts()
        assert len(fronts) == 2
        yield site
        assert _fronts() == fronts, "a process has ended"


def _fronts():
    """Live processes that serve the data path. Reading the command line of an ended one raises."""
    fronts = set()
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "pilotlight.front" in child.cmdline():
                fronts.add(child)
    return fronts
