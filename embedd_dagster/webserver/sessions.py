"""Who may enter: a client with the token, or with a cookie signed with it. No state on the server."""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

SESSION_SECONDS: Final = 7 * 24 * 3600
_PURPOSE: Final = b"embedd dagster session v1\0"


class Sessions:
    """Cookies of one token; a new token ends them all."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._key = hashlib.sha256(_PURPOSE + self._token).digest()
        # Cookies know no ports: without a name of its own, a second stack's login on this host would end this one's.
        self.cookie_name = f"embedd_dagster_{self._sign(b'cookie name')[:8]}"

    def is_token(self, candidate: str) -> bool:
        """In constant time."""
        return hmac.compare_digest(candidate.encode("utf-8", "surrogateescape"), self._token)

    def issue(self, now: float) -> str:
        """The value of a new session's cookie."""
        expires_at = str(int(now) + SESSION_SECONDS)
        return f"{expires_at}.{self._sign(expires_at.encode())}"

    def accepts(self, cookie: str, now: float) -> bool:
        """Whether it is ours and has not expired."""
        expires_at, _, signature = cookie.partition(".")
        signed = self._sign(expires_at.encode("utf-8", "surrogateescape"))
        if not hmac.compare_digest(signature.encode("utf-8", "surrogateescape"), signed.encode()):
            return False
        return int(expires_at) > now  # a number, for we signed it

    def _sign(self, value: bytes) -> str:
        return hmac.new(self._key, value, hashlib.sha256).hexdigest()
