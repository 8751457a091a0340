"""Uploads to an S3 server that checks signatures, and to one that refuses in every way."""

from __future__ import annotations

import json

import pytest
from aiohttp import web

from pilotlight.net import GuardedHttp
from pilotlight.net.s3 import S3Uploader, UploadError, parse_config
from pilotlight.system import SystemClock

CONFIG = {
    "accessId": "AKIDEXAMPLE",
    "accessSecret": "very/secret+key",
    "bucketName": "results",
    "endpointUrl": "https://s3.example.com",
}


@pytest.fixture
async def make():
    opened = []

    def build(*, allow_private=True, timeout_s=30, clock=None):
        opened.append(GuardedHttp(allow_private=allow_private))
        return S3Uploader(http=opened[-1], clock=clock or SystemClock(), timeout_s=timeout_s)

    yield build
    for http in opened:
        await http.close()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("pilotlight.net.s3._PAUSE_S", 0)


def encoded(config, **changes):
    return json.dumps({**config, **changes}).encode()


def read_back(server, key):
    with server.client() as client:
        answer = client.get_object(Bucket="results", Key=key)
        with answer["Body"] as body:
            return answer["ContentType"], body.read()


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("", "job-1-u1.json"),
        ("runs/2026", "runs/2026/job-1-u1.json"),
        ("/runs/", "runs/job-1-u1.json"),
        ("a b/ü+~(1)@:=&!$,;'", "a b/ü+~(1)@:=&!$,;'/job-1-u1.json"),
    ],
)
@pytest.mark.timeout(300)
async def test_a_real_server_accepts_and_returns_it(make, s3_server, prefix, key):
    body = json.dumps({"text": "x" * (2 << 20)}).encode()
    place = await make().upload("job-1-u1", encoded(s3_server.config(objectPath=prefix)), body)
    assert place["bucketName"] == "results"
    assert place["key"] == key
    assert place["bytes"] == len(body)
    assert place["url"].startswith(f"{s3_server.url}/results/")
    assert read_back(s3_server, key) == ("application/json", body)


@pytest.mark.timeout(300)
async def test_a_real_server_refuses_a_wrong_secret(make, s3_server):
    config = encoded(s3_server.config(accessSecret="another-secret"))
    with pytest.raises(UploadError, match="403 SignatureDoesNotMatch") as caught:
        await make().upload("j", config, b"{}")
    assert "another-secret" not in str(caught.value)
    assert s3_server.access_id not in str(caught.value)


@pytest.mark.timeout(300)
async def test_a_real_server_refuses_an_unknown_key_and_an_unknown_bucket(make, s3_server):
    with pytest.raises(UploadError, match="403 InvalidAccessKeyId"):
        await make().upload("j", encoded(s3_server.config(accessId="nobody")), b"{}")
    with pytest.raises(UploadError, match="404 NoSuchBucket"):
        await make().upload("j", encoded(s3_server.config(bucketName="missing")), b"{}")


def refusal(status, code, message="", region="", headers=None):
    region = f"<Region>{region}</Region>" if region else ""
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message>{region}</Error>'
    return web.Response(status=status, text=text, content_type="application/xml", headers=headers)


async def put(uploader, receiver, **changes):
    config = encoded(CONFIG, endpointUrl=f"http://127.0.0.1:{receiver.port}", **changes)
    return await uploader.upload("job", config, b'{"a":1}')


async def test_the_request(make, receiver):
    place = await put(make(), receiver, objectPath="p")
    (request,) = receiver.requests
    assert (request.method, request.path, request.body) == ("PUT", "/results/p/job.json", b'{"a":1}')
    assert request.headers["Content-Type"] == "application/json"
    assert place == {
        "bucketName": "results",
        "key": "p/job.json",
        "url": f"http://127.0.0.1:{receiver.port}/results/p/job.json",
        "bytes": 7,
    }


