"""The one question that shows whether an engine works: a request for one token.

Asked at the end of a start, where it pays for lazy initialisation, and after a thaw (`freezing`).
"""

from __future__ import annotations

from typing import Final

import msgspec

from pilotlight.worker.engine import Engine
from pilotlight.worker.upstream import CHAT_ROUTE, COMPLETION_ROUTE

_ONE_TOKEN: Final = {"max_tokens": 1, "temperature": 0}
_QUESTIONS: Final = (
    (CHAT_ROUTE, msgspec.json.encode({"messages": [{"role": "user", "content": "Hello"}], **_ONE_TOKEN})),
    (COMPLETION_ROUTE, msgspec.json.encode({"prompt": "Hello", **_ONE_TOKEN})),
)


async def ask_for_a_token(engine: Engine) -> int:
    """The status of the engine's answer: by chat, or by completion where there is no chat template.

    An engine that generates nothing refuses both, which is an answer, too; one that is broken says 500.

    Raises:
        EngineGoneError: There was no answer.
    """
    status = 0
    for target, body in _QUESTIONS:
        status, _ = await engine.ask("POST", target, body=body)
        if status == 200:
            break
    return status
