"""Downloads of the worker program: `models.fetch` in a short process of its own, followed line by line.

Whoever cancels the waiting ends the download; what came until then is kept, and the next one goes on there.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from pilotlight.domain.repository import Repository
from pilotlight.domain.worker import WORKER_COOKIE, Failure
from pilotlight.worker.errors import ModelMissingError

STOP_SECONDS: Final = 3.0
"""How long a download may take to end after it was told to, before it is killed."""

_PASSED: Final = frozenset(
    {
        "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
        "HUGGING_FACE_HUB_TOKEN", WORKER_COOKIE,
    }
)  # fmt: skip
_PASSED_PREFIXES: Final = ("HF_", "XDG_", "PYTHON")


async def fetch_repository(
    repository: Repository,
    *,
    cache: Path,
    environment: Mapping[str, str],
    on_progress: Callable[[int, int], None],
    on_wait: Callable[[str], None],
) -> Path:
    """The folder of a repository's files, downloaded by a process of its own.

    Args:
        repository: What is needed.
        cache: The hub cache.
        environment: The worker's; only tokens, proxies and settings of the client library are passed on.
        on_progress: Told bytes so far and in all, a few times per second.
        on_wait: Told who downloads the same, once per second while that lasts.

    Raises:
        ModelMissingError: It cannot be had; says why, and what to do.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pilotlight.models.fetch", *_arguments(repository, cache)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=fetch_environment(environment),
    )
    assert process.stdout is not None
    last: dict[str, Any] = {}
    try:
        async for line in process.stdout:
            with contextlib.suppress(msgspec.DecodeError):
                last = msgspec.json.decode(line, type=dict[str, Any])
            match last.get("event"):
                case "progress":
                    on_progress(last["done"], last["total"])
                case "waiting":
                    on_wait(last["holder"])
        code = await process.wait()
    finally:
        await _end(process)
    match last.get("event"):
        case "done":
            return Path(last["path"])
        case "failed":
            raise ModelMissingError(Failure(kind=last["kind"], cause=last["cause"], advice=last["advice"]))
    cause = f"the download of {repository} ended with code {code} before it was complete"
    raise ModelMissingError(
        Failure(kind="fetch_failed", cause=cause, advice="The worker's log says more. Try again.")
    )


def fetch_environment(env: Mapping[str, str]) -> dict[str, str]:
    """What of a worker's environment a download may see: no secret but the hub's token."""
    return {
        name: value
        for name, value in env.items()
        if name.upper() in _PASSED or name.startswith(_PASSED_PREFIXES)
    }


def _arguments(repository: Repository, cache: Path) -> list[str]:
    arguments = ["--cache", str(cache), "--kind", str(repository.kind), "--variable", repository.variable]
    if repository.revision is not None:
        arguments.append(f"--revision={repository.revision}")
    arguments += [f"--pattern={pattern}" for pattern in repository.patterns]
    arguments += [f"--ignore={pattern}" for pattern in repository.ignore]
    return [*arguments, "--", repository.name]


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a download that nobody waits for any more; nothing to do when it has ended."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
