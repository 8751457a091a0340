"""The guarded client against real sockets: what is refused, and where connections go."""

from __future__ import annotations

import asyncio
import datetime as dt
import socket
import ssl

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pilotlight.net import GuardedHttp, RefusedAddressError, UnreachableError
from pilotlight.testing.receiver import receiving


class Names:
    """Answers lookups as told, and remembers them; one answer after the other, the last one for good."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def __call__(self, host, port, family=0, type=0):
        self.asked.append(host)
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(addresses, OSError):
            raise addresses
        kind = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(kind[":" in one], socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]


@pytest.fixture
async def make():
    made = []

    def build(**arguments):
        made.append(GuardedHttp(**{"allow_private": False, **arguments}))
        return made[-1]

    yield build
    for http in made:
        await http.close()
        await http.close()


def post(http, url, body=b"{}", **arguments):
    return http.send("POST", url, headers={"X-One": "1"}, body=body, **{"timeout_s": 20, **arguments})


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "0x7f000001", "2130706433", "017700000001", "0", "0.0.0.0", "[::1]",
     "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "169.254.169.254",
     "[fd00:ec2::254]", "10.0.0.1", "192.168.1.1"],
)  # fmt: skip
async def test_literal_addresses_in_every_spelling(make, receiver, host):
    with pytest.raises(RefusedAddressError, match="not a public address"):
        await post(make(), f"http://{host}:{receiver.port}/hook")
    assert receiver.requests == []


@pytest.mark.parametrize(
    "host",
    ["127%2e0%2e0%2e1", "\uff11\uff12\uff17.0.0.1", "①②⑦.0.0.1", "127。0。0。1", "x@127.0.0.1", "127.0.0.1."],
)
async def test_spellings_that_parsers_disagree_about(make, receiver, host):
    with pytest.raises((RefusedAddressError, UnreachableError)):
        await post(make(), f"http://{host}:{receiver.port}/hook")
    assert receiver.requests == []


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST"])
async def test_a_name_of_the_machine_itself(make, receiver, host):
    with pytest.raises(RefusedAddressError):
        await post(make(), f"http://{host}:{receiver.port}/hook")
    assert receiver.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "file:///etc/passwd",
        "example.com",
        "http://",
        "http:///x",
        "http://[",
        "gopher://127.0.0.1/",
    ],
)
async def test_other_schemes_and_no_urls(make, url):
    with pytest.raises(RefusedAddressError):
        await post(make(allow_private=True), url)


async def test_a_name_with_one_private_address_among_public_ones_is_refused(make, receiver):
    http = make(lookup=Names(["93.184.215.14", "127.0.0.1"]))
    with pytest.raises(RefusedAddressError, match=r"127\.0\.0\.1"):
        await post(http, f"http://rebound.example:{receiver.port}/")
    assert receiver.requests == []


async def test_a_name_is_looked_up_once_for_a_request_and_anew_for_the_next(make, receiver):
    """A name server that answers differently each time cannot lead a request past the check."""
    names = Names(["127.0.0.1"], ["10.0.0.1"])
    checked = []
    http = make(allow_private=True, lookup=names)
    http._check = checked.append
    await post(http, f"http://once.example:{receiver.port}/")
    assert names.asked == ["once.example"]
    assert set(checked) == {"127.0.0.1"}

    strict = make(lookup=Names(["127.0.0.1"]))
    with pytest.raises(RefusedAddressError):
        await post(strict, f"http://once.example:{receiver.port}/")


async def test_the_socket_refuses_what_the_lookup_let_through(make, receiver):
    """The last line: no connection to a private address, wherever it came from."""
    http = make(lookup=Names(["127.0.0.1"]))
    http._open().connector._resolver._check = lambda address: None
    with pytest.raises(UnreachableError, match="not a public address"):
        await post(http, f"http://tricky.example:{receiver.port}/")
    assert receiver.requests == []


async def test_private_addresses_can_be_allowed(make, receiver):
    answer = await post(make(allow_private=True), receiver.url, b'{"a":1}')
    assert (answer.status, answer.body) == (200, b"ok")
    (request,) = receiver.requests
    assert (request.method, request.path, request.body) == ("POST", "/hook", b'{"a":1}')
    assert request.headers["Content-Length"] == "7"
    assert request.headers["X-One"] == "1"


async def test_the_path_and_query_are_sent_as_written(make, receiver):
    await post(make(allow_private=True), f"http://127.0.0.1:{receiver.port}/a%2Fb?x=%20y&z=1")
    assert receiver.requests[0].path == "/a%2Fb?x=%20y&z=1"


async def test_the_name_stays_in_the_host_header(make, receiver):
    http = make(allow_private=True, lookup=Names(["127.0.0.1"]))
    await post(http, f"http://hooks.example:{receiver.port}/")
    assert receiver.requests[0].headers["Host"] == f"hooks.example:{receiver.port}"


async def test_redirects_are_not_followed(make, receiver):
    receiver.answer = lambda request: web.Response(status=302, headers={"Location": "/other"})
    answer = await post(make(allow_private=True), receiver.url)
    assert answer.status == 302
    assert len(receiver.requests) == 1


async def test_proxies_of_the_environment_are_not_used(make, receiver, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await post(make(allow_private=True), receiver.url)).status == 200


async def test_an_answer_is_read_up_to_the_bound(make, receiver):
    async def endless(request):
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65536)

    receiver.answer = endless
    answer = await post(make(allow_private=True), receiver.url, read_bytes=1000)
    assert answer.body == b"x" * 1000


async def test_a_large_body_arrives_whole(make, receiver):
    body = bytes(range(256)) * 40_000
    await post(make(allow_private=True), receiver.url, body)
    assert receiver.requests[0].body == body


async def test_a_receiver_that_never_answers(make, receiver):
    receiver.hang()
    with pytest.raises(UnreachableError, match=r"no answer within 0\.2 s"):
        await post(make(allow_private=True), receiver.url, timeout_s=0.2)


async def test_nobody_listens(make):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UnreachableError, match=r"cannot connect: .*refused"):
        await post(make(allow_private=True), f"http://127.0.0.1:{port}/?token=secret")


async def test_a_name_that_does_not_exist(make):
    http = make(lookup=Names(socket.gaierror(socket.EAI_NONAME, "Name or service not known")))
    with pytest.raises(UnreachableError, match="cannot be looked up: Name or service not known"):
        await post(http, "http://nowhere.example/")
    with pytest.raises(UnreachableError, match="no address"):
        await post(make(lookup=Names([])), "http://empty.example/")


async def test_something_that_is_not_http(make):
    async def babble(reader, writer):
        await reader.read(1)
        writer.write(b"220 smtp.example ESMTP\r\n")
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server:
        with pytest.raises(UnreachableError, match="not HTTP"):
            await post(make(allow_private=True), f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")


def certificate(tmp_path, name):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / f"{name}.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


async def test_tls_is_checked_against_the_name_and_not_the_address(make, tmp_path):
    pem = certificate(tmp_path, "hooks.example")
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_tls.load_cert_chain(pem)
    asked = []
    server_tls.sni_callback = lambda _socket, name, _context: asked.append(name)
    trusting = ssl.create_default_context(cafile=str(pem))
    async with receiving(tls=server_tls) as receiver:
        http = make(allow_private=True, lookup=Names(["127.0.0.1"]), tls=trusting)
        assert (await post(http, f"https://hooks.example:{receiver.port}/")).status == 200
        assert asked == ["hooks.example"]
        with pytest.raises(UnreachableError, match="TLS certificate"):
            await post(http, f"https://other.example:{receiver.port}/")
        # Without the test's authority nobody vouches for it.
        distrusting = make(allow_private=True, lookup=Names(["127.0.0.1"]))
        with pytest.raises(UnreachableError, match="TLS certificate"):
            await post(distrusting, f"https://hooks.example:{receiver.port}/")


@pytest.mark.parametrize("how", ["drips", "breaks off"])
async def test_a_status_counts_whatever_becomes_of_the_body(make, receiver, how):
    """serverless-api.md §2.12: with a 200 a webhook has arrived."""

    async def half(request):
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"half")
        if how == "drips":
            await receiver.released.wait()
        request.transport.abort()
        return response

    receiver.answer = half
    answer = await post(make(allow_private=True), receiver.url, timeout_s=1)
    assert answer.status == 200
    assert b"half".startswith(answer.body)
