"""TLS: what is refused at the start, and every road of the server over it, by a certificate made here."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import ssl

import aiohttp
import httpx
import pytest
from aiohttp import web

from pilotlight.domain.endpoint import Endpoint, EndpointKind, Revision
from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Registration
from pilotlight.errors import SettingsError
from pilotlight.gateway import connection
from pilotlight.gateway.realtime import RealtimeRoad
from pilotlight.serving import Certificate, Server, listen, server_config
from pilotlight.settings import ServerSettings, Settings, load_settings

from ..certificates import Pair  # noqa: TID252
from .conftest import ADMIN, RUN
from .test_realtime import converse

CHAT = "/v2/ep/openai/v1/chat/completions"
BODY = {"model": "org/model", "messages": [{"role": "user", "content": "hi"}]}
LB = "lbendpoint1234"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("pair"))


class Site:
    """The rig of the data path behind TLS."""

    def __init__(self, rig, listening, server, trust):
        self.rig = rig
        self.listening = listening
        self.server = server
        self.trust = trust
        self.url = listening.url
        self.port = int(listening.url.rpartition(":")[2])

    async def open(self, **more):
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.trust, **more)

    def request(self, body, *, fields=""):
        data = json.dumps(body)
        return (
            f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {RUN}\r\n{fields}"
            f"Content-Length: {len(data)}\r\n\r\n{data}"
        ).encode()


@pytest.fixture
async def site(rig, tmp_path, pair):
    rig.app._realtime = RealtimeRoad(rig.data_path, lambda _: True)
    server_settings = ServerSettings(port=0, tls_cert=pair.certificate, tls_key=pair.key)
    listening = listen(Settings(home=tmp_path, server=server_settings))
    server = Server(server_config(rig.app), listening.secured)
    task = asyncio.create_task(server.serve(sockets=[listening.plain]))
    await server.answering.wait()
    made = Site(rig, listening, server, pair.trust())
    async with httpx.AsyncClient(
        verify=made.trust, base_url=made.url, headers={"authorization": f"Bearer {RUN}"}, timeout=30
    ) as made.client:
        yield made
    server.should_exit = True
    await task
    listening.close()


async def answer(reader):
    """One answer with a length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    return int(head.split()[1]), await reader.readexactly(length)


# The certificate.


def broken(pair, folder, part, content):
    """The files of a pair, one of which is replaced; None removes it."""
    files = {"certificate": folder / "c.pem", "key": folder / "k.pem"}
    for name, path in files.items():
        shutil.copy(getattr(pair, name), path)
    if content is None:
        files[part].unlink()
    else:
        files[part].write_bytes(content)
    return files["certificate"], files["key"]


@pytest.mark.parametrize(
    ("part", "content", "says"),
    [
        ("certificate", lambda _: None, r"server\.tls_cert .*c\.pem cannot be read: No such file"),
        ("key", lambda _: None, r"server\.tls_key .*k\.pem cannot be read: No such file"),
        ("certificate", lambda _: b"no PEM", r"server\.tls_cert .*c\.pem holds no certificate"),
        ("key", lambda pair: pair.certificate.read_bytes(), r"server\.tls_key .*k\.pem holds no private key"),
        ("key", lambda pair: pair.locked_key, r"server\.tls_key .*k\.pem is encrypted"),
        (
            "key",
            lambda pair: Pair(pair.key.parent, "other").key.read_bytes(),
            r"k\.pem is not the key of the",
        ),
    ],
)
def test_a_certificate_that_cannot_be_used_is_refused_with_its_file_and_the_reason(
    pair, tmp_path, part, content, says
):
    with pytest.raises(SettingsError, match=says):
        Certificate(*broken(pair, tmp_path, part, content(pair)))


def test_a_file_that_may_not_be_read_is_named(pair, tmp_path):
    folder = tmp_path / "k.pem"
    folder.mkdir()
    with pytest.raises(SettingsError, match=r"server\.tls_key .*k\.pem cannot be read: Is a directory"):
        Certificate(pair.certificate, folder)


@pytest.mark.parametrize("name", ["CERT", "KEY"])
def test_one_of_the_two_settings_alone_is_refused(monkeypatch, tmp_path, pair, name):
    monkeypatch.setenv("PILOTLIGHT_HOME", str(tmp_path))
    monkeypatch.setenv(f"PILOTLIGHT_SERVER__TLS_{name}", str(pair.certificate))
    with pytest.raises(SettingsError, match="set both for TLS, or none"):
        load_settings()


