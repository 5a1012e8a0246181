"""Where a request comes from: what a browser says of it, and what no page can make it say otherwise.

A cookie alone proves little here: pages of other loopback ports are *same-site*, so even a SameSite=Strict cookie goes
along with what they send. The decision is by `Origin` and `Sec-Fetch-Site`, which only the browser writes.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers

LOOPBACK_NAMES: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_ONCE: Final = ("host", "origin", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest", "content-type", "authorization")


def are_unambiguous(headers: Headers) -> bool:
    """Whether none that is decided by comes twice: the application behind might read the other one."""
    return all(len(headers.getlist(name)) <= 1 for name in _ONCE)


def is_host_allowed(headers: Headers, names: Collection[str]) -> bool:
    """Whether the request was meant for us. A page whose own name was rebound to our address is told by its `Host`.

    Any port: a tunnel has another one than we.
    """
    found = _HOST.fullmatch(headers.get("host", "").lower())
    return found is not None and found[1] in names


def is_navigation(headers: Headers) -> bool:
    """Whether the browser wants to show the answer as a page of its own, in no frame."""
    return headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"


def is_from_elsewhere(headers: Headers) -> bool:
    """Whether the browser says that a page of another origin caused the request."""
    return headers.get("sec-fetch-site", "none") not in ("same-origin", "none")


def is_origin_foreign(headers: Headers) -> bool:
    """Whether an `Origin` is there, and is not ours (`null` is not).

    Compared with the `Host`, and not by scheme: a proxy may have ended TLS before us.
    """
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return True
    return parts.scheme not in ("http", "https") or parts.netloc != headers.get("host", "").lower()
