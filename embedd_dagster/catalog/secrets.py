"""Encryption of credentials at rest: AES-256-GCM, bound to its row, with keys that can rotate."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from embedd_dagster.errors import ConfigurationError, SecretUnreadable

KEY_BYTES: Final = 32
_FORMAT: Final = b"\x01"
_KEY_ID_BYTES: Final = 4
_NONCE_BYTES: Final = 12


def new_encryption_key() -> str:
    """A fresh key, as EMBEDD_ENCRYPTION_KEYS wants it: base64 of 32 random bytes."""
    return base64.b64encode(os.urandom(KEY_BYTES)).decode()


class SecretBox:
    """Encrypts under the first key, decrypts under any. A sealed value is `0x01 | key id (4) | nonce (12) | AES-GCM`.

    The associated data is the id of the row and the name of the column, so that a ciphertext moved elsewhere does not open.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise ConfigurationError("EMBEDD_ENCRYPTION_KEYS holds no key.")
        self._ciphers: dict[bytes, AESGCM] = {}
        for position, key in enumerate(keys, start=1):
            raw = _decode(key, position)
            self._ciphers[hashlib.sha256(raw).digest()[:_KEY_ID_BYTES]] = AESGCM(raw)
        self._first = next(iter(self._ciphers))

    def seal(self, secrets: Mapping[str, Any], *, row_id: str, column: str = "credentials") -> bytes:
        """The secrets, encrypted for this row and column."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._ciphers[self._first].encrypt(nonce, orjson.dumps(dict(secrets)), _associated(row_id, column))
        return _FORMAT + self._first + nonce + sealed

    def open(self, sealed: bytes, *, row_id: str, column: str = "credentials") -> dict[str, Any]:
        """The secrets again. Raises SecretUnreadable where no present key opens them, or they are another row's."""
        header = len(_FORMAT) + _KEY_ID_BYTES
        cipher = self._ciphers.get(sealed[len(_FORMAT) : header])
        if cipher is None or not sealed.startswith(_FORMAT):
            raise SecretUnreadable(f"The credentials of {row_id} were encrypted with a key that is not configured.")
        nonce, body = sealed[header : header + _NONCE_BYTES], sealed[header + _NONCE_BYTES :]
        try:
            opened: dict[str, Any] = orjson.loads(cipher.decrypt(nonce, body, _associated(row_id, column)))
        except InvalidTag:
            raise SecretUnreadable(f"The credentials of {row_id} are damaged or belong to another row.") from None
        return opened

    def is_current(self, sealed: bytes) -> bool:
        """Whether the value is sealed under the first key: what a key rotation has left to do."""
        return sealed[len(_FORMAT) : len(_FORMAT) + _KEY_ID_BYTES] == self._first


def _associated(row_id: str, column: str) -> bytes:
    return f"{row_id}/{column}".encode()


def _decode(key: str, position: int) -> bytes:
    try:
        raw = base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != KEY_BYTES:
        raise ConfigurationError(
            f"Key {position} of EMBEDD_ENCRYPTION_KEYS is not base64 of {KEY_BYTES} bytes.",
            resolution="Make one with `embedd keys new-encryption-key`.",
        )
    return raw
