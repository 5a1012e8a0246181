"""A database in which every name of PostgreSQL's own is taken by somebody else's object, in the schemas that a role searches."""

from __future__ import annotations

from typing import Any

import psycopg

# Taken from the server's catalogs, so that no name is forgotten that a statement of ours uses or will use. Each of them
# raises when it runs. What cannot be made (of pseudo-types, or syntax that knows no schema) is left out.
_PLANT = """
DO $plant$
DECLARE
    found record;
    planted int := 0;
BEGIN
    CREATE FUNCTION {schema}.hijacked() RETURNS bool LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''hijacked''; END';
    GRANT EXECUTE ON FUNCTION {schema}.hijacked() TO public;
    FOR found IN
        SELECT p.proname, pg_get_function_arguments(p.oid) AS arguments, pg_get_function_result(p.oid) AS result
        FROM pg_proc p WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f'
    LOOP
        BEGIN
            EXECUTE format('CREATE FUNCTION {schema}.%I(%s) RETURNS %s LANGUAGE plpgsql AS %L',
                           found.proname, found.arguments, found.result,
                           format('BEGIN RAISE EXCEPTION ''hijacked by function %s''; END', found.proname));
            planted := planted + 1;
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    FOR found IN
        SELECT o.oprname, p.proname, format_type(nullif(o.oprleft, 0), NULL) AS l, format_type(o.oprright, NULL) AS r
        FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode WHERE o.oprnamespace = 'pg_catalog'::regnamespace
    LOOP
        BEGIN
            EXECUTE format('CREATE OPERATOR {schema}.%s (FUNCTION = {schema}.%I%s, RIGHTARG = %s)', found.oprname,
                           found.proname, coalesce(', LEFTARG = ' || found.l, ''), found.r);
            planted := planted + 1;
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    FOR found IN
        SELECT c.relname FROM pg_class c
        WHERE c.relnamespace = 'pg_catalog'::regnamespace AND c.relkind IN ('r', 'v')
          AND has_table_privilege('public', c.oid, 'SELECT')
    LOOP
        EXECUTE format('CREATE VIEW {schema}.%I AS SELECT {schema}.hijacked()', found.relname);
        EXECUTE format('GRANT SELECT ON {schema}.%I TO public', found.relname);
    END LOOP;
    FOR found IN
        SELECT t.typname FROM pg_type t
        WHERE t.typnamespace = 'pg_catalog'::regnamespace AND t.typtype = 'b' AND t.typelem = 0
    LOOP
        BEGIN
            EXECUTE format('CREATE DOMAIN {schema}.%I AS pg_catalog.%1$I CHECK ({schema}.hijacked())', found.typname);
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    IF planted < 3000 THEN RAISE EXCEPTION 'only % planted', planted; END IF;
END $plant$
"""
_AGGREGATE = """
CREATE FUNCTION {schema}.hijacked_state(bool) RETURNS bool LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''hijacked''; END';
CREATE AGGREGATE {schema}.count(*) (SFUNC = {schema}.hijacked_state, STYPE = bool)
"""
# Not implicit ones: those make every comparison of the enum ambiguous, so that nobody could use it.
_CASTS = """
CREATE FUNCTION {schema}.{kind}_as_text({schema}.{kind}) RETURNS pg_catalog.text LANGUAGE plpgsql
    AS 'BEGIN RAISE EXCEPTION ''hijacked by a cast''; END';
CREATE FUNCTION {schema}.text_as_{kind}(pg_catalog.text) RETURNS {schema}.{kind} LANGUAGE plpgsql
    AS 'BEGIN RAISE EXCEPTION ''hijacked by a cast''; END';
CREATE CAST ({schema}.{kind} AS pg_catalog.text) WITH FUNCTION {schema}.{kind}_as_text AS ASSIGNMENT;
CREATE CAST (pg_catalog.text AS {schema}.{kind}) WITH FUNCTION {schema}.text_as_{kind} AS ASSIGNMENT
"""


def plant(admin: psycopg.Connection[Any], schemas: list[str], *, enums: list[tuple[str, str]]) -> None:
    """Takes every name in these schemas, and gives casts to these enums, as (schema, name)."""
    with admin.transaction():
        admin.execute("SET LOCAL search_path = pg_catalog")
        for schema in schemas:
            admin.execute(_PLANT.format(schema=schema).encode())
            admin.execute(_AGGREGATE.format(schema=schema).encode())
        for schema, kind in enums:
            admin.execute(_CASTS.format(schema=schema, kind=kind).encode())
