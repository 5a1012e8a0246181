"""Re-encrypting what is stored sealed under the first encryption key, while the service runs."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import select

from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.secrets import SecretBox
from embedd_dagster.catalog.tables import Connection, EmbeddingProvider, IdempotencyKey
from embedd_dagster.errors import SecretUnreadable

_ROWS_A_TRANSACTION: Final = 100
_SEALED: Final[tuple[tuple[Any, tuple[str, ...]], ...]] = (
    (Connection, ("credentials",)),
    (EmbeddingProvider, ("credentials",)),
    (IdempotencyKey, ("request", "answer")),
)


def rotate_encryption(catalog: Catalog, box: SecretBox) -> dict[str, int]:
    """Seals everything under the first key; how many rows were, by table. Idempotent, and may be broken off.

    Rows are locked in small batches, so a change made meanwhile is neither lost nor waited for long. Raises
    SecretUnreadable, naming the row, where none of the keys opens it: the rows before it are done. Answers that are
    remembered for an Idempotency-Key and that no key opens are forgotten instead.
    """
    return {model.__tablename__: _rotate(catalog, box, model, columns) for model, columns in _SEALED}


def _rotate(catalog: Catalog, box: SecretBox, model: Any, columns: tuple[str, ...]) -> int:
    rotated = 0
    last_id = ""
    while True:
        with catalog.transaction() as session:
            rows = list(
                session.scalars(
                    select(model)
                    .where(model.id > last_id)
                    .order_by(model.id)
                    .limit(_ROWS_A_TRANSACTION)
                    .with_for_update()
                )
            )
            for row in rows:
                try:
                    rotated += _reseal(box, row, columns)
                except SecretUnreadable:
                    if model is not IdempotencyKey:
                        raise
                    session.delete(row)
        if not rows:
            return rotated
        last_id = rows[-1].id


def _reseal(box: SecretBox, row: Any, columns: tuple[str, ...]) -> bool:
    """Whether anything of the row had to be."""
    old = {name: value for name in columns if (value := getattr(row, name)) is not None and not box.is_current(value)}
    for name, value in old.items():
        setattr(row, name, box.seal(box.open(value, row_id=row.id, column=name), row_id=row.id, column=name))
    return bool(old)
