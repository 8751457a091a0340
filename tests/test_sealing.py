"""The installation's secret: its file, what is derived from it, and what it seals."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from pilotlight.errors import SettingsError
from pilotlight.sealing import InstallationSecret, UnsealError, open_secret


def test_it_is_made_once_and_only_for_its_owner(tmp_path):
    path = tmp_path / "home" / "secret.key"
    first = open_secret(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(bytes.fromhex(path.read_text())) == 32
    assert [file.name for file in path.parent.iterdir()] == ["secret.key"]
    again = open_secret(path)
    assert again.webhook_secret("e") == first.webhook_secret("e")
    assert again.unseal("j", first.seal("j", b"x")) == b"x"


_PROGRAM = """
import sys
from pathlib import Path
from pilotlight.sealing import open_secret
sys.stdin.read()
print(open_secret(Path(sys.argv[1])).webhook_secret("e"))
"""


def test_processes_that_start_together_get_the_same(tmp_path):
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "secret.key")]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for process in processes:
        process.stdin.close()
        process.stdin = None
    secrets = {process.communicate()[0] for process in processes}
    assert len(secrets) == 1
    assert secrets.pop().strip()


@pytest.mark.parametrize("content", ["", "nonsense", "ab" * 31, "ab" * 33, "zz" * 32])
def test_a_file_that_holds_something_else_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "secret.key"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"secret\.key must hold 64 hexadecimal digits"):
        open_secret(path)
    assert path.read_text() == content


def test_a_file_that_cannot_be_made_or_read_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"file/secret\.key cannot be used: "):
        open_secret(tmp_path / "file" / "secret.key")
    (tmp_path / "bytes.key").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"bytes\.key cannot be used: it is not text"):
        open_secret(tmp_path / "bytes.key")


def test_webhook_secrets_differ_by_endpoint_and_installation():
    one, other = InstallationSecret(bytes(32)), InstallationSecret(bytes(31) + b"\x01")
    secrets = {one.webhook_secret("a"), one.webhook_secret("b"), other.webhook_secret("a")}
    assert len(secrets) == 3
    assert all(secret.startswith("whsec_") and len(secret) == 70 for secret in secrets)


def test_a_webhook_secret_stays_the_same_over_versions():
    """Receivers keep it: HKDF-SHA256 without salt over the secret, info `pilotlight webhook v1 <id>`."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"pilotlight webhook v1 ep1"
    expected = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(bytes(range(32)))
    assert InstallationSecret(bytes(range(32))).webhook_secret("ep1") == f"whsec_{expected.hex()}"


def test_what_is_sealed_shows_nothing_and_never_looks_the_same():
    secret = InstallationSecret(os.urandom(32))
    config = b'{"accessId":"AKIA","accessSecret":"s3cr3t"}'
    sealed = {secret.seal("job", config) for _ in range(100)}
    assert len(sealed) == 100
    assert not any(b"AKIA" in one or b"s3cr3t" in one for one in sealed)
    assert {secret.unseal("job", one) for one in sealed} == {config}


def test_it_opens_only_for_its_job_with_its_secret_and_undamaged():
    secret = InstallationSecret(bytes(32))
    sealed = secret.seal("job", b"data")
    damaged = [sealed[:-1], sealed[:5], b"", b"\x02" + sealed[1:], sealed[:-1] + bytes([sealed[-1] ^ 1])]
    attempts = [(secret, "other", sealed), (InstallationSecret(bytes(31) + b"\x01"), "job", sealed)]
    for opener, job_id, data in [*attempts, *((secret, "job", one) for one in damaged)]:
        with pytest.raises(UnsealError, match="s3Config can no longer be read"):
            opener.unseal(job_id, data)


def test_it_never_shows_itself():
    assert "00" not in repr(InstallationSecret(bytes(32)))
