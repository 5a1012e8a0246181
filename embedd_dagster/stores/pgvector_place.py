"""Where in the user's own database vectors may be kept: a schema that may be written, and pgvector."""

from __future__ import annotations

import psycopg

from embedd_dagster.errors import VectorStoreRejected
from embedd_dagster.postgresql import Connection
from embedd_dagster.stores.pgvector_database import Database, access_denied, quoted


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
