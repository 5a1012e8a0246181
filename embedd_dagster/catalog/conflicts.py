"""What a violated constraint means to the caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from embedd_dagster.errors import Conflict


@contextmanager
def name_must_be_free(session: Session, noun: str, name: str) -> Iterator[None]:
    """Flushes at the end; raises Conflict `name_conflict` where the name is taken in this environment."""
    try:
        with session.begin_nested():
            yield
            session.flush()
    except IntegrityError as error:
        if "_name" not in str(getattr(error.orig, "diag", None) and error.orig.diag.constraint_name):  # type: ignore[union-attr]
            raise
        raise Conflict(
            f"The name {name!r} is taken by another {noun} in this environment.", resolution="Choose another name."
        ) from None
