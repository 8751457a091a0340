"""Requests that repeat the header fields of an earlier one on their connection, read without a parser.

Clients of a queue and workers send the same fields with every request; what changes is the target, and
the body. Parsing a head costs more than most of our answers, so each connection remembers a few blocks of
fields that the parser has accepted on it. A request that arrives in one piece and whose fields are byte
for byte such a block means what the block meant then. Only its request line is left to be read, and only
the plainest form of one is; whatever is not exactly this goes to the parser.

`gateway.protocol` asks `KnownFields.read` before it feeds the parser, and has blocks learnt afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_BLOCKS_MAX = 8
"""Blocks per connection: a client has a few kinds of requests, and bodies of a few lengths."""

_BLOCK_BYTES_MAX = 2048

_LINE = re.compile(rb"(GET|POST) (/v2/[A-Za-z0-9/_.~-]+)(?:\?([A-Za-z0-9/_.~=&,:%+-]*))? HTTP/1\.1")
"""Request lines that are read here: nothing in the path to decode, nothing anybody could read otherwise."""

_SPECIAL = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"trailer", b"te"})
"""Fields that change how a message is read; requests with one are always parsed."""


@dataclass(slots=True)
class Fields:
    """What a block of header fields says.

    Attributes:
        headers: By lower-case name; of repeated ones the last counts.
        length: Bytes of the body.
        secret_hash: Hash of the key among them, once somebody has made it.
    """

    headers: dict[bytes, bytes]
    length: int
    secret_hash: str | None = None


@dataclass(slots=True)
class WholeRequest:
    """A request that has arrived completely.

    Attributes:
        method: GET or POST.
        path: Without anything to decode.
        query: Percent-encoded, without the question mark.
        fields: Its header fields.
        body: All of it.
    """

    method: str
    path: str
    query: str
    fields: Fields
    body: bytes


class KnownFields:
    """The blocks of header fields of one connection."""

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: dict[bytes, Fields] = {}

    def read(self, data: bytes) -> WholeRequest | None:
        """The request that `data` is, whole and nothing else; None when that takes a parser to say."""
        line_end = data.find(b"\r\n")
        head_end = data.find(b"\r\n\r\n", line_end)
        fields = self._blocks.get(data[line_end + 2 : head_end])
        if fields is None or len(data) != head_end + 4 + fields.length:
            return None
        line = _LINE.fullmatch(data, 0, line_end)
        if line is None:
            return None
        method, path, query = line.groups(b"")
        return WholeRequest(method.decode(), path.decode(), query.decode(), fields, data[head_end + 4 :])

    def learn(self, data: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Remember the header fields of a request that the parser has accepted.

        Args:
            data: The request from its first byte on, HTTP/1.1, its head complete, its connection kept open.
            headers: What the parser made of its fields, names in lower case.
        """
        if len(self._blocks) >= _BLOCKS_MAX:
            return
        line_end = data.find(b"\r\n")
        block = data[line_end + 2 : data.find(b"\r\n\r\n", line_end)]
        parsed = list(headers)
        # Only what splits at its line breaks and colons into what the parser found: then there is no second
        # way to read it.
        lines = [line.partition(b":") for line in block.split(b"\r\n")]
        if len(block) > _BLOCK_BYTES_MAX or parsed != [
            (name.lower(), value.strip(b" \t")) for name, _, value in lines
        ]:
            return
        names = [name for name, _ in parsed]
        lengths = [value for name, value in parsed if name == b"content-length"]
        if _SPECIAL.intersection(names) or len(lengths) > 1 or not all(map(bytes.isdigit, lengths)):
            return
        if any(name == b"connection" and value.lower() != b"keep-alive" for name, value in parsed):
            return
        self._blocks[block] = Fields(dict(parsed), int(lengths[0]) if lengths else 0)
