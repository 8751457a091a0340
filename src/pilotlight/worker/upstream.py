"""The one request that answers a job, and how its answer is shaped.

Pure. `inputs` and `native` make it, `runner` sends it, `outputs` shapes what comes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pilotlight.worker.batching import EVERY_EVENT, BatchSizes
from pilotlight.worker.input_settings import StreamFormat
from pilotlight.worker.parameters import Ignored
from pilotlight.worker.selection import Selection

CHAT_ROUTE: Final = "/v1/chat/completions"
COMPLETION_ROUTE: Final = "/v1/completions"
TOKENIZE_ROUTE: Final = "/tokenize"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamRequest:
    """One HTTP request to the engine and how to shape its answer.

    Attributes:
        method: HTTP method.
        target: Path and query.
        body: JSON body; None = no body.
        form: Send the body as a form with a file (§1.10 rule 5).
        template: Body for `/tokenize`, whose tokens become the prompt (§1.4, `NATIVE_CHAT_MODE=raw`).
        whole_context: `max_tokens` becomes the length of the context, which the engine cuts to what is left.
        native: Shape the answer as §3.4 and §3.5 say; otherwise pass it through (§3.6).
        chat: Native only: the answer is a chat completion.
        as_chat: Native only: the answer is a text completion that is handed out as a chat completion.
        stream: The engine was asked to stream.
        stream_format: Shape of streamed items.
        batch: Sizes of streamed items.
        flush_seconds: How long a streamed item that is not empty waits for the next piece; 0 = for ever.
        selection: What to keep of the answer, where more sequences were asked for than are wanted (§1.7).
        choice_count: Native only: sequences the answer has (`n` times the number of prompts).
        sequences_per_prompt: Native only: `n`.
        ignored: Parameters without effect, to be said once.
    """

    method: str
    target: str
    body: dict[str, Any] | None = None
    form: bool = False
    template: dict[str, Any] | None = None
    whole_context: bool = False
    native: bool = False
    chat: bool = False
    as_chat: bool = False
    stream: bool = False
    stream_format: StreamFormat = StreamFormat.SSE
    batch: BatchSizes = EVERY_EVENT
    flush_seconds: float = 0.0
    selection: Selection | None = None
    choice_count: int = 1
    sequences_per_prompt: int = 1
    ignored: tuple[Ignored, ...] = ()
