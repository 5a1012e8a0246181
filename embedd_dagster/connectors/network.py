"""Which addresses a user's host name may lead to: the service must not be a way into the network it runs in."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final

Resolver = Callable[[str, int], list[str]]

# The clouds' metadata services hand out the machine's own credentials to any request that comes from it.
_METADATA_ADDRESSES: Final = (
    "169.254.169.254", "fd00:ec2::254",  # AWS and others
    "100.100.100.200",  # Alibaba
    "168.63.129.16",  # Azure
    "fd20:ce::254",  # Google
    "fd00:c1::a9fe:a9fe",  # Oracle
)  # fmt: skip
_METADATA: Final = frozenset(map(ip_address, _METADATA_ADDRESSES))
_EMBEDDING_IPV4: Final = tuple(map(IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")))
"""NAT64 (RFC 6052, RFC 8215) and the IPv4-compatible form, which is out of use; the IPv4 address stands at the end."""
_MAX_ADDRESSES: Final = 4


class NameUnknown(Exception):
    """The host name does not resolve; its argument says why."""


class AddressForbidden(Exception):
    """The host name leads to where this service does not connect; its argument says what kind of address that is."""

    def for_host(self, host: str) -> tuple[str, str]:
        """The message and the resolution for users."""
        return (
            f"The host {host!r} leads to {self}, to which this service does not connect.",
            "Use a host that is reachable under a public address, or ask the operator of this service.",
        )


def resolve(host: str, port: int) -> list[str]:
    """The host's addresses in the system's order, without repeats. Raises NameUnknown."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a valid name"
        raise NameUnknown(reason) from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def vetted_addresses(host: str, port: int, *, deny_private_networks: bool, resolver: Resolver = resolve) -> list[str]:
    """The addresses to connect to. Connect to these, not to the name: it could resolve differently the second time.

    Raises AddressForbidden if one of them is link-local or a metadata service, or is private and that is denied, and
    what the resolver raises.
    """
    addresses = resolver(host, port)
    for text in addresses:
        if reason := refusal(text, deny_private_networks=deny_private_networks):
            raise AddressForbidden(reason)
    return addresses[:_MAX_ADDRESSES]


def refusal(address: str, *, deny_private_networks: bool) -> str | None:
    """What kind of forbidden address this is, or None if connecting is allowed."""
    parsed = _unwrap(ip_address(address.partition("%")[0]))
    if parsed in _METADATA:
        return "a cloud's metadata service"
    if parsed.is_link_local:
        return "a link-local address"
    if isinstance(parsed, IPv6Address) and parsed.is_site_local:
        return "a site-local address"
    if parsed.is_multicast:
        return "a multicast address"
    if deny_private_networks and not parsed.is_global:
        return "a private address"
    return None


def _unwrap(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address inside an IPv6 one: a mapped, translated or tunnelled form must not hide it."""
    if isinstance(address, IPv4Address):
        return address
    if any(address in network for network in _EMBEDDING_IPV4) and int(address) > 1:  # except :: and ::1
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or address
