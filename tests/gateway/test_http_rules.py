"""What a parser takes and the gateway does not; whole connections are driven in tests/http."""

from __future__ import annotations

import pytest

from pilotlight.gateway.http_rules import content_length, fault_of

HOST = (b"host", b"h")


def status(*fields, head=b"POST /x HTTP/1.1\r\n", method=b"POST", version="1.1"):
    fault = fault_of(head, method, b"/x", version, fields)
    return None if fault is None else fault.status


@pytest.mark.parametrize(
    "host",
    [b"h", b"", b"h:80", b"h:", b"127.0.0.1:8400", b"[::1]:8400", b"[fe80::1%25eth0]", b"a-b.example.", b"x%20y", b"h \t"],
)  # fmt: skip
def test_hosts_that_may_be_named(host):
    assert status((b"host", host)) is None


@pytest.mark.parametrize(
    "host", [b"h i", b"h,i", b"h/i", b"u@h", b"h:http", b"h:80:80", b"[::1", b"::1", b"h\xe4", b'"h"', b"h\n"]
)
def test_hosts_that_may_not(host):
    assert status((b"host", host)) == 400


def test_one_host_is_named_unless_the_client_is_old():
    assert status() == 400
    assert status(HOST, HOST) == 400
    old = {"head": b"POST /x HTTP/1.0\r\n", "version": "1.0"}
    assert status(**old) is None
    assert status(HOST, HOST, **old) == 400


@pytest.mark.parametrize(
    ("codings", "expected"),
    [
        ([b"chunked"], None),
        ([b"CHUNKED"], None),
        ([b", chunked ,"], None),
        ([b"chunked", b"chunked"], 400),
        ([b"chunked, gzip"], 400),
        ([b"gzip"], 400),
        ([b""], 400),
        ([b"chunked;q=1"], 400),
        ([b"gzip, chunked"], 501),
        ([b"identity", b"chunked"], 501),
    ],
)
def test_chunked_is_the_only_coding(codings, expected):
    assert status(HOST, *((b"transfer-encoding", coding) for coding in codings)) == expected


@pytest.mark.parametrize(
    ("head", "version", "expected"),
    [
        (b"\r\n\r\nPOST /x HTTP/1.1\r\nA: b", "1.1", None),
        (b"POST /x RTSP/1.1\r\n", "1.1", 400),
        (b"POST  /x HTTP/1.1\r\n", "1.1", 400),
        (b"POST /x HTTP/1.1 \r\n", "1.1", 400),
        (b"POST /x\r\n", "0.9", 505),
        (b"POST /x HTTP/2.0\r\n", "2.0", 505),
    ],
)
def test_a_request_line_has_one_form(head, version, expected):
    assert status(HOST, head=head, version=version) == expected


def test_no_tunnel_is_opened():
    assert status(HOST, head=b"CONNECT /x HTTP/1.1\r\n", method=b"CONNECT") == 501


@pytest.mark.parametrize(
    ("fields", "length"),
    [([HOST], 0), ([(b"content-length", b"5 \t")], 5), ([(b"transfer-encoding", b"chunked")], 0)],
)
def test_the_length_of_a_body_is_known_from_its_head(fields, length):
    assert content_length(fields) == length
