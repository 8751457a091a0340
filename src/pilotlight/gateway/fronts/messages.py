"""What the owner of the slots and the fronts tell each other (`gateway.fronts.link`).

A request has the number of its first `Seek` until its `End`; each further seek has a number of its own, by
which its slot is called, too. Numbers are made by the front and used once. A front may have cancelled what
the owner grants or refuses in the same moment; both pass over what comes too late.
"""

from __future__ import annotations

import msgspec

from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import Outcome, RequestRecord
from pilotlight.domain.worker import Registration


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="kind", gc=False):
    """Fields in the order of their declaration: both ends are the same program."""


# From a front to the owner.


class Seek(_Message, frozen=True, tag=1):
    """A request that wants its first slot; all fields but the last three are those of its `Ask`."""

    number: int
    endpoint_id: str
    key_id: str
    body_bytes: int
    priority: int
    cost: int
    session: str
    prefix: tuple[int, ...] | None
    tokens: int
    bound_s: float
    by_client: bool


class Again(_Message, frozen=True, tag=2):
    """A request that is known wants another slot, of a worker that it has not tried."""

    number: int
    request: int
    tried: frozenset[str]
    bound_s: float
    by_client: bool


class Cancel(_Message, frozen=True, tag=3):
    """What was sought is wanted no longer; a slot that was granted meanwhile is given back by this."""

    number: int


class GiveBack(_Message, frozen=True, tag=4):
    """A slot that was granted is given back; the fields are those of `Use`."""

    number: int
    failed: bool
    first_byte_ms: int | None
    service_ms: float | None
    cost: int | None


class End(_Message, frozen=True, tag=5):
    """A request is over."""

    request: int
    tokens: int | None


class Suspend(_Message, frozen=True, tag=6):
    """See `Desk.suspend`."""

    worker_id: str
    seconds: float


class Lives(_Message, frozen=True, tag=7):
    """See `Desk.lives`; answered by a `LivesAnswer`."""

    number: int
    worker_ids: frozenset[str]


class Comment(_Message, frozen=True, tag=8):
    """See `Desk.comment`; answered by a `CommentAnswer`."""

    number: int
    endpoint_id: str
    waited_ms: int


class Row(_Message, frozen=True, tag=9):
    """A row for the request log."""

    record: RequestRecord


class Ready(_Message, frozen=True, tag=10):
    """The front answers requests."""


class Seen(_Message, frozen=True, tag=11):
    """A `State` counts from now on."""

    number: int


# From the owner to a front.


class Welcome(_Message, frozen=True, tag=32):
    """Comes first.

    Attributes:
        settings: All of them, as JSON.
    """

    settings: bytes


class State(_Message, frozen=True, tag=33):
    """What a front answers from; replaces the one before.

    Attributes:
        number: For `Seen`.
        endpoints: All living ones, oldest first.
        keys: All of them.
        leading: Whether the workers are the owner's.
        closing: Whether new requests are refused.
    """

    number: int
    endpoints: tuple[Endpoint, ...]
    keys: tuple[ApiKey, ...]
    leading: bool
    closing: bool


class Counted(_Message, frozen=True, tag=34):
    """What the limits of its key say of a request (`Taken.headers`); comes before what its seek comes to."""

    request: int
    headers: tuple[tuple[bytes, bytes], ...]


class Reached(_Message, frozen=True, tag=35):
    """How a worker is reached of which slots are granted from now on.

    Attributes:
        worker_id: Which.
        registration: How.
        others_gone: Whether all that was said of others is to be forgotten.
    """

    worker_id: str
    registration: Registration
    others_gone: bool


class Granted(_Message, frozen=True, tag=36):
    """A slot of a worker of which `Reached` was said."""

    number: int
    worker_id: str


class Refused(_Message, frozen=True, tag=37):
    """There will be no slot: a `RequestRefusedError`."""

    number: int
    status: int
    message: str
    type: str
    code: str | None
    outcome: Outcome
    headers: tuple[tuple[bytes, bytes], ...]


class Failed(_Message, frozen=True, tag=38):
    """There will be no slot, by a fault of ours, which the owner has logged."""

    number: int


class LivesAnswer(_Message, frozen=True, tag=39):
    """The answer to a `Lives`."""

    number: int
    lives: bool


class CommentAnswer(_Message, frozen=True, tag=40):
    """The answer to a `Comment`; empty for an endpoint that is gone."""

    number: int
    comment: bytes


class Drop(_Message, frozen=True, tag=41):
    """Idle connections to these addresses are to be closed."""

    urls: tuple[str, ...]


class Stop(_Message, frozen=True, tag=42):
    """Take nothing new, answer what is under way, and end."""


FromFront = (
    Seek | Again | Cancel | GiveBack | End | Suspend | Lives | Comment | Row | Ready | Seen
)  # fmt: skip
FromOwner = (
    Welcome | State | Counted | Reached | Granted | Refused | Failed | LivesAnswer | CommentAnswer | Drop
    | Stop
)  # fmt: skip
