"""What may come with a submission: webhook, s3Config, Idempotency-Key (serverless-api.md §2.3, §2.12)."""

from __future__ import annotations

import asyncio
import json

import pytest

from pilotlight.domain.job import WIPED
from pilotlight.errors import InvalidInputError
from pilotlight.gateway.jobs.submission import parse_submission

S3 = {
    "accessId": "AKIA1",
    "accessSecret": "TOP-SECRET",
    "bucketName": "results",
    "endpointUrl": "https://s3.example.com",
}


def parsed(**fields):
    return parse_submission(json.dumps({"input": 1, **fields}).encode())


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook",
        "http://example.com:8080/hook?token=1#x",
        "http://127.0.0.1/",
        "http://[::1]:9/x",
        "HTTPS://EXAMPLE.com",
        "https://example.com/" + "a" * 2028,
    ],
)
def test_webhooks_that_are_taken(url):
    """§2.3; whether a private address may be called is decided when it is sent (§2.12)."""
    assert parsed(webhook=url).webhook == url


@pytest.mark.parametrize(
    "url",
    [
        "", "example.com/hook", "ftp://example.com", "https://", "https:///path", "https://:80/",
        "https://example.com:99999/", "https://example.com:0/", "https://exa mple.com/", "https://example.com/\n",
        "https://[::1/", "javascript:alert(1)", "https://example.com/ü", "https://example.com/" + "a" * 2029,
    ],
)  # fmt: skip
def test_webhooks_that_are_not(url):
    text = "webhook must be an http or https URL with a host, of at most 2048 ASCII characters"
    with pytest.raises(InvalidInputError, match="webhook") as caught:
        parsed(webhook=url)
    assert (str(caught.value), caught.value.field) == (text, "webhook")


@pytest.mark.parametrize("url", ["https://user:hunter2@example.com/", "https://user@example.com/"])
def test_passwords_in_webhooks_are_refused_and_not_repeated(url):
    with pytest.raises(InvalidInputError, match="must not hold a user name or password") as caught:
        parsed(webhook=url)
    assert "hunter2" not in str(caught.value)


def test_second_name_of_the_webhook():
    """§2.3: counts when `webhook` is absent."""
    assert parsed(webhookV2="https://b.example").webhook == "https://b.example"
    assert parsed(webhook=None, webhookV2="https://b.example").webhook == "https://b.example"
    assert parsed(webhook="https://a.example", webhookV2="https://b.example").webhook == "https://a.example"
    assert parsed(webhook=None, webhookV2=None, s3Config=None).webhook is None
    with pytest.raises(InvalidInputError, match="webhookV2 must be a string"):
        parsed(webhookV2=7)


def test_s3_config_is_kept_as_it_came():
    """§2.3: opaque; more keys are passed on."""
    config = {"bucketName": 7, "objectPath": "some/prefix", "mine": [None]}
    assert json.loads(parsed(s3Config=config).s3_config) == config


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ([], "s3Config must be an object"),
        ("x", "s3Config must be an object"),
        ({**S3, "objectPath": "x" * 17_000}, "s3Config must be at most 16384 bytes"),
    ],
)
def test_bad_s3_configs_are_named_without_their_contents(config, text):
    with pytest.raises(InvalidInputError, match="s3Config") as caught:
        parsed(s3Config=config)
    assert text in str(caught.value)
    assert "TOP-SECRET" not in str(caught.value)


async def test_s3_config_is_sealed_wiped_and_never_shown(platform, caplog):
    """§2.3: never echoed; kept encrypted, and not longer than the job lives."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run({"input": 1, "s3Config": S3})
    stored = await platform.store.job(job_id)
    assert b"TOP-SECRET" not in stored.s3_config
    answers = [
        await platform.call("GET", f"/status/{job_id}?timeline=true"),
        await platform.call("GET", "/requests"),
    ]
    await platform.take()
    await platform.done(job_id, {"output": 1})
    answers.append(await platform.call("GET", f"/status/{job_id}"))
    assert not [answer for answer in answers if "TOP-SECRET" in answer.text or "s3" in answer.text.lower()]
    assert (await platform.store.job(job_id)).s3_config == WIPED
    assert "TOP-SECRET" not in caplog.text


async def test_webhook_is_stored_and_due_at_the_end(platform):
    """§2.12: once per job, in the transaction that ends it."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run({"input": {"n": 5}, "webhook": "https://example.com/hook"})
    assert await platform.store.next_webhook_ms() is None
    await platform.take()
    await platform.done(job_id, {"output": 1})
    (delivery,) = await platform.store.due_webhooks(now_ms=platform.clock.now_ms() + 1)
    body = json.loads(delivery.body)
    assert (delivery.url, body["status"], body["input"], body["webhook"]) == (
        "https://example.com/hook", "COMPLETED", {"n": 5}, "https://example.com/hook",
    )  # fmt: skip
    assert platform.woken.count("webhooks") == 1
    assert "webhook" not in await platform.status(job_id)


