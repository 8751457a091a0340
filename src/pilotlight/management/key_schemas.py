"""What the management API accepts and answers of keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from pilotlight.domain.key import Priority
from pilotlight.management.schemas import Body, Name

RATE_MAX = 1_000_000_000_000
CONCURRENT_MAX = 1_000_000

_Rate = Annotated[int, Field(ge=1, le=RATE_MAX)]


class _Terms(Body):
    """What may be chosen of a key, and changed later."""

    heartbeat_s: Annotated[float, Field(ge=1, le=60, allow_inf_nan=False)] | None = None
    """Seconds between the comments that a stream gets while it waits for a worker; null for none."""
    priority: Literal["low", "normal", "high"] = "normal"
    """Of a crowded endpoint a key gets four times what one with the next lower priority gets."""
    requests_per_minute: _Rate | None = None
    """Most requests in a minute; null for no limit, as of the next two."""
    tokens_per_minute: _Rate | None = None
    """Most tokens in a minute, of prompts and completions together."""
    concurrent_max: Annotated[int, Field(ge=1, le=CONCURRENT_MAX)] | None = None
    """Most requests under way at once."""

    def terms(self) -> dict[str, Any]:
        """What was sent of them, as fields of `ApiKey`."""
        sent = self.model_dump(include=set(_Terms.model_fields), exclude_unset=True)
        return sent | ({"priority": Priority(self.priority)} if "priority" in sent else {})


class CreateKey(_Terms):
    """A new API key."""

    name: Name | None = None
    """A label for lists."""
    scope: Literal["admin", "run"] = "run"
    """`admin` may do everything, `run` may call the named endpoints."""
    endpoints: list[Name] = Field(default_factory=list, max_length=1000)
    """Ids of the endpoints a run-only key may call."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scope == "run" and not self.endpoints:
            raise ValueError("a key of scope run needs at least one endpoint id in endpoints")
        if self.scope == "admin" and self.endpoints:
            raise ValueError("a key of scope admin may call every endpoint; leave endpoints out")
        return self


class UpdateKey(_Terms):
    """What is to change of a key; what is left out stays."""

    name: Name = ""
    """A label for lists."""

    def changes(self) -> dict[str, Any]:
        """What was sent, as fields of `ApiKey`."""
        return self.terms() | ({"name": self.name} if "name" in self.model_fields_set else {})


class KeyView(BaseModel):
    """A stored key, without its secret."""

    id: str
    name: str
    status: Literal["active"]
    scope: Literal["admin", "run"]
    endpoints: list[str]
    heartbeat_s: float | None
    priority: Literal["low", "normal", "high"]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent_max: int | None
    created_at: str


class NewKeyView(KeyView):
    """A new key; the only answer that ever shows its secret."""

    key: str


class KeyList(BaseModel):
    """All keys, oldest first."""

    keys: list[KeyView]
