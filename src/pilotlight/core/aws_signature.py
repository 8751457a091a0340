"""AWS Signature Version 4 of one request, as S3 and everything that speaks S3 checks it.

Pure; asked by `net.s3`. Source: the description of Signature Version 4 in AWS's general reference; S3's own
rule is that the path is encoded once and not shortened.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

_ALGORITHM = "AWS4-HMAC-SHA256"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Who signs.

    Attributes:
        access_id: Public name of the key.
        secret: The key.
        region: Where the service is.
        service: Which one.
    """

    access_id: str
    secret: str = field(repr=False)
    region: str
    service: str = "s3"


def encode_path(path: str) -> str:
    """A path as S3 signs it: every byte but letters, digits, `-._~` and `/` in percent form."""
    return quote(path, safe="/-._~")


def signed_headers(
    credentials: Credentials,
    *,
    method: str,
    path: str,
    query: str = "",
    headers: Mapping[str, str],
    payload_sha256: str,
    timestamp: str,
) -> dict[str, str]:
    """The headers to send: those given, and the signature over all of them.

    Args:
        credentials: Who signs.
        method: HTTP method.
        path: Encoded path, as it is sent.
        query: Canonical query string.
        headers: Must contain `Host` and `X-Amz-Date`.
        payload_sha256: Hex digest of the body.
        timestamp: `YYYYMMDDTHHMMSSZ`, UTC; the value of `X-Amz-Date`.
    """
    canonical = {name.lower(): " ".join(value.split()) for name, value in headers.items()}
    names = ";".join(sorted(canonical))
    request = "\n".join(
        [
            method,
            path,
            query,
            *(f"{name}:{canonical[name]}" for name in sorted(canonical)),
            "",
            names,
            payload_sha256,
        ]
    )
    scope = f"{timestamp[:8]}/{credentials.region}/{credentials.service}/aws4_request"
    to_sign = "\n".join([_ALGORITHM, timestamp, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{credentials.secret}".encode()
    for part in scope.split("/"):
        key = _mac(key, part)
    return {
        **headers,
        "Authorization": f"{_ALGORITHM} Credential={credentials.access_id}/{scope}, "
        f"SignedHeaders={names}, Signature={_mac(key, to_sign).hex()}",
    }


def _mac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()
