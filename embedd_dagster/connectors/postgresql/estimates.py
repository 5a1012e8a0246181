"""About how many rows and pages a table has, without counting."""

from __future__ import annotations

from typing import Any, Final

import psycopg
from psycopg import sql

from embedd_dagster.connectors.postgresql.introspection import Relation

# Rows by what the last VACUUM or ANALYZE counted a page, times the pages of now; null if nothing was counted.
_ESTIMATE: Final = """
SELECT CASE WHEN pg_catalog.bool_and(known) THEN pg_catalog.sum(rows)::pg_catalog.int8 END
FROM (
    SELECT pages = 0 AND c.relkind <> 'f' OR c.reltuples >= 0 AND (c.relpages > 0 OR c.relkind = 'f') AS known,
           CASE WHEN c.relkind = 'f' THEN c.reltuples WHEN pages = 0 THEN 0
                ELSE c.reltuples / nullif(c.relpages, 0) * pages END AS rows
    FROM pg_catalog.pg_class c,
         LATERAL (SELECT pg_catalog.pg_relation_size(c.oid)
                         / pg_catalog.current_setting('block_size')::pg_catalog.int8) AS size(pages)
    WHERE c.relkind = ANY ('{r,m,f}'::pg_catalog."char"[])
      AND c.oid IN (SELECT %(oid)s::pg_catalog.oid
                    UNION SELECT relid FROM pg_catalog.pg_partition_tree(%(oid)s) WHERE isleaf)
) AS leaves
"""

_PAGES: Final = """
SELECT pg_catalog.sum(pg_catalog.pg_relation_size(o) / pg_catalog.current_setting('block_size')::pg_catalog.int8)
FROM (SELECT %(oid)s::pg_catalog.oid UNION SELECT relid FROM pg_catalog.pg_partition_tree(%(oid)s) WHERE isleaf) AS l(o)
"""

_LEAST_PLANNED_PAGES: Final = 10  # PostgreSQL's table_block_relation_estimate_size


def row_estimate(connection: psycopg.Connection[Any], relation: Relation) -> int:
    """About how many rows the table has: by what was counted, otherwise by the planner's estimate for its pages."""
    row = connection.execute(_ESTIMATE, {"oid": relation.oid}).fetchone()
    if row and row[0] is not None:
        return int(row[0])
    planned = planner_estimate(connection, relation)
    if relation.kind == "f":
        return planned
    # which takes a table that was never vacuumed to be of ten pages at least
    return round(planned * min(1.0, page_count(connection, relation) / _LEAST_PLANNED_PAGES))


def page_count(connection: psycopg.Connection[Any], relation: Relation) -> int:
    """How many pages the table, with its partitions, has now."""
    row = connection.execute(_PAGES, {"oid": relation.oid}).fetchone()
    return int(row[0]) if row and row[0] else 0


def planner_estimate(connection: psycopg.Connection[Any], relation: Relation) -> int:
    """How many rows the planner expects: also of views, and of tables that were never analyzed."""
    row = connection.execute(sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {}").format(relation.identifier), []).fetchone()
    return int(row[0][0]["Plan"]["Plan Rows"]) if row else 0
