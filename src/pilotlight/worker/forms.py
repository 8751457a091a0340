"""Forms for routes that take a file, made of a job's JSON (`vllm-worker.md` §1.10 rule 5).

Pure. `body.file` is `{"filename": …, "content_base64": …, "content_type": …}`; every other field becomes a
text field, a list one field per member under the name `…[]`, as OpenAI's clients send it.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

import aiohttp
import msgspec

from pilotlight.worker.errors import InputError
from pilotlight.worker.fields import kind_of, read_object

FILE_BYTES_MAX: Final = 25 * 1024 * 1024
"""Largest file; what OpenAI's API takes, and vLLM by default (`VLLM_MAX_AUDIO_CLIP_FILESIZE_MB`)."""


def build_form(body: dict[str, Any]) -> aiohttp.FormData:
    """The form for a job's body.

    Raises:
        InputError: There is no file, or it is malformed or too large (413).
    """
    file = read_object(body, "file")
    if file is None:
        raise InputError(
            "file is missing: an object with filename, content_base64 and content_type", param="file"
        )
    form = aiohttp.FormData(default_to_multipart=True)
    form.add_field(
        "file",
        _content(file),
        filename=_text(file, "filename", "audio"),
        content_type=_text(file, "content_type", "application/octet-stream"),
    )
    for name, value in body.items():
        if name == "file" or value is None:
            continue
        many = isinstance(value, list)
        for one in value if many else (value,):
            form.add_field(f"{name.removesuffix('[]')}[]" if many else name, _field_text(one))
    return form


def _content(file: dict[str, Any]) -> bytes:
    text = file.get("content_base64")
    if not isinstance(text, str) or not text:
        raise InputError(f"file.content_base64 must be the file in base64, not {kind_of(text)}", param="file")
    if len(text) > FILE_BYTES_MAX * 4 // 3 + 4:
        raise InputError(
            f"file is larger than {FILE_BYTES_MAX} bytes",
            status=413,
            error_type="PayloadTooLarge",
            param="file",
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"file.content_base64 is not base64: {error}", param="file") from error


def _text(file: dict[str, Any], key: str, default: str) -> str:
    value = file.get(key)
    if value is None:
        return default
    if not isinstance(value, str) or not value or not value.isprintable() or len(value) > 255:
        raise InputError(f"file.{key} must be a short printable text, not {value!r:.80}", param="file")
    return value


def _field_text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
