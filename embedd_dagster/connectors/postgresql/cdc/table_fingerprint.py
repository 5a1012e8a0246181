"""The shape of a followed table: all that changes what its rows hold without an event of the log that tells of it.

Where they are stored: it was written anew (ALTER TABLE … USING), or a partition was attached, detached, dropped or truncated
by itself. By what it is published: it was taken out for a while. Its columns: another one took a column's name. What the text
of its values depends on: a label of an enum was renamed.
"""

from __future__ import annotations

from hashlib import blake2b

from embedd_dagster.connectors.postgresql.cdc.publication import Stamp
from embedd_dagster.connectors.postgresql.cdc.tables import Followed
from embedd_dagster.connectors.postgresql.text_dependencies import Meanings, is_another_meaning
from embedd_dagster.protocols.cdc import TableFingerprint


def shape_of(
    followed: Followed, stamp: Stamp | None, meanings: Meanings, before: TableFingerprint | None
) -> TableFingerprint:
    """The table as it is now, with the columns of before that are gone, as empty: what takes the name of one is another."""
    files = blake2b(repr(sorted(followed.state.files)).encode(), digest_size=8).hexdigest()
    gone: dict[str, list[int]] = {name: [] for name in (before["columns"] if before else ())}
    columns = {**gone, **followed.state.columns}
    return {"files": files, "stamp": stamp, "columns": columns, "meanings": meanings}


def stamp_of(shape: TableFingerprint | None) -> Stamp | None:
    """By what the table was published; None where that is not known."""
    return shape["stamp"] if shape else None


def is_altered(before: TableFingerprint | None, now: TableFingerprint) -> bool:
    """Whether rows may hold something else now, or events were left out; a column that came is no reason."""
    if before is None:
        return False
    is_same_column = (now["columns"][name] == entry for name, entry in before["columns"].items())
    return (
        before["files"] != now["files"]
        or before["stamp"] != now["stamp"]
        or not all(is_same_column)
        or is_another_meaning(before.get("meanings", {}), now["meanings"])
    )
