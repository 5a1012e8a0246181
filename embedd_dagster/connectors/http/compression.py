"""Compressed answers: some servers compress although they were asked not to."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import Final

_GZIP: Final = frozenset({"gzip", "x-gzip"})
_BARE_DEFLATE: Final = -zlib.MAX_WBITS


class NotUnpacked(Exception):
    """The body is incomplete, too large, or compressed in an unknown way."""


def unpack(body: bytes, encoding: str, largest: int) -> bytes:
    """The body without its compression, of at most `largest` bytes. Raises NotUnpacked."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    try:
        unpacked = _unpack(body, encoding, largest)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise NotUnpacked(type(error).__name__) from None
    if len(unpacked) > largest:
        raise NotUnpacked("too large")
    return unpacked


def _unpack(body: bytes, encoding: str, largest: int) -> bytes:
    if encoding in _GZIP:
        return gzip.GzipFile(fileobj=io.BytesIO(body)).read(largest + 1)
    if encoding != "deflate":
        raise ValueError("an unknown compression")
    # "deflate" means zlib's form; some servers send the bare one
    try:
        return zlib.decompressobj().decompress(body, largest + 1)
    except zlib.error:
        return zlib.decompressobj(_BARE_DEFLATE).decompress(body, largest + 1)
