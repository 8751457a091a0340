"""Which deliveries a sender is given, for every store: not those under way, and none for a busy host."""

from __future__ import annotations

import pytest

from pilotlight.domain.webhook import WebhookDelivery

URLS = {
    "plain": "http://one.example/hook",
    "port": "https://ONE.example:8443/hook?to=two.example",
    "user": "http://two.example@one.example/",
    "other": "http://two.example/one.example",
    "longer": "http://one.example.org/",
    "six": "http://[2001:DB8::1]:80/",
    "none": "nonsense",
}


@pytest.fixture
async def deliveries(store):
    for moment, (name, url) in enumerate(URLS.items(), start=1):
        await store.put_webhook(
            WebhookDelivery(
                id=name,
                job_id=name,
                endpoint_id="endpoint1",
                url=url,
                body=b"{}",
                created_ms=moment,
                next_ms=moment,
            )
        )
    return store


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ({}, ["plain", "port", "user", "other", "longer", "six", "none"]),
        ({"skip_ids": ["plain", "six", "unknown"]}, ["port", "user", "other", "longer", "none"]),
        ({"skip_hosts": ["one.example"]}, ["other", "longer", "six", "none"]),
        ({"skip_hosts": {"one.example", "2001:db8::1", ""}}, ["other", "longer"]),
        ({"skip_ids": {"other"}, "skip_hosts": ("one.example",)}, ["longer", "six", "none"]),
        ({"skip_hosts": list({"one.example", "two.example"}), "limit": 1}, ["longer"]),
        ({"skip_ids": ["plain"], "limit": 2}, ["port", "user"]),
    ],
)
async def test_what_is_skipped_does_not_count(deliveries, skip, left):
    """A host with many deliveries due does not hide those of others behind the limit."""
    found = await deliveries.due_webhooks(now_ms=100, **skip)
    assert [delivery.id for delivery in found] == left
    assert [delivery.url for delivery in found] == [URLS[name] for name in left]
