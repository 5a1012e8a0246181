"""Re-encrypting stored credentials under the first encryption key, while the service runs."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import select

from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.secrets import SecretBox
from embedd_dagster.catalog.tables import Connection, EmbeddingProvider

_ROWS_A_TRANSACTION: Final = 100


def rotate_encryption(catalog: Catalog, box: SecretBox) -> dict[str, int]:
    """Seals every credential under the first key; how many were, by table. Idempotent, and may be broken off.

    Rows are locked in small batches, so a change made meanwhile is neither lost nor waited for long. Raises
    SecretUnreadable, naming the row, where none of the keys opens it: the rows before it are done.
    """
    return {model.__tablename__: _rotate(catalog, box, model) for model in (Connection, EmbeddingProvider)}


def _rotate(catalog: Catalog, box: SecretBox, model: Any) -> int:
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
                if not box.is_current(row.credentials):
                    row.credentials = box.seal(box.open(row.credentials, row_id=row.id), row_id=row.id)
                    rotated += 1
        if not rows:
            return rotated
        last_id = rows[-1].id
