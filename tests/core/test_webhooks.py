"""The decision after a try, and the signature (serverless-api.md §2.12, §12 items 24 and 25, §13 item 11)."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from pilotlight.core.webhooks import Try, after_try, revived, signature
from pilotlight.domain.webhook import WebhookDelivery, host_of

DELIVERY = WebhookDelivery(
    id="j.1",
    job_id="j",
    endpoint_id="e",
    url="https://Example.com:8443/hook?token=x",
    body=b"{}",
    created_ms=1_000,
    next_ms=1_000,
)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_2xx_is_success(status):
    assert (
        after_try(DELIVERY, Try(started_ms=1_000, status=status), now_ms=1_100, retry_delays_s=(10,)) is None
    )


@pytest.mark.parametrize("status", [100, 199, 300, 301, 302, 307, 400, 404, 410, 429, 500, 503])
def test_everything_else_is_tried_again(status):
    after = after_try(DELIVERY, Try(started_ms=1_000, status=status), now_ms=1_100, retry_delays_s=(10, 10))
    assert after is not None
    assert (after.tries, after.next_ms, after.last_status) == (1, 11_000, status)
    assert str(status) in after.last_error


def test_tries_lie_at_0_10_and_20_seconds_and_then_it_is_dead():
    """§12 item 24."""
    moments, delivery = [], DELIVERY
    while delivery.next_ms is not None:
        moments.append(delivery.next_ms)
        tried = Try(started_ms=delivery.next_ms, status=500)
        delivery = after_try(delivery, tried, now_ms=delivery.next_ms + 3_000, retry_delays_s=(10, 10))
    assert moments == [1_000, 11_000, 21_000]
    assert (delivery.tries, delivery.last_status) == (3, 500)


def test_a_try_that_took_longer_than_the_pause_is_followed_at_once():
    tried = Try(started_ms=1_000, error="no answer within 10 s")
    after = after_try(DELIVERY, tried, now_ms=11_300, retry_delays_s=(10, 10))
    assert (after.next_ms, after.last_status, after.last_error) == (11_300, None, "no answer within 10 s")


def test_what_is_hopeless_is_dead_at_once():
    tried = Try(started_ms=1_000, error="127.0.0.1 is not a public address", hopeless=True)
    after = after_try(DELIVERY, tried, now_ms=1_001, retry_delays_s=(10, 10))
    assert (after.tries, after.next_ms) == (1, None)
    assert "127.0.0.1" in after.last_error


def test_no_pauses_mean_one_try():
    assert after_try(DELIVERY, Try(started_ms=1, status=500), now_ms=1, retry_delays_s=()).next_ms is None


def test_a_revived_dead_letter_has_all_its_tries_again():
    dead = after_try(DELIVERY, Try(started_ms=1, status=500), now_ms=1, retry_delays_s=())
    again = revived(dead, now_ms=99_000)
    assert (again.id, again.tries, again.next_ms, again.last_status) == ("j.1", 0, 99_000, 500)


def test_the_signature_is_an_hmac_of_timestamp_dot_body():
    expected = hmac.new(b"whsec_1", b'1700000000.{"id":"j"}', hashlib.sha256).hexdigest()
    assert signature("whsec_1", "1700000000", b'{"id":"j"}') == f"v1={expected}"


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://Example.COM:8443/x", "example.com"),
        ("http://user:pw@h/x", "h"),
        ("http://[::1]:80/", "::1"),
        ("nonsense", ""),
        ("http://[", ""),
    ],
)
def test_the_host_of_a_url(url, host):
    assert host_of(url) == host