async def test_a_renewed_certificate_is_met_by_new_connections_and_a_broken_one_by_nobody(
    site, pair, tmp_path, monkeypatch
):
    certificate = site.listening.secured[1]
    files = [tmp_path / "c.pem", tmp_path / "k.pem"]
    monkeypatch.setattr(certificate, "_certificate", files[0])
    monkeypatch.setattr(certificate, "_key", files[1])
    other = Pair(tmp_path, "renewed")
    files[0].write_bytes(other.certificate.read_bytes())
    files[1].write_bytes(pair.key.read_bytes())
    certificate.renew()  # The key has not been written yet.
    _, writer = await site.open()
    files[1].write_bytes(other.key.read_bytes())
    certificate.renew()
    site.trust = other.trust()
    _, renewed = await site.open()
    assert renewed.get_extra_info("peercert")["subject"] == ((("commonName", "renewed"),),)
    assert writer.get_extra_info("peercert")["subject"] == ((("commonName", "gateway"),),)
    for each in (writer, renewed):
        each.close()


# The connection.


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_tls_1_2_is_the_oldest_version_and_plain_http_gets_nothing(site, pair, caplog):
    for version, spoken in (("TLSv1_2", "TLSv1.2"), ("TLSv1_3", "TLSv1.3")):
        site.trust.maximum_version = ssl.TLSVersion[version]
        _, writer = await site.open()
        assert writer.get_extra_info("ssl_object").version() == spoken
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() is None
        writer.close()
    old = pair.trust()
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    site.trust = old
    with caplog.at_level(logging.WARNING), pytest.raises((ssl.SSLError, ConnectionError)):
        await site.open()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
    async with asyncio.timeout(20):
        assert b"HTTP/1.1" not in await reader.read()
    writer.close()
    assert caplog.records == []


async def test_the_loopback_door_is_plain_and_the_same_gateway(site):
    assert site.listening.local_url.startswith("http://127.0.0.1:")
    assert site.url == f"https://127.0.0.1:{site.port}"
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{site.listening.local_url}/health")).status_code == 200
    assert (await site.client.get("/health")).status_code == 200


async def test_requests_and_streams_share_a_connection_that_is_never_written_past_its_tls(site):
    site.rig.open_worker()
    reader, writer = await site.open()
    async with asyncio.timeout(20):
        for _ in range(3):
            # From the second on, head and answer take the lane of heads that repeat.
            writer.write(site.request(BODY))
            status, body = await answer(reader)
            assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "hi")
        writer.write(site.request(BODY | {"stream": True}) + site.request(BODY))
        stream = await reader.readuntil(b"0\r\n\r\n")
        assert [b'"content":"%d"' % n in stream for n in range(4)] == [True, True, True, False]
        assert b"[DONE]" in stream
        assert (await answer(reader))[0] == 200
    descriptors = {each.scheme: each._descriptor for each in site.server.server_state.connections}
    assert descriptors == {"https": None}
    async with httpx.AsyncClient() as client:
        await client.get(f"{site.listening.local_url}/health")
        plain = {each.scheme: each._descriptor for each in site.server.server_state.connections}
    assert isinstance(plain["http"], int)
    writer.close()


async def test_events_come_as_they_are_made(site):
    site.rig.open_worker()
    more = asyncio.Event()

    async def stream(request, body):
        return await site.rig.engine.stream(request, json.loads(body), then=lambda _: more.wait())

    site.rig.engine.script["/v1/chat/completions"] = stream
    async with site.client.stream("POST", CHAT, json=BODY | {"stream": True}) as made:
        lines = made.aiter_lines()
        events = []
        while len(events) < 3:
            if line := await anext(lines):
                events.append(line)
        more.set()
        assert [line async for line in lines if line] == ["data: [DONE]"]
    assert (await site.rig.row()).tokens_out == 3


async def test_a_slow_reader_slows_the_engine_and_loses_nothing(site):
    """The engine's 32 MB are neither kept by the gateway nor cut."""
    site.rig.open_worker()
    total, sent, stuck, go_on = 32, 0, asyncio.Event(), asyncio.Event()
    piece = b'data: {"choices":[{"index":0,"delta":{"content":"%06d"}}],"pad":"' + b"x" * 2**20 + b'"}\n\n'

    async def stream(request, _body):
        nonlocal sent
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(total):
            writing = asyncio.ensure_future(response.write(piece % number))
            await asyncio.wait({writing}, timeout=0.5)
            if not writing.done():
                stuck.set()
                await go_on.wait()
            await writing
            sent += 1
        await response.write(b"data: [DONE]\n\n")
        return response

    site.rig.engine.script["/v1/chat/completions"] = stream
    reader, writer = await site.open(limit=2**16)
    writer.write(site.request(BODY | {"stream": True}))
    async with asyncio.timeout(30):
        await stuck.wait()
        assert sent < total / 2
        go_on.set()
        data = bytearray()
        while not data.endswith(b"0\r\n\r\n"):
            data += await reader.read(2**20)
    numbers = [int(number) for number in re.findall(rb'"content":"(\d{6})"', data)]
    assert numbers == list(range(total))
    writer.close()


