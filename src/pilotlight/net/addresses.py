"""Which addresses a stranger may make us connect to: public ones, in whatever spelling.

Whoever submits a job names URLs that the gateway calls. Without this the gateway would be a door to the
machine's own services, the private network behind it, and the metadata service of a cloud.
"""

from __future__ import annotations

import ipaddress
import socket

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = frozenset({0x0000_5EFE, 0x0200_5EFE})
"""Third quarter of an address that carries an IPv4 address in its last one (RFC 5214)."""

_SPECIAL = (ipaddress.IPv4Network("192.0.0.0/24"), ipaddress.IPv4Network("168.63.129.16/32"))
"""What `is_global` lets through: protocol assignments, where one cloud has a service for its own machines
(Oracle), and a public address at which another one has (Azure)."""


def refusal(address: str) -> str | None:
    """Why an address must not be connected to; None when it is a public one.

    Args:
        address: An IPv4 or IPv6 address as the resolver writes it, with or without a zone.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return f"{address} is not an IP address"
    return None if _public(parsed) else f"{address} is not a public address"


def literal(host: str) -> str | None:
    """The address that a host is, when it is one and not a name; None for a name.

    Knows the spellings that the C library knows: `127.1`, `0x7f000001`, `017700000001`, `2130706433`.
    """
    bare = host.removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(bare.partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(bare)) if bare.isascii() and " " not in bare else None
    except OSError:
        return None


def _public(address: _Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        special = any(address in network for network in _SPECIAL)
        return address.is_global and not address.is_multicast and not special
    embedded = _embedded(address)
    if embedded is not None:
        return _public(embedded)
    return address in _GLOBAL_UNICAST and address.is_global


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address at which a packet to this IPv6 address may end."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address in _NAT64 or int(address) >> 32 & 0xFFFF_FFFF in _ISATAP:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return None
