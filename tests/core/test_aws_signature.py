"""Signature Version 4 against the examples in Amazon's S3 documentation ("Signature calculations for the
Authorization header: transferring payload in a single chunk")."""

from __future__ import annotations

import hashlib
import importlib

import pytest

from pilotlight.core.aws_signature import Credentials, encode_path, signed_headers

AMAZON = Credentials(
    access_id="AKIAIOSFODNN7EXAMPLE",
    secret="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    region="us-east-1",
)
HOST = "examplebucket.s3.amazonaws.com"
MOMENT = "20130524T000000Z"
EMPTY = hashlib.sha256(b"").hexdigest()
PUT_BODY = hashlib.sha256(b"Welcome to Amazon S3.").hexdigest()


@pytest.mark.parametrize(
    ("method", "path", "query", "headers", "payload", "signature"),
    [
        (
            "GET",
            "/test.txt",
            "",
            {"Range": "bytes=0-9"},
            EMPTY,
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "PUT",
            "/test%24file.text",
            "",
            {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
            PUT_BODY,
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
        (
            "GET",
            "/",
            "lifecycle=",
            {},
            EMPTY,
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
        ),
        (
            "GET",
            "/",
            "max-keys=2&prefix=J",
            {},
            EMPTY,
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ],
)
def test_amazons_own_examples(method, path, query, headers, payload, signature):
    sent = signed_headers(
        AMAZON,
        method=method,
        path=path,
        query=query,
        headers={"Host": HOST, "X-Amz-Date": MOMENT, "X-Amz-Content-Sha256": payload, **headers},
        payload_sha256=payload,
        timestamp=MOMENT,
    )
    assert sent["Authorization"].endswith(f", Signature={signature}")
    assert sent["Authorization"].startswith(
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, SignedHeaders="
    )


def test_what_botocore_signs():
    """The same request signed by Amazon's own library, with a key that has every awkward character."""
    auth = importlib.import_module("botocore.auth")
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials as BotoCredentials

    path = encode_path("/results/a b/ü+%/~(1)@:=&.json")
    request = AWSRequest(method="PUT", url=f"https://s3.example.com{path}", data=b"{}")
    request.headers["Content-Type"] = "application/json"
    auth.S3SigV4Auth(BotoCredentials("ID", "se/cr+et"), "s3", "eu-central-1").add_auth(request)
    timestamp = request.context["timestamp"]
    digest = request.headers["X-Amz-Content-SHA256"]
    if digest == "UNSIGNED-PAYLOAD":
        payload = digest
    else:
        payload = hashlib.sha256(b"{}").hexdigest()
        assert digest == payload
    sent = signed_headers(
        Credentials(access_id="ID", secret="se/cr+et", region="eu-central-1"),
        method="PUT",
        path=path,
        headers={
            "Host": "s3.example.com",
            "Content-Type": "application/json",
            "X-Amz-Content-SHA256": digest,
            "X-Amz-Date": timestamp,
        },
        payload_sha256=payload,
        timestamp=timestamp,
    )
    assert sent["Authorization"] == request.headers["Authorization"]


def test_the_secret_is_not_shown():
    assert "wJalr" not in repr(AMAZON)
