"""What the text of a table's values depends on besides its rows: labels of enums, attributes of composite types, and the like.

`ALTER TYPE … RENAME VALUE` changes the text of all rows with that label, and logs no change of any row. So do an attribute that
a composite type gains or loses, an extension whose type gets another output function, and another expression of a virtual
generated column.

What a type is made of counts as well: the element of an array, the base of a domain, the subtype of a range, the attributes
of a composite type. PostgreSQL's own types are made of their own kind only, and their text depends on settings that every
session of ours sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import psycopg

from embedd_dagster.connectors.postgresql.cdc.eligibility import TableDetails

TextDependencies = dict[str, list[int]]
"""Hashes of labels, attributes and the like, by type. A longer list has additions only."""

_FIRST_OID: Final = 16384
"""Of what is not PostgreSQL's own."""

# A changed label or attribute is another version of its catalog row, even if it is changed back. A new
# label is a new row with a higher OID. The output function of an array, a domain, a range, an enum or a composite type is
# PostgreSQL's own.
_TYPES: Final = """
WITH RECURSIVE made_of(root, oid) AS (
    SELECT r.oid, r.oid FROM pg_catalog.unnest(%(roots)s::pg_catalog.oid[]) AS r(oid)
    UNION
    SELECT m.root, part.oid FROM made_of m JOIN pg_catalog.pg_type t ON t.oid = m.oid
    CROSS JOIN LATERAL (
        SELECT t.typelem UNION ALL SELECT t.typbasetype
        UNION ALL SELECT r.rngsubtype FROM pg_catalog.pg_range r WHERE r.rngtypid = t.oid
        UNION ALL SELECT r.rngtypid FROM pg_catalog.pg_range r WHERE r.rngmultitypid = t.oid
        UNION ALL SELECT a.atttypid FROM pg_catalog.pg_attribute a
                  WHERE t.typrelid <> 0 AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
    ) AS part(oid)
    WHERE part.oid >= %(first)s
)
SELECT m.root::pg_catalog.int8, t.oid::pg_catalog.int8, CASE t.typtype
    WHEN 'e' THEN (
     SELECT pg_catalog.array_agg(
         pg_catalog.hashtextextended(pg_catalog.concat_ws(' ', e.xmin, e.enumlabel) COLLATE pg_catalog."C", 0)
         ORDER BY e.oid)
     FROM pg_catalog.pg_enum e WHERE e.enumtypid = t.oid)
    WHEN 'c' THEN (
     SELECT ARRAY[pg_catalog.hashtextextended(
         pg_catalog.string_agg(pg_catalog.concat_ws(' ', a.attnum, a.atttypid, a.atttypmod, a.attisdropped), ','
                               ORDER BY a.attnum) COLLATE pg_catalog."C", 0)]
     FROM pg_catalog.pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0)
    WHEN 'b' THEN (
     SELECT ARRAY[pg_catalog.hashtextextended(
         pg_catalog.concat_ws(' ', p.oid, p.xmin, p.prosrc, p.probin, x.extversion) COLLATE pg_catalog."C", 0)]
     FROM pg_catalog.pg_proc p
     LEFT JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_type'::pg_catalog.regclass AND d.objid = t.oid
               AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND d.deptype = 'e'
     LEFT JOIN pg_catalog.pg_extension x ON x.oid = d.refobjid
     WHERE p.oid = t.typoutput AND p.oid >= %(first)s) END
FROM made_of m JOIN pg_catalog.pg_type t ON t.oid = m.oid
ORDER BY 1, 2
"""

# Setting an expression makes another row. It is possible if the table is published with all tables or its schema.
_EXPRESSIONS: Final = """
SELECT d.adrelid::pg_catalog.int8, pg_catalog.array_agg(d.oid::pg_catalog.int8 ORDER BY d.adnum)
FROM pg_catalog.pg_attrdef d
JOIN pg_catalog.pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum AND a.attgenerated = 'v'
WHERE d.adrelid = ANY (%s::pg_catalog.oid[])
GROUP BY d.adrelid
"""


def read_text_dependencies(
    connection: psycopg.Connection[Any], all_details: Iterable[TableDetails]
) -> dict[int, TextDependencies]:
    """The dependencies of each table, by its OID. No query if all columns are plain ones of PostgreSQL's own types."""
    all_details = list(all_details)
    types = _read_types(connection, {oid for details in all_details for oid in _type_oids(details)})
    expressions = _read_expressions(
        connection, {member.oid for details in all_details for member in details.members if member.virtual}
    )
    found: dict[int, TextDependencies] = {}
    for details in all_details:
        meanings = found[details.table.oid] = {}
        for oid in _type_oids(details):
            meanings.update(types.get(oid, {}))
        for member in details.members:
            if member.oid in expressions:
                meanings[f"expressions of {member.oid}"] = expressions[member.oid]
    return found


def have_changed(before: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> bool:
    """Whether a text may differ now. Additions, such as a new label, do not count."""
    return any(now.get(name, [])[: len(said)] != said for name, said in before.items())


def _type_oids(details: TableDetails) -> set[int]:
    return {type_oid for _number, type_oid, _modifier in details.columns.values() if type_oid >= _FIRST_OID}


def _read_types(connection: psycopg.Connection[Any], roots: set[int]) -> dict[int, TextDependencies]:
    found: dict[int, TextDependencies] = {}
    if roots:
        for root, oid, said in connection.execute(_TYPES, {"roots": sorted(roots), "first": _FIRST_OID}).fetchall():
            if said is not None:
                found.setdefault(root, {})[f"type {oid}"] = said
    return found


def _read_expressions(connection: psycopg.Connection[Any], oids: set[int]) -> dict[int, list[int]]:
    if not oids:
        return {}
    return dict(connection.execute(_EXPRESSIONS, [sorted(oids)]).fetchall())
