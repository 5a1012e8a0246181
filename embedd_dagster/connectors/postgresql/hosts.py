"""Which addresses a connection's host may lead to, in the errors of a source."""

from __future__ import annotations

from embedd_dagster.connectors import network
from embedd_dagster.connectors.network import AddressForbidden, NameUnknown, Resolver, refusal
from embedd_dagster.errors import SourceRejected, SourceUnavailable

__all__ = ["Resolver", "allowed_addresses", "refusal", "resolve"]


def resolve(host: str, port: int) -> list[str]:
    """The host's addresses in the system's order, without repeats. Raises SourceUnavailable."""
    try:
        return network.resolve(host, port)
    except NameUnknown as error:
        raise SourceUnavailable(
            f"The host name {host!r} does not resolve: {error}.",
            resolution="Check the spelling of the connection's host, and the name server of this machine.",
        ) from None


def allowed_addresses(host: str, port: int, *, deny_private_networks: bool, resolver: Resolver = resolve) -> list[str]:
    """The addresses to connect to. Connect to these, not to the name: it could resolve differently the second time.

    Raises:
        SourceRejected: One of them is link-local or a metadata service, or private where that is denied.
        SourceUnavailable: The name does not resolve.
    """
    try:
        return network.vetted_addresses(host, port, deny_private_networks=deny_private_networks, resolver=resolver)
    except AddressForbidden as error:
        raise SourceRejected(
            f"The host {host!r} leads to {error}, to which this service does not connect.",
            resolution="Use a host that is reachable under a public address, or ask the operator of this service.",
        ) from None
