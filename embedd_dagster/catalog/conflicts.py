"""What a violated constraint means to the caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session

from embedd_dagster.catalog.tables import Connection, EmbeddingProvider, VectorTable
from embedd_dagster.errors import Conflict

_NAMED: Final = 3


@contextmanager
def name_must_be_free(session: Session, noun: str, name: str) -> Iterator[None]:
    """Flushes at the end; raises Conflict `name_conflict` where the name is taken.

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
        where = "organization" if noun == "environment" else "environment"
        raise Conflict(
            f"The name {name!r} is taken by another {noun} in this {where}.", resolution="Choose another name."
        ) from None


_ENDPOINTS: Final[dict[type[Any], tuple[str, str]]] = {
    Connection: ("connections", '{"credentials": {"password": …}}'),
    EmbeddingProvider: ("embedding-providers", '{"credentials": {"api_key": …}}'),
}


def mendable(
    session: Session,
    conflict: Conflict,
    model: type[Connection] | type[EmbeddingProvider],
    environment_id: str,
    name: str,
) -> Conflict:
    """The conflict of a name; if what has it failed its last test, with what mends that."""
    holder: Any = session.scalar(select(model).where(model.environment_id == environment_id, model.name == name))
    if holder is None or holder.status != "failed":
        return conflict
    path, body = _ENDPOINTS[model]
    return Conflict(
        f"{conflict.message} It is {holder.id}, which failed its last test.",
        code=conflict.code,
        resolution=f"Correct it with PUT /v1/{path}/{holder.id} and {body}, delete it, or choose another name.",
    )


def must_be_unused(
    session: Session,
    noun: str,
    row: Connection | EmbeddingProvider,
    reference: InstrumentedAttribute[str] | InstrumentedAttribute[str | None],
) -> None:
    """Raises Conflict `<noun>_conflict`, with some of their names, where vector tables refer to the row by this column."""
    users = session.scalars(select(VectorTable.name).where(reference == row.id).limit(_NAMED + 1)).all()
    if users:
        listed = ", ".join(repr(name) for name in users[:_NAMED]) + (" and others" if len(users) > _NAMED else "")
        raise Conflict(
            f"{noun.capitalize()} {row.name!r} is still used by vector table{'s' if len(users) > 1 else ''} {listed}.",
            code=f"{noun.replace(' ', '_')}_conflict",
            resolution="Delete those vector tables first.",
        )


def violated_constraint(error: IntegrityError) -> str:
    """The constraint's name, or ""."""
    diagnosis = getattr(error.orig, "diag", None)
    return str(getattr(diagnosis, "constraint_name", None) or "")
