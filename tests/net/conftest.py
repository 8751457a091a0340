"""Receivers on loopback, and an S3 server that checks signatures."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.config import Config

from pilotlight.testing.receiver import Receiver, receiving

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as made:
        yield made


@dataclass(frozen=True)
class S3Server:
    """A bucket `results` and a key that may do everything."""

    url: str
    access_id: str
    secret: str

    def config(self, **changes: str) -> dict[str, str]:
        return {
            "accessId": self.access_id,
            "accessSecret": self.secret,
            "bucketName": "results",
            "endpointUrl": self.url,
            **changes,
        }

    @contextlib.contextmanager
    def client(self, service: str = "s3") -> Iterator[Any]:
        made = boto3.client(
            service,
            endpoint_url=self.url,
            aws_access_key_id=self.access_id,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )
        try:
            yield made
        finally:
            made.close()


def with_account(url: str) -> S3Server:
    """The server with a user, its key and a bucket; from then on it checks every signature."""
    anybody = S3Server(url, "anybody", "anything")
    with anybody.client("iam") as iam:
        iam.create_user(UserName="user")
        everything = {"Effect": "Allow", "Action": "*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
        iam.put_user_policy(UserName="user", PolicyName="all", PolicyDocument=policy)
        key = iam.create_access_key(UserName="user")["AccessKey"]
    with anybody.client() as s3:
        s3.create_bucket(Bucket="results")
    httpx.post(f"{url}/moto-api/reset-auth", content="0", trust_env=False).raise_for_status()
    return S3Server(url, key["AccessKeyId"], key["SecretAccessKey"])


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    built = subprocess.run(
        [sys.executable, TOOLS / "clients.py", "moto"], capture_output=True, text=True, check=False
    )
    if built.returncode:
        message = f"no S3 server: {built.stderr}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    program = Path(built.stdout.strip()) / "bin" / "moto_server"
    command = [program, "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    break
            else:
                pytest.fail("the S3 server ended before it listened")
            # Its pipe must not fill up while nobody reads.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield with_account(found[0])
        finally:
            process.kill()
