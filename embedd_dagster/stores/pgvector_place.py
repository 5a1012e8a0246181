"""Where in the user's own database vectors may be kept, and which of its tables and views are ours."""

from __future__ import annotations

import psycopg
from psycopg import sql

from embedd_dagster.errors import VectorStoreRejected
from embedd_dagster.stores.pgvector_database import Connection, Database, access_denied, quoted


def find_schema(connection: Connection, database: Database, schema: str | None) -> str:
    """Where sets can be made: `schema`, or the first of the search path that may be written.

    Raises SourceAccessDenied with the GRANT that is missing, or VectorStoreRejected where there is no such schema.
    """
    row = connection.execute(
        """
        SELECT nspname, has_schema_privilege(oid, 'CREATE')
        FROM pg_namespace, coalesce(array_position(current_schemas(false), nspname), 0) AS position
        WHERE CASE WHEN %(schema)s::text IS NULL THEN position > 0 ELSE nspname = %(schema)s::text END
        ORDER BY has_schema_privilege(oid, 'CREATE') DESC, position LIMIT 1
        """,
        {"schema": schema},
    ).fetchone()
    if row is None:
        raise VectorStoreRejected(
            f"There is no schema {schema or 'in the search path'} in {database.address} to write vectors to."
        )
    found, writable = row
    if not writable:
        grant = f"GRANT USAGE, CREATE ON SCHEMA {quoted(found)} TO {quoted(database.user)};"
        raise access_denied(database.user, database.address, f"tables to schema {found!r}", grant)
    return str(found)


def find_vector_schema(connection: Connection, database: Database) -> str:
    """The schema that pgvector's names are in; it is installed where it is not.

    Raises SourceAccessDenied or VectorStoreRejected with the SQL that an administrator has to run.
    """
    for _attempt in range(2):
        row = connection.execute(
            "SELECT n.nspname, e.extversion FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace"
            " WHERE e.extname = 'vector'"
        ).fetchone()
        if row is None:
            _create_extension(connection, database)
            continue
        version = tuple(int(part) for part in row[1].split(".")[:2] if part.isdigit())
        if version < (0, 8):  # filters need its iterative scans
            raise VectorStoreRejected(
                f"pgvector in {database.address} is version {row[1]}; 0.8 or newer is needed.",
                resolution="Install a newer pgvector, then run: ALTER EXTENSION vector UPDATE;",
            )
        return str(row[0])
    raise VectorStoreRejected(f"pgvector could not be installed in {database.address}.")


def _create_extension(connection: Connection, database: Database) -> None:
    if not connection.execute("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'").fetchone():
        raise VectorStoreRejected(
            f"PostgreSQL at {database.address} does not have the pgvector extension.",
            resolution="Install pgvector 0.8 or newer on the database server, then run: CREATE EXTENSION vector;",
        )
    try:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    except psycopg.errors.InsufficientPrivilege:
        raise access_denied(
            database.user, database.address, "the extension pgvector", "CREATE EXTENSION vector;"
        ) from None
    except (psycopg.errors.UniqueViolation, psycopg.errors.DuplicateObject):
        return  # somebody else made it just now


def check_owned(connection: Connection, schema: str, name: str, mark: str) -> bool:
    """Whether the relation is there and ours, told by its comment. Raises VectorStoreRejected for somebody else's."""
    row = connection.execute(
        "SELECT obj_description(c.oid, 'pg_class') FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relname = %s",
        [schema, name],
    ).fetchone()
    if row is not None and row[0] != mark:
        raise VectorStoreRejected(
            f"There is something else called {schema}.{name}, which is not of this vector table (its comment says so).",
            resolution=f"Rename it or move it to another schema: ALTER TABLE {quoted(schema)}.{quoted(name)} RENAME TO …;",
        )
    return row is not None


def dependents(connection: Connection, relation: sql.Composable) -> list[tuple[str, str, str | None]]:
    """The views over a relation: schema, name and comment of each."""
    return connection.execute(
        """
        SELECT DISTINCT n.nspname, v.relname, obj_description(v.oid, 'pg_class')
        FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class v ON v.oid = r.ev_class
        JOIN pg_namespace n ON n.oid = v.relnamespace
        WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
          AND d.refobjid = to_regclass(%s) AND v.oid <> d.refobjid
        """,
        [relation.as_string(connection)],
    ).fetchall()


def drop_view(connection: Connection, schema: str, name: str) -> None:
    """Removes a view of ours. Raises VectorStoreRejected where views of users were made over it."""
    view = sql.Identifier(schema, name)
    refuse_dependents(dependents(connection, view), schema, name)
    connection.execute(sql.SQL("DROP VIEW {}").format(view))


def refuse_dependents(views: list[tuple[str, str, str | None]], schema: str, name: str) -> None:
    """Raises VectorStoreRejected, naming these views over the relation, if there are any."""
    if views:
        listed = ", ".join(f"{view_schema}.{view}" for view_schema, view, _comment in views)
        raise VectorStoreRejected(
            f"{schema}.{name} cannot be replaced or removed, as views were made over it: {listed}.",
            resolution="Drop those views, then try again.",
        )


def relations(connection: Connection, vector_table_id: str) -> list[tuple[str, str]]:
    """Schema and name of every table and view of a vector table."""
    return connection.execute(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relkind IN ('r', 'v') AND starts_with(c.relname, 'embedd_vt_')"
        " AND obj_description(c.oid, 'pg_class') = %s ORDER BY c.relkind, c.oid",
        [f"embedd:{vector_table_id}"],
    ).fetchall()
