"""Where in the user's own database vectors may be kept: a schema that may be written, and pgvector."""

from __future__ import annotations

import psycopg
from psycopg import sql

from embedd_dagster.connectors.postgresql.errors import write_denied
from embedd_dagster.connectors.postgresql.identifiers import quoted
from embedd_dagster.connectors.postgresql.pgvector.database import Database
from embedd_dagster.connectors.postgresql.sessions import ScopedConnection, role_schemas
from embedd_dagster.errors import VectorStoreRejected


def find_schema(connection: ScopedConnection, database: Database, schema: str | None) -> str:
    """Where sets can be made: `schema`, or the first of the search path that may be written.

    Raises SourceAccessDenied with the GRANT that is missing, or VectorStoreRejected if there is no such schema.
    """
    path = [schema] if schema else [name for name in role_schemas(connection) if not name.startswith("pg_")]
    row = connection.execute(
        """
        SELECT n.nspname, pg_catalog.has_schema_privilege(n.oid, 'CREATE') AS is_writable
        FROM pg_catalog.unnest(%s::pg_catalog.text[]) WITH ORDINALITY AS s(name, place)
        JOIN pg_catalog.pg_namespace n ON n.nspname = s.name
        ORDER BY is_writable DESC, s.place LIMIT 1
        """,
        [path],
    ).fetchone()
    if row is None and schema is not None:
        raise VectorStoreRejected(f"There is no schema {schema} in {database.address} to write vectors to.")
    if row is None:
        role = connection.role or database.server.user
        raise VectorStoreRejected(
            f"The search path of {role!r} leads to no schema in {database.address}, so there is none to write vectors to.",
            resolution="Name a schema that this role may write to, as an administrator:"
            f" ALTER ROLE {quoted(database.server.user)} SET search_path = <schema>;",
        )
    found, writable = row
    if not writable:
        role = connection.role or database.server.user
        grant = f"GRANT USAGE, CREATE ON SCHEMA {quoted(found)} TO {quoted(role)};"
        raise write_denied(database.server, role, f"tables to schema {found!r}", grant)
    return str(found)


def find_vector_schema(connection: ScopedConnection, database: Database) -> str:
    """The schema that pgvector's names are in; installs pgvector if it is missing.

    Raises SourceAccessDenied or VectorStoreRejected with the SQL that an administrator has to run.
    """
    for _attempt in range(2):
        row = connection.execute(
            "SELECT n.nspname, e.extversion FROM pg_catalog.pg_extension e"
            " JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
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


def _create_extension(connection: ScopedConnection, database: Database) -> None:
    is_available = "SELECT 1 FROM pg_catalog.pg_available_extensions WHERE name = 'vector'"
    if not connection.execute(is_available).fetchone():
        raise VectorStoreRejected(
            f"PostgreSQL at {database.address} does not have the pgvector extension.",
            resolution="Install pgvector 0.8 or newer on the database server, then run: CREATE EXTENSION vector;",
        )
    schema = find_schema(connection, database, None)
    try:
        with connection.transaction():
            connection.execute(
                sql.SQL("CREATE EXTENSION IF NOT EXISTS vector SCHEMA {}").format(sql.Identifier(schema))
            )
    except psycopg.errors.InsufficientPrivilege:
        role = connection.role or database.server.user
        raise write_denied(database.server, role, "the extension pgvector", "CREATE EXTENSION vector;") from None
    except (psycopg.errors.UniqueViolation, psycopg.errors.DuplicateObject):
        return  # somebody else made it just now
