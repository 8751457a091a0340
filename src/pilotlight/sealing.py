"""The installation's own secret, and what is derived from it: webhook secrets and the seal of credentials.

The secret is 32 random bytes in a file of the data folder, made at the first start. Whoever has it can read
sealed credentials and sign webhooks; whoever lost it can read no credentials of jobs that wait, and has new
webhook secrets. `bootstrap` opens it; submission seals, a hand-out and an upload unseal.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pilotlight.errors import PilotlightError, SettingsError

_log = structlog.get_logger()

SECRET_FILE = "secret.key"  # noqa: S105 - the name of a file
"""In the data folder, unless a setting names another file."""
SECRET_BYTES = 32

_FORMAT = b"\x01"
"""First byte of what is sealed: AES-256-GCM, nonce of twelve bytes, bound to the job's id."""
_NONCE_BYTES = 12

UNREADABLE = (
    "s3Config can no longer be read: the secret it was sealed with (secret.key) has changed or is gone; "
    "submit the job again"
)
"""Error of a job whose credentials are lost."""


class UnsealError(PilotlightError):
    """Sealed bytes that this secret does not open, or not for this job."""


class InstallationSecret:
    """Derives keys; never shows itself.

    Args:
        secret: 32 random bytes.
        entropy: Random bytes, such as `os.urandom`.
    """

    def __init__(self, secret: bytes, entropy: Callable[[int], bytes] = os.urandom) -> None:
        assert len(secret) == SECRET_BYTES
        self._secret = secret
        self._entropy = entropy
        self._cipher = AESGCM(self._derive(b"seal v1"))

    def __repr__(self) -> str:
        """Nothing of the secret."""
        return "InstallationSecret(…)"

    def webhook_secret(self, endpoint_id: str) -> str:
        """The secret that signs an endpoint's webhooks: `whsec_` and 64 hexadecimal digits."""
        return f"whsec_{self._derive(b'webhook v1 ' + endpoint_id.encode()).hex()}"

    @property
    def installation_id(self) -> str:
        """A name for this installation, the same in every life of it, that tells nothing of the secret."""
        return self._derive(b"installation v1").hex()[:16]

    def seal(self, job_id: str, data: bytes) -> bytes:
        """The data encrypted, readable only with this secret and together with this job's id."""
        nonce = self._entropy(_NONCE_BYTES)
        return _FORMAT + nonce + self._cipher.encrypt(nonce, data, job_id.encode())

    def unseal(self, job_id: str, sealed: bytes) -> bytes:
        """What was sealed for this job.

        Raises:
            UnsealError: Sealed with another secret or for another job, or damaged.
        """
        nonce, data = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        if sealed[:1] != _FORMAT or len(nonce) < _NONCE_BYTES:
            raise UnsealError(UNREADABLE)
        try:
            return self._cipher.decrypt(nonce, data, job_id.encode())
        except InvalidTag:
            raise UnsealError(UNREADABLE) from None

    def _derive(self, purpose: bytes) -> bytes:
        # The secret is uniformly random, so a salt would add nothing (RFC 5869 §3.1).
        return HKDF(
            algorithm=hashes.SHA256(), length=SECRET_BYTES, salt=None, info=b"pilotlight " + purpose
        ).derive(self._secret)


def open_secret(path: Path, entropy: Callable[[int], bytes] = os.urandom) -> InstallationSecret:
    """The secret in a file, which is made when it is missing, readable by its owner only.

    Several processes may come at the same time: all get the same secret.

    Raises:
        SettingsError: The file cannot be read or made, or holds something else.
    """
    try:
        if not path.exists():
            _make(path, entropy(SECRET_BYTES))
        text = path.read_text(encoding="ascii").strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingsError(f"the installation's secret {path} cannot be used: {reason}") from error
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise SettingsError(
            f"the installation's secret {path} must hold {2 * SECRET_BYTES} hexadecimal digits; "
            "put back the file that was there, or delete it to have a new one made "
            "(webhook secrets change, and waiting jobs with s3Config fail)"
        )
    if mode & 0o077:
        _log.warning("secret_file_open", path=str(path), mode=f"{mode:o}", advice=f"chmod 600 {path}")
    return InstallationSecret(secret, entropy)


def _make(path: Path, secret: bytes) -> None:
    """Write the file whole, durable, and only where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{secret.hex()}\n")
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, fails when somebody else was faster; theirs is then the secret.
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(draft)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
