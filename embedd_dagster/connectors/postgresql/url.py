"""`postgresql://…` as hosts of databases show it: into the single fields of the credentials, or refused; never repeated."""

from __future__ import annotations

from typing import Any, Final, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic_core import PydanticCustomError

_SCHEMES: Final = ("postgresql", "postgres")
_LAST_CONTROL: Final = " "


def read_postgresql_url(url: Any) -> dict[str, Any]:
    """The single fields. Raises PydanticCustomError, whose message holds nothing of the URL but a parameter's name."""
    if not isinstance(url, str):
        _refuse("a text is expected")
    if any(character <= _LAST_CONTROL or character == "\x7f" for character in url):
        _refuse("blanks and control characters must be percent-encoded")
    try:
        parts = urlsplit(url)
        port = parts.port
        user, password = _decoded(parts.username), _decoded(parts.password)
        host, database = _decoded(parts.hostname), _decoded(parts.path[1:])
    except ValueError:
        _refuse("it cannot be read; special characters in the user or password must be percent-encoded")
    if "\x00" in f"{user}{password}{host}{database}":
        _refuse("a text must not contain NUL (U+0000)")
    if parts.scheme not in _SCHEMES:
        _refuse("one that begins with postgresql:// is accepted")
    if not (host and user and database) or parts.fragment or "/" in database:
        _refuse(
            "user, host and database are needed: postgresql://user:password@host:port/database; special characters must be "
            "percent-encoded"
        )
    fields: dict[str, Any] = {"host": host, "user": user, "database": database, **_parameters(parts.query)}
    if port is not None:
        fields["port"] = port
    if password is not None:
        fields["password"] = password
    return fields


def _decoded(part: str | None) -> str | None:
    return None if part is None else unquote(part, errors="strict")


def _parameters(query: str) -> dict[str, str]:
    """Only `sslmode`: others could send the password elsewhere, or run something on the server."""
    found: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name != "sslmode" or "ssl_mode" in found:
            _refuse(f"of its parameters only sslmode is accepted, once; leave out {name[:40]!r}")
        found["ssl_mode"] = value
    return found


def _refuse(what: str) -> NoReturn:
    raise PydanticCustomError("url", "url: {what}", {"what": what})