async def test_the_right_region_is_learnt_from_the_refusal(make, receiver):
    answers = [
        refusal(400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong", "eu-west-1"),
        web.Response(),
    ]
    receiver.answer = lambda request: answers.pop(0)
    await put(make(), receiver)
    first, second = (request.headers["Authorization"] for request in receiver.requests)
    assert "/us-east-1/s3/" in first
    assert "/eu-west-1/s3/" in second


async def test_what_is_broken_for_a_moment_is_tried_again(make, receiver):
    answers = [refusal(503, "SlowDown", "reduce your rate"), refusal(500, "InternalError"), web.Response()]
    receiver.answer = lambda request: answers.pop(0)
    await put(make(), receiver)
    assert len(receiver.requests) == 3


async def test_what_stays_broken_is_given_up(make, receiver):
    receiver.answer = lambda request: refusal(503, "SlowDown", "reduce your rate")
    with pytest.raises(UploadError, match=r"^127\.0\.0\.1 answered HTTP 503 SlowDown: reduce your rate$"):
        await put(make(), receiver)
    assert len(receiver.requests) == 3


async def test_refusals_are_told_without_credentials_and_control_characters(make, receiver):
    message = "key AKIDEXAMPLE\n\x1b[31m with very/secret+key is wrong"
    receiver.answer = lambda request: refusal(403, "AccessDenied", message)
    with pytest.raises(UploadError) as caught:
        await put(make(), receiver)
    text = str(caught.value)
    assert "AccessDenied" in text
    assert "AKIDEXAMPLE" not in text
    assert "very/secret+key" not in text
    assert text.isprintable()
    assert len(receiver.requests) == 1


async def test_a_redirect_without_a_region_is_a_failure(make, receiver):
    receiver.answer = lambda request: web.Response(status=307, headers={"Location": "http://127.0.0.1:1/"})
    with pytest.raises(UploadError, match="HTTP 307"):
        await put(make(), receiver)


async def test_private_addresses_are_refused(make, receiver):
    with pytest.raises(UploadError, match=r"s3Config\.endpointUrl: 127\.0\.0\.1 is not a public address"):
        await put(make(allow_private=False), receiver)
    assert receiver.requests == []


async def test_the_time_is_bounded(make, receiver):
    receiver.hang()
    with pytest.raises(UploadError, match=r"longer than 0\.3 s|no answer within 0\.3 s"):
        await put(make(timeout_s=0.3), receiver)


@pytest.mark.parametrize(
    ("endpoint", "region"),
    [
        ("https://s3.eu-central-1.amazonaws.com", "eu-central-1"),
        ("https://s3-us-gov-west-1.amazonaws.com", "us-gov-west-1"),
        ("https://s3.dualstack.ap-southeast-2.amazonaws.com", "ap-southeast-2"),
        ("https://bucket.s3.us-west-2.amazonaws.com", "us-west-2"),
        ("https://s3.us-west-002.backblazeb2.com", "us-west-002"),
        ("https://s3.amazonaws.com", ""),
        ("https://account.r2.cloudflarestorage.com", ""),
        ("http://minio.internal:9000", ""),
    ],
)
def test_the_region_in_the_host(endpoint, region):
    assert parse_config(encoded(CONFIG, endpointUrl=endpoint)).region == region


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({}, "/results/k.json"),
        ({"endpointUrl": "https://x.example/storage/v1/s3/"}, "/storage/v1/s3/results/k.json"),
        ({"bucketName": "b", "endpointUrl": "https://b.s3.us-west-2.amazonaws.com"}, "/k.json"),
    ],
)
def test_the_path_of_an_object(changes, path):
    assert parse_config(encoded(CONFIG, **changes)).path("k.json") == path


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"nonsense", "not valid JSON"),
        (b"[]", "must be an object"),
        (encoded(CONFIG, accessId=None), "s3Config.accessId"),
        (encoded(CONFIG, accessSecret=""), "s3Config.accessSecret"),
        (encoded(CONFIG, accessSecret="a\r\nb"), "s3Config.accessSecret"),
        (encoded(CONFIG, bucketName=5), "s3Config.bucketName"),
        (encoded(CONFIG, bucketName="../other"), "s3Config.bucketName"),
        (encoded(CONFIG, endpointUrl="s3.example.com"), "s3Config.endpointUrl"),
        (encoded(CONFIG, endpointUrl="http://["), "s3Config.endpointUrl"),
        (encoded(CONFIG, endpointUrl="https://x/?a=b"), "s3Config.endpointUrl"),
        (encoded(CONFIG, objectPath=["a"]), "s3Config.objectPath"),
    ],
)
def test_a_config_that_cannot_be_used_names_the_field(raw, named):
    with pytest.raises(UploadError, match=named.replace(".", r"\.")) as caught:
        parse_config(raw)
    assert "secret+key" not in str(caught.value)


def test_the_secret_is_not_shown():
    assert "secret+key" not in repr(parse_config(encoded(CONFIG)))
