"""Puts one object into the bucket that a job's `s3Config` names (serverless-api.md §2.3).

Plain PUT with the bucket in the path, which everything that speaks S3 understands. The endpoint is a URL that
a stranger has named, so it goes through the guarded client. Errors say what the bucket said and never
contain credentials.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

from yarl import URL

from pilotlight.core.aws_signature import Credentials, encode_path, signed_headers
from pilotlight.errors import PilotlightError
from pilotlight.net.guarded import Answer, GuardedHttp, RefusedAddressError, UnreachableError
from pilotlight.ports.clock import Clock

_DEFAULT_REGION = "us-east-1"
"""What services without regions expect; Amazon's own names the right one in its refusal."""

_REGION_IN_HOST = re.compile(r"(?:^|\.)s3[.-](?:dualstack\.|fips\.)?([a-z]{2}(?:-[a-z]+)+-\d+)\.")
_TRIES = 3
_PAUSE_S = 1.0
_UPLOADS_MAX = 4
"""Uploads at once; the results they hold are as large as the largest body of a worker."""


class UploadError(PilotlightError):
    """An object that could not be stored; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketConfig:
    """A job's `s3Config`, read.

    Attributes:
        access_id: Name of the key.
        access_secret: The key.
        bucket: The bucket's name.
        endpoint: Base URL of the service, as it is sent.
        prefix: Where in the bucket; "" for its root.
        region: Region, when it is known.
    """

    access_id: str
    access_secret: str = field(repr=False)
    bucket: str
    endpoint: URL
    prefix: str = ""
    region: str = ""

    def key(self, name: str) -> str:
        """The object's key for a file name."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def path(self, key: str) -> str:
        """Encoded path of an object; a host that begins with the bucket's name means that bucket already."""
        bucket = "" if (self.endpoint.host or "").startswith(f"{self.bucket}.") else f"/{self.bucket}"
        return self.endpoint.raw_path.rstrip("/") + encode_path(f"{bucket}/{key}")


def parse_config(raw: bytes) -> BucketConfig:
    """Read an `s3Config`.

    Raises:
        UploadError: Names the field that is missing or unusable, never its value.
    """
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise UploadError("s3Config is not valid JSON") from error
    if not isinstance(fields, dict):
        raise UploadError("s3Config must be an object")
    texts: dict[str, str] = {}
    for name in ("accessId", "accessSecret", "bucketName", "endpointUrl"):
        value = fields.get(name)
        if not isinstance(value, str) or not value.isprintable() or not value.strip():
            raise UploadError(f"s3Config.{name} is missing or not a text")
        texts[name] = value.strip()
    if not texts["accessId"].isascii() or "/" in texts["bucketName"]:
        raise UploadError("s3Config.accessId or s3Config.bucketName has characters that it cannot have")
    prefix = fields.get("objectPath") or ""
    region = fields.get("region") or ""
    if not isinstance(prefix, str) or not isinstance(region, str):
        raise UploadError("s3Config.objectPath and s3Config.region must be texts")
    try:
        endpoint = URL(texts["endpointUrl"])
    except ValueError as error:
        raise UploadError("s3Config.endpointUrl is not a URL") from error
    if endpoint.scheme not in {"http", "https"} or not endpoint.host or endpoint.raw_query_string:
        raise UploadError("s3Config.endpointUrl must be an http or https URL without a query")
    found = _REGION_IN_HOST.search(endpoint.host)
    return BucketConfig(
        access_id=texts["accessId"],
        access_secret=texts["accessSecret"],
        bucket=texts["bucketName"],
        endpoint=endpoint.with_user(None).with_fragment(None),
        prefix=prefix.strip("/"),
        region=region or (found[1] if found else ""),
    )


