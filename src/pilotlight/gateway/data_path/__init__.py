"""The data path: `/v2/{endpoint}/openai/…`, passed straight between client and engine.

`road.DataPath` begins an `exchange.OpenAIExchange` for each request: a state machine of callbacks, in which
everything that happens to a request can be read. `answer` is the head of an answer, `refusals` what is said
when there is none.
"""

from __future__ import annotations

from pilotlight.gateway.data_path.refusals import StartFailedError
from pilotlight.gateway.data_path.road import DataPath

__all__ = ["DataPath", "StartFailedError"]
