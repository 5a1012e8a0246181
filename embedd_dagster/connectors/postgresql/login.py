"""How to log in to somebody's PostgreSQL without giving away what is ours: which methods may authenticate, and sockets.

A Unix socket would let a user in as the service's own operating system user (`peer`). A password is never sent in clear
to a server whose certificate is not verified: otherwise any server that answers there would have it.
"""

from __future__ import annotations

from typing import Final

_VERIFIED: Final = frozenset({"verify-ca", "verify-full"})
_REQUIREMENT: Final = "authentication method requirement"

SOCKET_REFUSED: Final = (
    "The host is a Unix socket, to which this service does not connect: the server could take it for its own user.",
    "Use a host name or an address. The operator of this service allows sockets by EMBEDD_ALLOW_UNIX_SOCKETS=true.",
)
SOCKET_WITHOUT_PASSWORD: Final = (
    "Over a Unix socket a password is required: without one, the server would let in the service's own user.",
    "Give the connection's user a password, and let pg_hba.conf ask for it by scram-sha-256.",
)


def is_socket(host: str) -> bool:
    """Whether libpq takes this host for the directory of a Unix socket, or for an abstract one."""
    return host.startswith(("/", "@"))


def socket_fault(host: str, password: str, *, allow_unix_sockets: bool) -> tuple[str, str] | None:
    """Why a socket is not connected to, and what to do; None for a host on the network, and for a socket that may be used."""
    if not is_socket(host):
        return None
    if not allow_unix_sockets:
        return SOCKET_REFUSED
    return None if password else SOCKET_WITHOUT_PASSWORD


def accepted_methods(password: str, ssl_mode: str) -> str:
    """The methods by which the server may authenticate us, as libpq's `require_auth`."""
    if not password:
        return "none"
    return "scram-sha-256,md5,password" if ssl_mode in _VERIFIED else "scram-sha-256,md5"


def method_fault(text: str, user: str) -> tuple[str, str] | None:
    """What libpq's text says of a method that is not accepted, and what to do; None for another text."""
    if _REQUIREMENT not in text:
        return None
    if '"none"' in text:
        return (
            f"the server asks user {user!r} for a password, and the connection has none",
            "Set the connection's password.",
        )
    if "cleartext password" in text:
        return (
            "the server asks for the password in clear, and its certificate is not verified",
            "Set ssl_mode to verify-full, or let the server ask by scram-sha-256 (in pg_hba.conf, or a pooler's auth_type).",
        )
    if "did not complete authentication" in text:
        return (
            f"the server lets user {user!r} in without asking for the password",
            "Remove the connection's password, or let the server ask for it by scram-sha-256 (in pg_hba.conf).",
        )
    return (
        "the server asks for a way to authenticate other than a password",
        "Let the server ask this user for a password by scram-sha-256 (in pg_hba.conf).",
    )