@pytest.mark.parametrize(
    "deep", [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 501 + b"1" + b"}" * 501], ids=["absurd", "deep"]
)
@pytest.mark.parametrize("verb", ["/run", "/runsync", "/batch"])
async def test_what_is_nested_too_deeply_is_refused(platform, verb, deep):
    """A worker's reader of JSON fails on it, and with it on all jobs of the same answer."""
    body = b'{"input":' + deep + b"}"
    answer = await platform.call("POST", verb, content=b"[" + body + b"]" if verb == "/batch" else body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("request body is nested too deeply")


async def test_many_brackets_are_not_deep(platform):
    """Side by side, or in a text, there may be any number of them."""
    value = [[], "[" * 1_000 + '"\\', {"{[": "]"}] * 1_000 + [json.loads(b"[" * 400 + b"]" * 400)]
    job_id = await platform.run({"input": value})
    platform.fleet.add(capacity=1)
    assert (await platform.take()).json()["input"] == value
    assert job_id


# Idempotency-Key


@pytest.fixture(params=["memory", "sqlite"])
async def platform(make_platform, request):
    """The same on every store that a test can have for nothing."""
    holds = {"take_hold_s": 1, "stop_hold_s": 1}
    async with make_platform(jobs=holds, sqlite=request.param == "sqlite") as made:
        yield made


async def submit(platform, name, body=b'{"input": 1}', verb="/run", **arguments):
    headers = {"idempotency-key": name}
    return await platform.call("POST", verb, content=body, headers=headers, **arguments)


async def test_repetition_answers_the_same_job(platform):
    first, again = await submit(platform, "order-1"), await submit(platform, "order-1")
    other = await submit(platform, "order-2")
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert other.json()["id"] != first.json()["id"]
    assert (await platform.call("GET", "/health")).json()["jobs"]["inQueue"] == 2


async def test_many_repetitions_at_once_make_one_job(platform):
    answers = await asyncio.gather(*(submit(platform, "same") for _ in range(20)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 19


async def test_repetition_shows_how_far_the_job_is(platform):
    platform.fleet.add(capacity=1)
    job_id = (await submit(platform, "k")).json()["id"]
    await platform.take()
    assert (await submit(platform, "k")).json() == {"id": job_id, "status": "IN_PROGRESS"}
    await platform.done(job_id, {"output": 1})
    assert (await submit(platform, "k")).json() == {"id": job_id, "status": "COMPLETED"}


async def test_repeated_runsync_waits_for_the_first_one(platform):
    """A client that lost its connection gets the result of the job that it started."""
    platform.fleet.add(capacity=1)
    first = asyncio.create_task(submit(platform, "k", verb="/runsync"))
    job_id = (await platform.take()).json()["id"]
    again = asyncio.create_task(submit(platform, "k", verb="/run_sync?wait=60000"))
    await platform.watched()
    await platform.done(job_id, {"output": 7})
    answers = [(await call).json() for call in (first, again)]
    assert [(answer["id"], answer["output"]) for answer in answers] == [(job_id, 7)] * 2
    assert (await again).headers["idempotency-replayed"] == "true"


async def test_same_key_for_something_else_is_a_conflict(platform):
    """Another body or another route is no repetition: 409 and no job."""
    await submit(platform, "k")
    for arguments in ({"body": b'{"input": 2}'}, {"body": b'{"input":1}'}, {"verb": "/runsync"}):
        answer = await submit(platform, "k", **arguments)
        assert answer.status_code == 409
        assert answer.json().keys() == {"error", "detail"}
    assert (await platform.call("GET", "/health")).json()["jobs"]["inQueue"] == 1
    assert [record.status for record in platform.records] == [409, 409, 409]


async def test_keys_of_others_do_not_meet(platform):
    """An idempotency key means something within one API key and one endpoint."""
    answers = [
        await submit(platform, "k"),
        await submit(platform, "k", body=b'{"input": 2}', key="rpa_RUNNER"),
        await submit(platform, "k", body=b'{"input": 3}', endpoint="ep2"),
    ]
    assert len({answer.json()["id"] for answer in answers}) == 3


async def test_repetition_needs_no_room_in_the_queue(make_platform):
    """A client that asks again whether its job was taken is not told that the queue is full."""
    async with make_platform(limits={"queue_jobs": 1}) as platform:
        first = await submit(platform, "k")
        again = await submit(platform, "k")
        assert (again.status_code, again.json()) == (200, first.json())
        assert again.headers["idempotency-replayed"] == "true"
        assert (await submit(platform, "k", body=b'{"input": 2}')).status_code == 409
        assert (await submit(platform, "other")).status_code == 429


async def test_key_is_free_again_when_its_job_has_expired(platform):
    platform.fleet.add(capacity=1)
    job_id = (await submit(platform, "k")).json()["id"]
    await platform.take()
    await platform.done(job_id, {"output": 1})
    platform.clock.advance(1801)
    answer = await submit(platform, "k")
    assert answer.json()["id"] != job_id
    assert "idempotency-replayed" not in answer.headers


@pytest.mark.parametrize("key", [b"", b"x" * 256, b"with space", b"tab\there", "schlüssel".encode()])
async def test_keys_that_are_refused(platform, key):
    answer = await submit(platform, key)
    assert answer.status_code == 400
    assert "Idempotency-Key must be 1 to 255 visible ASCII characters" in answer.json()["error"]
    assert (await submit(platform, b"x" * 255)).status_code == 200


def test_numbers_that_no_worker_can_read():
    """worker-protocol.md §3.2: one of them would spoil the whole answer that it is handed out with."""
    longest, text = b"9" * 4300, b"9" * 20_000
    assert parse_submission(b'{"input": {"n": %b, "t": "%b"}}' % (longest, text)).input
    for body in (b'{"input": 1%b}' % longest, b'{"input": [%b, "\\ud800"]}' % text):
        with pytest.raises(InvalidInputError):
            parse_submission(body)
    with pytest.raises(InvalidInputError):
        parse_submission(b'{"input": ["\\ud800", 1e999]}')
