"""What an installation makes once: keys and its secret; how private files are written. For `bootstrap`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import structlog

from pilotlight.client.discovery import KEY_FILE
from pilotlight.domain.key import Scope, hash_secret
from pilotlight.management.keys import add_admin_key
from pilotlight.ports.clock import Clock
from pilotlight.ports.store import KeyStore
from pilotlight.sealing import SECRET_FILE, InstallationSecret, open_secret
from pilotlight.settings import Settings

_log = structlog.get_logger()

ADMIN_KEY_NAME = "admin"
CLI_KEY_NAME = "cli"


@dataclass(frozen=True, slots=True)
class FirstStart:
    """What a first start has to tell once.

    Attributes:
        admin_key: Secret of the admin key; only its hash was stored.
    """

    admin_key: str


async def ensure_keys(store: KeyStore, home: Path, clock: Clock) -> FirstStart | None:
    """Make the admin key and the CLI's own key where they are missing.

    Args:
        store: Remembers keys.
        home: The data folder, in which the CLI finds its key.
        clock: Time.

    Returns:
        What must be told once; None when this is no first start.
    """
    keys = await store.keys()
    cli_file = home / KEY_FILE
    cli_secret = cli_file.read_text().strip() if cli_file.exists() else ""
    if not any(key.hash == hash_secret(cli_secret) for key in keys):
        secret = await add_admin_key(store, CLI_KEY_NAME, clock=clock, entropy=os.urandom)
        write_private(cli_file, secret + "\n")
    if any(key.scope is Scope.ADMIN and key.name != CLI_KEY_NAME for key in keys) or keys:
        return None
    secret = await add_admin_key(store, ADMIN_KEY_NAME, clock=clock, entropy=os.urandom)
    return FirstStart(admin_key=secret)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    draft = path.with_suffix(path.suffix + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    draft.replace(path)


def installation_secret(settings: Settings) -> InstallationSecret:
    """The installation's secret. SettingsError when it cannot be used."""
    path = settings.server.secret_key_file
    if path is None and settings.store.url:
        advice = "gateways that share a store must share the secret: set server.secret_key_file"
        _log.warning("secret_not_shared", path=str(settings.home / SECRET_FILE), advice=advice)
    return open_secret(path or settings.home / SECRET_FILE)
