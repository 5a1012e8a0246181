"""Which addresses a host name may lead to."""

from __future__ import annotations

import pytest

from embedd_dagster.connectors.network import refusal
from embedd_dagster.connectors.postgresql.connection import allowed_addresses
from embedd_dagster.connectors.postgresql.credentials import Server
from embedd_dagster.errors import SourceRejected, SourceUnavailable


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.1.1",
        "100.100.100.200",
        "fd00:ec2::254",
        "fe80::1%eth0",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a9fe:a9fe",
        "::a9fe:a9fe",
        "168.63.129.16",
        "fd20:ce::254",
        "fd00:c1::a9fe:a9fe",
        "fec0::1",
        "2002:a9fe:a9fe::1",
        "224.0.0.1",
    ],
)
def test_never_allowed(address: str) -> None:
    assert refusal(address, deny_private_networks=False)
    assert refusal(address, deny_private_networks=True)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "::1",
        "::",
        "fd12::1",
        "::ffff:10.0.0.1",
    ],
)
def test_private_ones_are_denied_on_demand(address: str) -> None:
    assert refusal(address, deny_private_networks=True)
    assert refusal(address, deny_private_networks=False) is None


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111"])
def test_public_ones_are_allowed(address: str) -> None:
    assert refusal(address, deny_private_networks=True) is None


def test_one_forbidden_address_refuses_the_host() -> None:
    server, found = Server("db.example", 1, "d", "u"), ["8.8.8.8", "169.254.0.9"]
    with pytest.raises(SourceRejected, match=r"'db\.example' leads to a link-local address"):
        allowed_addresses(server, deny_private_networks=False, resolver=lambda *_: found)


def test_the_addresses_found_are_those_to_connect_to() -> None:
    assert allowed_addresses(Server("127.0.0.1", 5432, "d", "u"), deny_private_networks=False) == ["127.0.0.1"]
    local, found = Server("localhost", 5432, "d", "u"), ["::1", "127.0.0.1"]
    assert allowed_addresses(local, deny_private_networks=False, resolver=lambda *_: found) == found


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 300, "a..b", "xn--\udcff"])
def test_a_name_that_does_not_resolve(host: str) -> None:
    with pytest.raises(SourceUnavailable, match="does not resolve"):
        allowed_addresses(Server(host, 5432, "d", "u"), deny_private_networks=False)
