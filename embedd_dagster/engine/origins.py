"""Which table of the source a set was built from: its name may come to mean another table without any change of ours."""

from __future__ import annotations

from embedd_dagster.catalog.tables import VectorSetRow
from embedd_dagster.errors import SourceRejected
from embedd_dagster.protocols.source import TableReader


def require_same_table(reader: TableReader, live: VectorSetRow, source_table: str) -> None:
    """Returns if the reader reads the table that the live set was built from, even if it was renamed or recreated.

    Raises SourceRejected, so that the rows of one table never replace those of another.
    """
    before, now = live.source_origin, reader.origin
    if before is None or before["name"] == now["name"] or before["oid"] == now["oid"]:
        return
    raise SourceRejected(
        f"The name {source_table!r} now means table {now['name']}; the vectors were built from {before['name']}.",
        resolution="Start a backfill to build the vectors from the table that the name means now. To keep the former table,"
        " make the name mean it again: rename or drop the other table, or change the search_path of the connection's user."
        " Give source_table with its schema to avoid this.",
    )
