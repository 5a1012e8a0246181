"""The small files of a state directory: written whole or not at all, for the owner's eyes, and the lock on all of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import IO, Any


def write_private(path: Path, content: str) -> None:
    """Written with mode 0600: a reader sees the old content or the new, never half, also after a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot sync a directory
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As `write_private`."""
    write_private(path, json.dumps(content, indent=2) + "\n")


def read_text(path: Path) -> str:
    """The file's text without the space around it; empty if there is no file, or it is not text."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty if there is no file, or it is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
        return {}
    return content if isinstance(content, dict) else {}


class OwnerLock:
    """Held by one process at a time, and by none once that one is dead, however it died."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds it."""
        return self._file is not None

    @property
    def in_place(self) -> bool:
        """Whether this object holds it and its file is still the one at the path; another process could lock a new one."""
        if self._file is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def acquire(self) -> bool:
        """Whether the lock is held now; never waits."""
        if self._file is not None:
            return True
        while True:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return False
            self._file = file
            if self.in_place:
                return True
            self.release()  # the file was removed between opening and locking it

    def release(self) -> None:
        """Free for the next one; the file stays: removing it would let two processes hold the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None
