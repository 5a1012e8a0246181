"""The state directory: for its owner alone, and what lies in it read so that damage is an error with a remedy, or mended."""

from __future__ import annotations

import base64
import secrets
from pathlib import Path

import structlog

from embedd_dagster.catalog.secrets import SecretBox
from embedd_dagster.errors import ConfigurationError
from embedd_dagster.stack import files

_MIN_SECRET_LENGTH = 16
# What `embedd up` has put into a state directory at its first start; any of these tells one from a directory of other files.
_OURS = frozenset(
    {"stack.lock", "stack.json", "postgres", "qdrant", "logs", "dagster_home", "ports.json", "encryption_keys"}
)

_log = structlog.get_logger(__name__)


def open_state_dir(state_dir: Path) -> None:
    """The directory exists and only its owner can enter it: it holds the rows and the keys of everybody who uses the stack.

    Raises ConfigurationError for a directory of other files: others may need to enter it, and `down --remove-state` would
    delete it.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    names = {path.name for path in state_dir.iterdir()}
    if names and not names & _OURS:
        raise ConfigurationError(
            f"{state_dir} is not a state directory of embedd: it holds other files.",
            resolution="Name an empty directory, or one that does not exist yet.",
        )
    if state_dir.stat().st_mode & 0o077:
        state_dir.chmod(0o700)


def kept_secret(path: Path) -> str:
    """The random text in this file. It is made where the file is missing or holds nothing that could be a secret."""
    found = files.read_text(path)
    if is_secret(found):
        return found
    if path.exists():
        _log.warning("secret_made_again", file=str(path), reason="the file was empty or damaged")
    made = secrets.token_urlsafe(32)
    files.write_private(path, made + "\n")
    return made


def is_secret(text: str) -> bool:
    """Whether it may protect something: no half of a file, and characters that a header takes."""
    return len(text) >= _MIN_SECRET_LENGTH and text.isascii() and text.isprintable() and " " not in text


def kept_encryption_keys(state_dir: Path) -> str:
    """The keys that the embedded catalog's credentials are encrypted with; made before there is a catalog.

    Raises ConfigurationError where they are missing or damaged and there is a catalog: others would not open what is in it.
    """
    path = state_dir / "encryption_keys"
    keys = files.read_text(path)
    if keys:
        try:
            SecretBox([key.strip() for key in keys.split(",") if key.strip()])
        except ConfigurationError as error:
            raise _keys_lost(state_dir, f"is damaged: {error.message}") from None
        return keys
    if any((state_dir / "postgres" / name).exists() for name in ("data", "location")):
        raise _keys_lost(state_dir, "is empty" if path.exists() else "is missing")
    made = base64.b64encode(secrets.token_bytes(32)).decode()
    files.write_private(path, made + "\n")
    return made


def _keys_lost(state_dir: Path, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{state_dir / 'encryption_keys'} {what}. The stored credentials cannot be read without these keys.",
        resolution="Put the file back from a backup, or set EMBEDD_ENCRYPTION_KEYS. "
        "To give up everything that is stored: embedd down --remove-state",
    )
