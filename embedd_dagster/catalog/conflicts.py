"""What a violated constraint means to the caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from embedd_dagster.errors import Conflict


@contextmanager
def name_must_be_free(session: Session, noun: str, name: str) -> Iterator[None]:
    """Flushes at the end; raises Conflict `name_conflict` where the name is taken in this environment.

    Any other IntegrityError is passed on; the transaction can go on after either.
    """
    try:
        with session.begin_nested():
            yield
            session.flush()
    except IntegrityError as error:
        # of an environment or an organization: uq_<table>_environment_id_name, uq_environments_org_id_name
        if not violated_constraint(error).endswith("_id_name"):
            raise
        raise Conflict(
            f"The name {name!r} is taken by another {noun} in this environment.", resolution="Choose another name."
        ) from None


def violated_constraint(error: IntegrityError) -> str:
    """The constraint's name, or ""."""
    diagnosis = getattr(error.orig, "diag", None)
    return str(getattr(diagnosis, "constraint_name", None) or "")