class S3Uploader:
    """Stores results.

    Args:
        http: Sends to allowed addresses.
        clock: Time, which is part of a signature.
        timeout_s: Longest time for one object, all tries together.
    """

    def __init__(self, *, http: GuardedHttp, clock: Clock, timeout_s: float) -> None:
        self._http = http
        self._clock = clock
        self._timeout_s = timeout_s
        self._room = asyncio.Semaphore(_UPLOADS_MAX)

    async def upload(self, job_id: str, config_bytes: bytes, body: bytes) -> dict[str, object]:
        """Store a job's output as `{objectPath}/{job id}.json` and return where it is.

        Args:
            job_id: Whose output.
            config_bytes: The job's `s3Config`, JSON.
            body: The output, raw JSON.

        Returns:
            `bucketName`, `key`, `url` (without a signature) and `bytes`.

        Raises:
            UploadError: It is not there; the message says why.
        """
        config = parse_config(config_bytes)
        key = config.key(f"{job_id}.json")
        path = config.path(key)
        try:
            async with asyncio.timeout(self._timeout_s), self._room:
                await self._put(config, path, body)
        except TimeoutError as error:
            raise UploadError(f"the upload took longer than {self._timeout_s:g} s") from error
        url = f"{config.endpoint.origin()}{path}"
        return {"bucketName": config.bucket, "key": key, "url": url, "bytes": len(body)}

    async def _put(self, config: BucketConfig, path: str, body: bytes) -> None:
        digest = (await asyncio.to_thread(hashlib.sha256, body)).hexdigest()
        region, reason = config.region or _DEFAULT_REGION, ""
        for number in range(_TRIES):
            if number and not reason.startswith("region"):
                await asyncio.sleep(_PAUSE_S * number)
            try:
                answer = await self._send(config, path, body, digest=digest, region=region)
            except RefusedAddressError as error:
                raise UploadError(f"s3Config.endpointUrl: {error}") from error
            except UnreachableError as error:
                reason = f"{config.endpoint.host}: {error}"
                continue
            if 200 <= answer.status < 300:
                return
            reason = _said(answer, config)
            right = _region_of(answer)
            if right and right != region:
                region, reason = right, f"region {right}: {reason}"
            elif answer.status < 500:
                break
        raise UploadError(reason)

    async def _send(
        self, config: BucketConfig, path: str, body: bytes, *, digest: str, region: str
    ) -> Answer:
        timestamp = datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC).strftime("%Y%m%dT%H%M%SZ")
        origin = config.endpoint.origin()
        headers = signed_headers(
            Credentials(access_id=config.access_id, secret=config.access_secret, region=region),
            method="PUT",
            path=path,
            headers={
                "Host": origin.host_port_subcomponent or "",
                "Content-Type": "application/json",
                "X-Amz-Content-Sha256": digest,
                "X-Amz-Date": timestamp,
            },
            payload_sha256=digest,
            timestamp=timestamp,
        )
        return await self._http.send(
            "PUT", f"{origin}{path}", headers=headers, body=body, timeout_s=self._timeout_s, encoded=True
        )


def _said(answer: Answer, config: BucketConfig) -> str:
    """The bucket's refusal in words, without anything that looks like a credential."""
    code, message = _element(answer.body, "Code"), _element(answer.body, "Message")
    text = ": ".join(filter(None, (f"HTTP {answer.status} {code}".strip(), message)))
    for secret in (config.access_secret, config.access_id):
        text = text.replace(secret, "…")
    return f"{config.endpoint.host} answered {text}"


def _region_of(answer: Answer) -> str:
    """The region that a refusal names as the right one; "" when it names none."""
    named = answer.headers.get("x-amz-bucket-region", "") or _element(answer.body, "Region")
    wrong_region = answer.status in {301, 307} or _element(answer.body, "Code").startswith("Authorization")
    return named if wrong_region and re.fullmatch(r"[a-z0-9-]{2,40}", named) else ""


def _element(body: bytes, name: str) -> str:
    """The text of an XML element, found without a parser: the document is a stranger's."""
    found = re.search(rb"<%s>([^<]{1,300})" % name.encode(), body)
    text = found[1].decode("utf-8", "replace") if found else ""
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()
