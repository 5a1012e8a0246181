"""Whether row-level security hides a whole table from our role: it then reads as if it were empty, without an error."""

from __future__ import annotations

from typing import Any, Final

import psycopg
from psycopg.sql import SQL

from embedd_dagster.connectors.postgresql.credentials import Server
from embedd_dagster.connectors.postgresql.identifiers import quoted
from embedd_dagster.connectors.postgresql.introspection import Relation
from embedd_dagster.errors import SourceAccessDenied

# Without a permissive policy, no row is visible. A table that was never analyzed has rows if it has pages.
_STATE: Final = """
SELECT EXISTS (
           SELECT FROM pg_catalog.pg_policy p
           WHERE p.polrelid = %(oid)s::pg_catalog.oid AND p.polpermissive AND p.polcmd = ANY ('{r,*}'::pg_catalog."char"[])
             AND EXISTS (SELECT FROM pg_catalog.unnest(p.polroles) AS r(oid)
                         WHERE CASE WHEN r.oid = 0 THEN true ELSE pg_catalog.pg_has_role(r.oid, 'USAGE') END)
       ),
       EXISTS (
           SELECT FROM pg_catalog.pg_class c
           WHERE c.oid IN (SELECT %(oid)s::pg_catalog.oid
                           UNION SELECT t.relid::pg_catalog.oid FROM pg_catalog.pg_partition_tree(%(oid)s) AS t)
             AND c.relkind = 'r'
             AND (c.reltuples > 0 OR c.reltuples < 0 AND pg_catalog.pg_relation_size(c.oid) > 0)
       ),
       c.relforcerowsecurity AND pg_catalog.pg_has_role(c.relowner, 'USAGE')
FROM pg_catalog.pg_class c
WHERE c.oid = %(oid)s::pg_catalog.oid AND pg_catalog.row_security_active(c.oid)
"""


def require_visible_rows(connection: psycopg.Connection[Any], relation: Relation, server: Server) -> None:
    """Returns unless row-level security hides every row from our role. Raises SourceAccessDenied with what would help."""
    state = connection.execute(_STATE, {"oid": relation.oid}).fetchone() if relation.kind in "rp" else None
    if state is None:  # it does not apply to our role
        return
    has_policy, has_rows, is_forced = state
    if has_policy and (not has_rows or _sees_a_row(connection, relation)):
        return
    role = quoted(server.grantee)
    policy = f"CREATE POLICY embedd ON {relation.label} FOR SELECT TO {role} USING (true);"
    if is_forced:
        policy += f" Or: ALTER TABLE {relation.label} NO FORCE ROW LEVEL SECURITY;"
    reason = (
        "its policies let none of the rows through" if has_policy else "no policy lets this user read any row of it"
    )
    emptied = " If the table is really empty, run ANALYZE on it and try again." if has_policy else ""
    raise SourceAccessDenied(
        f"Row-level security hides all of {relation.label} from the user {server.grantee!r}: {reason}.",
        resolution=f"Run as the table's owner: {policy}{emptied}",
    )


def _sees_a_row(connection: psycopg.Connection[Any], relation: Relation) -> bool:
    row = connection.execute(SQL("SELECT EXISTS (SELECT FROM {})").format(relation.identifier), []).fetchone()
    return bool(row and row[0])
