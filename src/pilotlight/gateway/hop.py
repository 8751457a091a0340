"""Header fields between two neighbours, which a proxy does not pass on (RFC 9110 §7.6.1). Pure."""

from __future__ import annotations

from collections.abc import Sequence

HOP = frozenset(
    {
        b"connection",
        b"expect",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Fields of the hop, and what a proxy answers by itself."""

_KEPT = frozenset(
    {
        b"content-length",
        b"host",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
    }
)
"""Not to be removed by naming them in `Connection`: where a message ends, and what we say of its sender."""

BODILESS = frozenset({204, 304})
"""Statuses of answers that end with their head, whatever it says (RFC 9110 §15.3.5, §15.4.5)."""

Field = tuple[bytes, bytes]


def without_hop(fields: Sequence[Field]) -> list[Field]:
    """The fields that belong to the message: without those of the hop, and those that `Connection` names.

    Args:
        fields: Names in lower case.
    """
    named = {
        token.strip().lower()
        for name, value in fields
        if name == b"connection"
        for token in value.split(b",")
    } - _KEPT
    return [field for field in fields if field[0] not in HOP and field[0] not in named]
