"""How long clients wait, and what becomes of requests that would wait for longer."""

from __future__ import annotations

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotlight.core.deadlines import (
    RETRY_AFTER_S_MAX,
    Deadline,
    HoldBound,
    expected_wait_ms,
    hold_bound,
    hopeless,
    request_deadline,
    retry_after_s,
    smoothed_ms,
)
from pilotlight.errors import InvalidInputError


def deadline(own=None, stainless=None, longest_s=3600):
    headers = {b"x-request-timeout": own, b"x-stainless-read-timeout": stainless}
    given = {name: value for name, value in headers.items() if value is not None}
    return request_deadline(given, longest_s=longest_s)


def test_without_a_word_of_the_client_only_the_gateways_bound_holds():
    assert deadline() == Deadline(3600, 3600, asked=False)
    assert deadline(own=b"") == Deadline(3600, 3600, asked=False)


@pytest.mark.parametrize(
    ("value", "seconds"), [(b"30", 30), (b" 2.5 ", 2.5), (b"0.001", 0.001), (b"99999", 3600)]
)
def test_our_own_header_bounds_the_whole_request(value, seconds):
    assert deadline(own=value, stainless=b"600") == Deadline(seconds, seconds, asked=True)


@pytest.mark.parametrize(
    "value",
    [b"soon", b"0", b"0.0", b"-1", b"+5", b"1e3", b"nan", b"inf", b"1_0", b"30s", b"\xff", b"9" * 400],
)
def test_our_own_header_is_refused_where_it_says_nothing_legal(value):
    with pytest.raises(
        InvalidInputError, match=r"X-Request-Timeout is .*legal is a number of seconds"
    ) as refused:
        deadline(own=value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("value", "begin_s"), [(b"600", 600), (b"2.5", 2.5), (b"1e-07", 1e-7), (b"1e+20", 3600)]
)
def test_the_packages_header_bounds_the_silence_before_the_answer(value, begin_s):
    assert deadline(stainless=value) == Deadline(begin_s, 3600, asked=True)


@pytest.mark.parametrize("value", [b"", b"0", b"-5", b"nan", b"inf", b"None", b"NOT_GIVEN", b"\xff"])
def test_what_is_no_use_in_the_packages_header_is_ignored(value):
    assert deadline(stainless=value) == Deadline(3600, 3600, asked=False)


@pytest.mark.parametrize(
    ("timeout", "begin_s"),
    [
        (openai.NOT_GIVEN, 600),
        (7, 7),
        (12.5, 12.5),
        (httpx.Timeout(10, read=2.5), 2.5),
        (None, None),
        (httpx.Timeout(10, read=None), None),
    ],
)
def test_what_openais_package_really_sends(timeout, begin_s):
    sent = {}

    def answer(request):
        sent.update({name.encode(): value.encode() for name, value in request.headers.items()})
        return httpx.Response(200, json={"object": "list", "data": []})

    transport = httpx.MockTransport(answer)
    with (
        httpx.Client(transport=transport) as http,
        openai.OpenAI(api_key="k", base_url="http://gateway/v1", http_client=http, timeout=timeout) as client,
    ):
        client.models.list()
    assert request_deadline(sent, longest_s=3600) == Deadline(
        begin_s or 3600, 3600, asked=begin_s is not None
    )


def test_a_held_request_is_answered_shortly_before_its_client_gives_up():
    ten = Deadline(10, 10, asked=True)
    assert hold_bound(ten, elapsed_s=0, hold_s=300) == HoldBound(9.5, by_client=True)
    assert hold_bound(ten, elapsed_s=4, hold_s=300) == HoldBound(5.5, by_client=True)
    assert hold_bound(ten, elapsed_s=11, hold_s=300) == HoldBound(0, by_client=True)
    assert hold_bound(Deadline(2, 2, asked=True), elapsed_s=0, hold_s=300) == HoldBound(1.9, by_client=True)


