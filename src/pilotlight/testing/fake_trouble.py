"""How the stand-in engine misbehaves for a single request: `"metadata": {"fake_engine": "WHAT"}` in its body.

| what | effect |
|---|---|
| `fail STATUS` | this status, with an error object |
| `garbage` | bytes that are no HTTP |
| `short` | the head of an answer that is longer than what follows it |
| `hang N` | nothing more comes after N events; after 0 nothing at all |
| `cut N` | the connection is reset after N events |
| `error N` | reports an error inside the stream after N events |
| `die N` | the process ends after N events |

Others may use the same process meanwhile, and are served well until it ends.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

from aiohttp import web

_GARBAGE = b"\0\1\2 this is no HTTP at all\r\n\r\n"
_SHORT = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{"id":'


@dataclass(frozen=True, slots=True)
class Trouble:
    """What a request asks for.

    Attributes:
        kind: A word of the table; "" for none.
        number: The number that follows it.
    """

    kind: str = ""
    number: int = 0

    @classmethod
    def of(cls, body: dict[str, Any]) -> Trouble:
        """What this body asks for."""
        metadata = body.get("metadata")
        text = metadata.get("fake_engine", "") if isinstance(metadata, dict) else ""
        kind, _, number = str(text).partition(" ")
        return cls(kind, int(number or 0))

    async def before(self, request: web.Request) -> web.Response | None:
        """Do what is to be done before an answer begins; an answer, if there is one."""
        transport = request.transport
        assert transport is not None
        if self.kind == "fail":
            error = {"message": "asked to fail", "type": "InternalServerError", "param": None}
            return web.json_response({"error": {**error, "code": self.number}}, status=self.number)
        if self.kind in {"garbage", "short"}:
            transport.write(_GARBAGE if self.kind == "garbage" else _SHORT)
            transport.close()
            await asyncio.Event().wait()
        if self.kind in {"hang", "cut", "die"} and not self.number:
            await self.at(0, request)
        return None

    async def at(self, events: int, request: web.Request) -> bool:
        """Do what is to be done after so many events; whether the stream ends here with an error."""
        if not self.kind or events != self.number:
            return False
        if self.kind == "hang":
            await asyncio.Event().wait()
        if self.kind == "cut":
            # What was written is to arrive first.
            await asyncio.sleep(0.02)
            assert request.transport is not None
            request.transport.abort()
            await asyncio.Event().wait()
        if self.kind == "die":
            await asyncio.sleep(0.02)
            os._exit(7)
        return self.kind == "error"
