"""What a fixed engine says about itself."""

from __future__ import annotations

import json
import urllib.request
from functools import partial

from pilotlight.errors import InvalidInputError
from pilotlight.management.problems import UnavailableError
from pilotlight.threads import call_in_thread

TIMEOUT_S = 5.0
"""How long a fixed engine may take to name its models."""

_ANSWER_BYTES_MAX = 1024 * 1024


async def served_model(engine_url: str) -> str:
    """The first model that an OpenAI-compatible server lists.

    Args:
        engine_url: Its base URL.

    Raises:
        UnavailableError: It does not answer; the caller may name the model instead.
        InvalidInputError: It answers, but with no list of models.
    """
    try:
        content = await call_in_thread(partial(_read, f"{engine_url}/v1/models"), name="ask-engine")
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UnavailableError(
            f"engine_url {engine_url} does not answer at /v1/models ({reason}); start it, or send model too"
        ) from error
    try:
        name = json.loads(content)["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        msg = f"engine_url {engine_url} lists no models at /v1/models; send model as well"
        raise InvalidInputError(msg, field="engine_url") from error
    return str(name)


def _read(url: str) -> bytes:
    # An engine on the same machine or network is never reached through the proxy of the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=TIMEOUT_S) as answer:
        content: bytes = answer.read(_ANSWER_BYTES_MAX)
    return content
