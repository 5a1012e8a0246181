"""The rules for a provider's base URL, shared by the API and the embedders."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

import httpx

_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_LONGEST_NAME: Final = 253
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ESCAPED_CONTROL = re.compile(r"%(?:[01][0-9A-Fa-f]|7[Ff])")
_WITHOUT_USER: Final = "a URL without user, password and fragment is accepted"
_HTTP_URL: Final = "a URL that begins with https:// or http:// is accepted"


class UnusableUrl(ValueError):
    """The URL cannot be used; the argument says what is accepted instead."""


def parse_base_url(value: str) -> httpx.URL:
    """The URL, complete enough for a request. Raises UnusableUrl."""
    if not (value.isascii() and value.isprintable()) or " " in value or "\\" in value:
        raise UnusableUrl(_HTTP_URL)
    if _BAD_ESCAPE.search(value) or _ESCAPED_CONTROL.search(value):
        raise UnusableUrl("a URL whose percent signs are followed by the code of a printable character is accepted")
    try:
        url = httpx.URL(value)
        host, port, authority = url.host, url.port, urlsplit(value).netloc
    except (httpx.InvalidURL, ValueError):  # ValueError: a name that is wrongly encoded
        raise UnusableUrl(_HTTP_URL) from None
    if url.scheme not in ("http", "https") or not host:
        raise UnusableUrl(_HTTP_URL)
    if "@" in authority or "#" in value:
        raise UnusableUrl(_WITHOUT_USER)
    if port is not None and not 1 <= port <= 65535:
        raise UnusableUrl("a URL with a port from 1 to 65535 is accepted")
    if not _is_host(url.raw_host.decode("ascii")):
        raise UnusableUrl("a URL with a valid host name or address is accepted")
    return url


def with_path(base_url: httpx.URL, path: str) -> httpx.URL:
    """The URL with `path` added to its path. A query such as Azure's ?api-version=… stays at the end."""
    # the raw path: if it were decoded and encoded again, an escaped slash would change the path
    base_path, mark, query = base_url.raw_path.partition(b"?")
    return base_url.copy_with(raw_path=base_path.rstrip(b"/") + path.encode("ascii") + mark + query)


def _is_host(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        labels = host.removesuffix(".").split(".")
        return len(host) <= _LONGEST_NAME and ":" not in host and all(map(_LABEL.fullmatch, labels))
    return "%" not in host