async def test_a_whole_answer_reaches_a_slow_client_though_the_connection_is_closed_behind_it(site):
    site.rig.open_worker()
    body = os.urandom(3_000_000)

    async def large(_request, _body):
        return web.Response(body=body)

    site.rig.engine.script["/v1/chat/completions"] = large
    reader, writer = await site.open(limit=2**16)
    writer.write(site.request(BODY, fields="Connection: close\r\n"))
    async with asyncio.timeout(30):
        assert await answer(reader) == (200, body)
        assert await reader.read() == b""
    writer.close()


class Sender(asyncio.Protocol):
    """Sends and keeps what comes, whatever becomes of the connection."""

    def __init__(self):
        self.got = bytearray()
        self.told = asyncio.Event()
        self.ended = asyncio.Event()

    def data_received(self, data):
        self.got += data
        self.told.set()

    def connection_lost(self, exc):
        self.ended.set()


async def test_a_client_that_sends_too_much_reads_its_answer_before_the_end(site, monkeypatch):
    """The connection lingers while the rest of the body comes, and then ends."""
    monkeypatch.setattr(connection, "LINGER_S", 0.2)
    site.rig.open_worker()
    request = site.request(BODY).replace(b"Content-Length: ", b"Content-Length: 30000")
    loop = asyncio.get_running_loop()
    transport, sender = await loop.create_connection(Sender, "127.0.0.1", site.port, ssl=site.trust)
    async with asyncio.timeout(20):
        transport.write(request + b"x" * 200_000)
        await sender.told.wait()
        transport.write(b"x" * 200_000)
        await sender.ended.wait()
    head, _, body = bytes(sender.got).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert json.loads(body)["error"]["code"] == "payload_too_large"


async def test_a_client_that_vanishes_aborts_its_stream(site):
    site.rig.open_worker()

    async def stream(request, body):
        return await site.rig.engine.stream(request, json.loads(body), then=lambda _: asyncio.Event().wait())

    site.rig.engine.script["/v1/chat/completions"] = stream
    reader, writer = await site.open()
    writer.write(site.request(BODY | {"stream": True}))
    async with asyncio.timeout(20):
        await reader.readuntil(b'"content":"2"')
        writer.transport.abort()
        assert (await site.rig.row()).outcome is Outcome.DISCONNECTED
        await site.rig.engine.aborted.wait()
    assert site.rig.slots.worker("w1").occupied == 0


async def test_an_idle_client_does_not_hold_up_the_end(site, caplog):
    """It answers the end of TLS only when it uses its connection next."""
    assert (await site.client.get("/health")).status_code == 200
    assert len(site.server.server_state.connections) == 1
    site.server.should_exit = True
    async with asyncio.timeout(20):
        while site.server.server_state.connections:
            await asyncio.sleep(0.01)
    assert caplog.records == []


async def test_websockets_pass_over_tls(site):
    site.rig.engine.script["/v1/realtime"] = converse
    site.rig.open_worker()
    audio = bytes(range(256)) * 16_000
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as client,
        client.ws_connect(
            f"{site.url}/v2/ep/openai/v1/realtime",
            ssl=site.trust,
            headers={"authorization": RUN},
            max_msg_size=0,
        ) as talk,
    ):
        await talk.receive()
        sending = asyncio.create_task(talk.send_bytes(audio))
        assert await talk.receive_bytes() == audio[::-1]
        await sending
    assert (await site.rig.row()).status == 101


async def test_a_load_balanced_worker_is_told_of_https(site):
    revision = Revision(endpoint_id=LB, version=1, model="", command=("x",), env={})
    await site.rig.store.add_endpoint(
        Endpoint(id=LB, name=LB, kind=EndpointKind.LOAD_BALANCER, revision=revision)
    )
    await site.rig.directory.refresh()
    site.rig.slots.open_worker(LB, "lb1", capacity=2, registration=Registration(engine=site.rig.address))

    async def tell(request, _body):
        return web.json_response(dict(request.headers))

    async def tell_socket(request, _body):
        talk = web.WebSocketResponse()
        await talk.prepare(request)
        await talk.send_json(dict(request.headers))
        await talk.close()
        return talk

    site.rig.engine.script |= {"/about": tell, "/ws": tell_socket}
    headers = {"authorization": f"Bearer {ADMIN}"}
    seen = (await site.client.get(f"/lb/{LB}/about", headers=headers)).json()
    assert seen["X-Forwarded-Proto"] == "https"
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as client,
        client.ws_connect(f"{site.url}/lb/{LB}/ws", ssl=site.trust, headers=headers) as talk,
    ):
        assert (await talk.receive_json())["X-Forwarded-Proto"] == "https"