def test_the_gateways_bound_holds_where_the_client_waits_for_longer():
    assert hold_bound(Deadline(600, 3600, asked=True), elapsed_s=0, hold_s=300) == HoldBound(
        300, by_client=False
    )
    assert hold_bound(Deadline(3600, 3600, asked=False), elapsed_s=3500, hold_s=300) == HoldBound(
        100, by_client=False
    )


def test_a_client_that_is_sent_comments_hears_no_silence():
    silence, whole = Deadline(10, 3600, asked=True), Deadline(10, 10, asked=True)
    assert hold_bound(silence, elapsed_s=0, hold_s=300, fed=True) == HoldBound(300, by_client=False)
    assert hold_bound(whole, elapsed_s=0, hold_s=300, fed=True) == HoldBound(9.5, by_client=True)


def test_the_expected_wait():
    # One slot that is in use for 4 s each time: half of that, then 4 s for each that is ahead.
    assert [expected_wait_ms(ahead, 1, 4000.0) for ahead in (0, 1, 2)] == [2000, 6000, 10_000]
    assert expected_wait_ms(10, 20, 4000.0) == 2100
    assert expected_wait_ms(5, 0, 4000.0) is None
    assert expected_wait_ms(5, 3, None) is None


def test_only_what_the_client_will_not_wait_for_is_hopeless():
    bound = HoldBound(5.0, by_client=True)
    assert hopeless(5001, bound)
    assert not hopeless(5000, bound)
    assert not hopeless(None, bound), "a request that waits for a start is what makes it happen"
    assert not hopeless(10**9, HoldBound(5.0, by_client=False))
    assert hopeless(1, HoldBound(0.0, by_client=True))


def test_when_to_come_again():
    bound = HoldBound(4.0, by_client=True)
    assert retry_after_s(9500, bound) == 8
    assert retry_after_s(None, bound) == 1
    assert retry_after_s(100, bound) == 1
    assert retry_after_s(10**7, bound) == RETRY_AFTER_S_MAX


def test_service_times_follow_what_is_served_now():
    average = None
    for sample in [100.0] * 5:
        average = smoothed_ms(average, sample)
    assert average == 100.0
    for _ in range(60):
        average = smoothed_ms(average, 1000.0)
    assert 950 < average < 1000


@given(
    own=st.one_of(st.none(), st.binary(max_size=40)),
    stainless=st.one_of(st.none(), st.binary(max_size=40)),
    elapsed_s=st.floats(0, 10_000),
    hold_s=st.floats(0.001, 4000),
    fed=st.booleans(),
)
def test_no_header_lets_a_request_be_held_longer_than_the_gateway_would(
    own, stainless, elapsed_s, hold_s, fed
):
    try:
        asked = deadline(own, stainless)
    except InvalidInputError:
        return
    assert 0 < asked.begin_s <= asked.whole_s <= 3600
    bound = hold_bound(asked, elapsed_s=elapsed_s, hold_s=hold_s, fed=fed)
    assert 0 <= bound.seconds <= hold_s
    assert bound.seconds == 0 or elapsed_s + bound.seconds <= asked.whole_s


@given(
    ahead=st.integers(0, 10_000),
    slots=st.integers(1, 1000),
    service_ms=st.floats(0, 1e6),
    bound=st.floats(0, 600),
)
def test_who_comes_again_as_told_finds_a_queue_that_has_gone_down(ahead, slots, service_ms, bound):
    expected_ms = expected_wait_ms(ahead, slots, service_ms)
    assert expected_ms <= expected_wait_ms(ahead + 1, slots, service_ms)
    seconds = retry_after_s(expected_ms, HoldBound(bound, by_client=True))
    assert 1 <= seconds <= RETRY_AFTER_S_MAX
    if 1 < seconds < RETRY_AFTER_S_MAX:
        assert expected_ms - seconds * 1000 <= bound * 500 + 1
