"""The fingerprint of a CDC table: reveals changes to the values of its rows that no event in the log reports.

- `files`: where the rows are stored. ALTER TABLE … USING rewrites them. A partition is attached, detached, dropped or
  truncated on its own.
- `stamp`: how the table is published. It may have been taken out of the publication for a while.
- `columns`: another column may have taken a column's name.
- `meanings`: what the text of the values depends on, such as the labels of an enum.

The catalog stores fingerprints, so these names stay.
"""

from __future__ import annotations

from hashlib import blake2b

from embedd_dagster.connectors.postgresql.cdc.publication import PublicationFingerprint
from embedd_dagster.connectors.postgresql.cdc.tables import ResolvedTable
from embedd_dagster.connectors.postgresql.text_dependencies import TextDependencies, have_changed
from embedd_dagster.protocols.cdc import TableFingerprint


def fingerprint_of(
    table: ResolvedTable,
    publication: PublicationFingerprint | None,
    dependencies: TextDependencies,
    before: TableFingerprint | None,
) -> TableFingerprint:
    """The table as it is now. Columns that it had before stay as empty entries, so a new column of that name counts."""
    files = blake2b(repr(sorted(table.details.files)).encode(), digest_size=8).hexdigest()
    gone: dict[str, list[int]] = {name: [] for name in (before["columns"] if before else ())}
    columns = {**gone, **table.details.columns}
    return {"files": files, "stamp": publication, "columns": columns, "meanings": dependencies}


def publication_fingerprint_of(table: TableFingerprint | None) -> PublicationFingerprint | None:
    """How the table was published; None if that is not known."""
    return table["stamp"] if table else None


def is_altered(before: TableFingerprint | None, now: TableFingerprint) -> bool:
    """Whether rows may have other values now, or events were left out. An added column does not count."""
    if before is None:
        return False
    is_same_column = (now["columns"][name] == entry for name, entry in before["columns"].items())
    return (
        before["files"] != now["files"]
        or before["stamp"] != now["stamp"]
        or not all(is_same_column)
        or have_changed(before.get("meanings", {}), now["meanings"])
    )
