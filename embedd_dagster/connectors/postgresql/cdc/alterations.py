"""Whether CDC tables were altered since the last `subscribe`: a cheap check, for each read of the log.

Without a replica identity, the owner's own UPDATE and DELETE fail for as long as the table is published. So such a table has
to leave the publication at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import psycopg

# ALTER TABLE, and all that changes an index that is a replica identity, writes another version of one of these rows. What
# VACUUM and ANALYZE note in them does not. Whether row-level security applies depends on our role as well.
_LOOK: Final = """
SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws(' ',
    (SELECT pg_catalog.array_agg(pg_catalog.concat_ws(' ', c.oid, c.xmin, pg_catalog.row_security_active(c.oid)) ORDER BY c.oid)
     FROM pg_catalog.pg_class c WHERE c.oid = ANY (%(oids)s::pg_catalog.oid[])),
    (SELECT pg_catalog.array_agg(pg_catalog.concat_ws(' ', x.indexrelid, x.xmin) ORDER BY x.indexrelid)
     FROM pg_catalog.pg_index x WHERE x.indrelid = ANY (%(oids)s::pg_catalog.oid[]) AND x.indisunique)
) COLLATE pg_catalog."C", 0)
"""


class Alterations:
    """Of the tables of these OIDs, since the first look."""

    def __init__(self, oids: Iterable[int]) -> None:
        self._oids = sorted(oids)
        self._first: int | None = None
        self.found = False
        """Whether one was altered, or dropped."""

    def look(self, connection: psycopg.Connection[Any]) -> None:
        """Looks, in one round trip."""
        if not self._oids or self.found:
            return
        row = connection.execute(_LOOK, {"oids": self._oids}).fetchone()
        seen = row[0] if row else None
        self.found = self._first is not None and seen != self._first
        self._first = self._first if self._first is not None else seen
