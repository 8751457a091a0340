"""Webhook secrets and dead letters over the management API, for admin keys only."""

from __future__ import annotations

import pytest

from pilotlight.domain.key import Scope
from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.sealing import InstallationSecret

URL = "/pilotlight/v1/webhooks"


def delivery(id="job1.1", **changes):
    return WebhookDelivery(
        **{
            "id": id,
            "job_id": id.partition(".")[0],
            "endpoint_id": "ep1",
            "url": "https://example.com/hook?token=t",
            "body": b"{}",
            "created_ms": 1_780_000_000_000,
            "tries": 3,
            "last_status": 500,
            "last_error": "the receiver answered 500",
        }
        | changes
    )


async def test_the_secret_of_an_endpoint(management):
    endpoint = await management.create()
    answer = await management.http.get(f"/pilotlight/v1/endpoints/{endpoint['id']}/webhook-secret")
    assert answer.json() == {
        "endpoint_id": endpoint["id"],
        "secret": InstallationSecret(bytes(32)).webhook_secret(endpoint["id"]),
    }
    assert (await management.http.get("/pilotlight/v1/endpoints/none/webhook-secret")).status_code == 404


async def test_dead_letters_are_listed_by_endpoint_without_their_bodies(management):
    await management.store.put_webhook(delivery())
    await management.store.put_webhook(delivery("job2.1", endpoint_id="ep2", created_ms=1_780_000_000_001))
    await management.store.put_webhook(delivery("job3.1", next_ms=5))
    listed = (await management.http.get(f"{URL}/dead")).json()["webhooks"]
    assert [one["id"] for one in listed] == ["job2.1", "job1.1"]
    only = (await management.http.get(f"{URL}/dead", params={"endpoint": "ep1"})).json()["webhooks"]
    assert only == [
        {
            "id": "job1.1",
            "job_id": "job1",
            "endpoint_id": "ep1",
            "url": "https://example.com/hook?token=t",
            "bytes": 2,
            "tries": 3,
            "last_status": 500,
            "last_error": "the receiver answered 500",
            "created_at": "2026-05-28T20:26:40Z",
            "next_at": None,
        }
    ]
    assert len((await management.http.get(f"{URL}/dead?limit=1")).json()["webhooks"]) == 1
    assert (await management.http.get(f"{URL}/dead?limit=0")).status_code == 422


async def test_a_dead_letter_is_sent_again(management):
    await management.store.put_webhook(delivery())
    answer = await management.http.post(f"{URL}/job1.1/resend")
    assert answer.status_code == 200
    assert (answer.json()["tries"], answer.json()["next_at"]) == (0, "2026-05-28T20:26:40Z")
    assert (await management.store.webhook("job1.1")).next_ms == management.clock.ms
    assert "webhooks" in management.wakes
    again = await management.http.post(f"{URL}/job1.1/resend")
    assert again.status_code == 409
    assert "not a dead letter" in again.json()["detail"]


async def test_a_dead_letter_without_its_body_is_not_sent_again(management):
    await management.store.put_webhook(delivery(body=b""))
    answer = await management.http.post(f"{URL}/job1.1/resend")
    assert answer.status_code == 409
    assert "body is not kept any more" in answer.json()["detail"]
    assert (await management.http.get(f"{URL}/dead")).json()["webhooks"][0]["bytes"] == 0


async def test_a_dead_letter_is_forgotten(management):
    await management.store.put_webhook(delivery())
    assert (await management.http.delete(f"{URL}/job1.1")).status_code == 204
    assert (await management.http.delete(f"{URL}/job1.1")).status_code == 404
    assert (await management.http.post(f"{URL}/job1.1/resend")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"{URL}/dead"),
        ("POST", f"{URL}/x/resend"),
        ("DELETE", f"{URL}/x"),
        ("GET", "/pilotlight/v1/endpoints/x/webhook-secret"),
    ],
)
async def test_only_admin_keys_may(management, method, path):
    endpoint = await management.create()
    _, run_key = await management.keys.create(scope=Scope.RUN, endpoint_ids=[endpoint["id"]])
    answer = await management.http.request(method, path, headers={"Authorization": f"Bearer {run_key}"})
    assert answer.status_code == 403
