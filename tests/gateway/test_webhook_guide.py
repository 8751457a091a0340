"""What `docs/guides/webhooks.md` tells receivers to do, done with a real delivery."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.loops.webhooks import WebhookSender
from pilotlight.net import GuardedHttp
from pilotlight.sealing import InstallationSecret
from pilotlight.settings import WebhookSettings
from pilotlight.stores import MemoryStore
from pilotlight.system import SystemClock
from pilotlight.testing.receiver import receiving

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "webhooks.md"
INSTALLATION = InstallationSecret(bytes(32))
SECRET = INSTALLATION.webhook_secret("ep1")


def snippet(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return found


@pytest.fixture
async def delivery():
    """A delivery as it came: headers and body."""
    store, clock = MemoryStore(), SystemClock()
    sender = WebhookSender(
        store=store,
        http=GuardedHttp(allow_private=True),
        clock=clock,
        settings=WebhookSettings(),
        secret=INSTALLATION.webhook_secret,
    )
    async with receiving() as receiver:
        now_ms = clock.now_ms()
        body = '{"id":"j","output":"é \\u0000"}'.encode()
        await store.put_webhook(
            WebhookDelivery(
                id="j.1", job_id="j", endpoint_id="ep1", url=receiver.url, body=body,
                created_ms=now_ms, next_ms=now_ms,
            )
        )  # fmt: skip
        sender.start()
        await receiver.count(1)
        await sender.stop()
        yield receiver.requests[0]


async def test_the_python_snippet(delivery):
    scope = {}
    exec(compile(snippet("python"), str(GUIDE), "exec"), scope)
    verify, headers, body = scope["verify"], delivery.headers, delivery.body
    assert verify(SECRET, headers, body) is True
    assert verify(INSTALLATION.webhook_secret("ep2"), headers, body) is False
    assert verify(SECRET, headers, body + b" ") is False
    assert verify(SECRET, {}, body) is False
    for stamp in (str(int(time.time()) - 301), str(int(time.time()) + 301), "x", "-1", "٣"):
        assert verify(SECRET, {**headers, "X-Webhook-Timestamp": stamp}, body) is False
    older = {**headers, "X-Webhook-Timestamp": str(int(headers["X-Webhook-Timestamp"]) - 1)}
    assert verify(SECRET, older, body) is False
    assert verify(SECRET, {**headers, "X-Webhook-Signature": "v1=é"}, body) is False


async def test_the_javascript_snippet(delivery):
    node = shutil.which("node")
    if node is None:
        if os.environ.get("CI"):
            pytest.fail("Node.js is missing")
        pytest.skip("Node.js is missing")
    script = snippet("javascript") + (
        "const [secret, timestamp, signature, hex] = process.argv.slice(2);\n"
        "const headers = {'x-webhook-timestamp': timestamp, 'x-webhook-signature': signature};\n"
        "const body = Buffer.from(hex, 'hex');\n"
        "const late = {...headers, 'x-webhook-timestamp': String(Number(timestamp) - 301)};\n"
        "console.log(JSON.stringify([verify(secret, headers, body), verify(secret + 'x', headers, body),\n"
        "  verify(secret, late, body), verify(secret, {}, body)]));\n"
    )
    ran = subprocess.run(
        [
            node, "-", SECRET, delivery.headers["X-Webhook-Timestamp"],
            delivery.headers["X-Webhook-Signature"], delivery.body.hex(),
        ],
        input=script, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.strip() == "[true,false,false,false]"
