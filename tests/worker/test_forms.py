"""Forms for routes that take a file: vllm-worker.md §1.10 rule 5."""

from __future__ import annotations

import base64
from email.parser import BytesParser
from typing import Any

import pytest

from pilotlight.worker import forms
from pilotlight.worker.errors import InputError
from pilotlight.worker.forms import build_form

SOUND = bytes(range(256))
FILE = {
    "filename": "größe.wav",
    "content_base64": base64.b64encode(SOUND).decode(),
    "content_type": "audio/wav",
}


async def parts(body: dict[str, Any]) -> list[tuple[str | None, Any]]:
    """Names and payloads of a form, read by the standard library."""
    payload = build_form(body)()
    head = f"Content-Type: {payload.headers['Content-Type']}\r\n\r\n".encode()
    message = BytesParser().parsebytes(head + await payload.as_bytes())
    return [
        (part.get_param("name", header="content-disposition"), part.get_payload(decode=True))
        for part in message.get_payload()
    ]  # type: ignore[misc]


async def test_a_file_and_its_fields() -> None:
    body = {
        "file": FILE, "model": "m", "temperature": 0.5, "stream": True, "prompt": None,
        "timestamp_granularities": ["word", "segment"], "extra[]": ["x"],
    }  # fmt: skip
    assert await parts(body) == [
        ("file", SOUND),
        ("model", b"m"),
        ("temperature", b"0.5"),
        ("stream", b"true"),
        ("timestamp_granularities[]", b"word"),
        ("timestamp_granularities[]", b"segment"),
        ("extra[]", b"x"),
    ]


async def test_a_file_without_a_name_is_still_a_file() -> None:
    assert await parts({"file": {"content_base64": "AAAA"}}) == [("file", b"\0\0\0")]


@pytest.mark.parametrize(
    "file",
    [
        None,
        "AAAA",
        {},
        {"content_base64": ""},
        {"content_base64": 3},
        {"content_base64": "not base64!"},
        {"content_base64": "AAA"},
        {"content_base64": "AAAA", "filename": "a\r\nX-Evil: 1"},
        {"content_base64": "AAAA", "content_type": "audio/wav\r\n"},
        {"content_base64": "AAAA", "filename": 3},
        {"content_base64": "AAAA", "filename": "x" * 300},
    ],
)
def test_malformed_files_are_refused(file: Any) -> None:
    with pytest.raises(InputError, match="file") as caught:
        build_form({"file": file})
    assert (caught.value.status, caught.value.param) == (400, "file")


def test_a_file_that_is_too_large_is_a_413(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "FILE_BYTES_MAX", 255)
    with pytest.raises(InputError, match="255 bytes") as caught:
        build_form({"file": {"content_base64": base64.b64encode(SOUND + SOUND).decode()}})
    assert (caught.value.status, caught.value.error_type) == (413, "PayloadTooLarge")
