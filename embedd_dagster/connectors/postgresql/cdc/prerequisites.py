"""Whether CDC is possible for a database as a whole: the requirements of server and role, and the statements that meet them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from embedd_dagster.connectors.postgresql.credentials import Server
from embedd_dagster.connectors.postgresql.identifiers import quoted
from embedd_dagster.errors import SourceRejected

_MAX_STATEMENTS: Final = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """A reason why CDC is not possible for a table or a database."""

    reason: str
    statement: str = ""
    """The SQL that solves it, if SQL can."""
    advice: str = ""
    """What else to do."""


def rejection(what: str, problems: Iterable[Problem]) -> SourceRejected:
    """One error for all of them, with every statement in its resolution."""
    problems = list(problems)
    reasons = "; ".join(dict.fromkeys(problem.reason for problem in problems))
    statements = list(dict.fromkeys(problem.statement for problem in problems if problem.statement))
    advice = " ".join(dict.fromkeys(problem.advice for problem in problems if problem.advice))
    resolution = advice
    if statements:
        listed = " ".join(statements[:_MAX_STATEMENTS])
        more = f" (and {len(statements) - _MAX_STATEMENTS} more)" if len(statements) > _MAX_STATEMENTS else ""
        resolution = f"{advice} Run as the table's owner, or as an administrator: {listed}{more}".strip()
    return SourceRejected(f"Changes of {what} cannot be followed: {reasons}.", resolution=resolution or None)


@dataclass(frozen=True, slots=True)
class Prerequisites:
    """The facts of the server and of our role that CDC depends on."""

    is_standby: bool
    wal_level: str
    may_replicate: bool
    has_rds_role: bool
    may_create: bool
    slot_is_free: bool
    has_slot_of_ours: bool
    """Of any connection."""

    def problems(self, server: Server, *, for_publication: bool, for_slot: bool) -> list[Problem]:
        """What is missing to read a slot, and to create a publication or a slot if that is needed."""
        user, found = quoted(server.grantee), []
        if self.is_standby:
            return [Problem("the server is a standby", advice="Let the connection lead to the primary server.")]
        if self.wal_level != "logical":
            found.append(
                Problem(
                    f"the server's wal_level is {self.wal_level!r} instead of 'logical'",
                    "ALTER SYSTEM SET wal_level = logical;",
                    "wal_level counts from the server's next restart on; a managed service has a parameter for it, such as"
                    " rds.logical_replication.",
                )
            )
        if not self.may_replicate:
            statement = f"GRANT rds_replication TO {user};" if self.has_rds_role else f"ALTER ROLE {user} REPLICATION;"
            found.append(Problem(f"the user {server.grantee!r} has no right to replicate", statement))
        if for_publication and not self.may_create:
            statement = f"GRANT CREATE ON DATABASE {quoted(server.database)} TO {user};"
            found.append(Problem(f"the user {server.grantee!r} may not create a publication", statement))
        if for_slot and not self.slot_is_free:
            found.append(
                Problem(
                    "all of the server's max_replication_slots are taken",
                    advice="Raise max_replication_slots and restart the server, or drop a slot that nobody reads:"
                    " SELECT slot_name, active FROM pg_replication_slots;",
                )
            )
        return found


PREREQUISITES: Final = """
SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('wal_level'),
       r.rolsuper OR r.rolreplication OR EXISTS (
           SELECT FROM pg_catalog.pg_roles g
           WHERE g.rolname IN ('rds_replication', 'rds_superuser') AND pg_catalog.pg_has_role(g.oid, 'USAGE')),
       EXISTS (SELECT FROM pg_catalog.pg_roles g WHERE g.rolname = 'rds_replication'),
       pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE'),
       (SELECT pg_catalog.count(*) < pg_catalog.current_setting('max_replication_slots')::pg_catalog.int8
        FROM pg_catalog.pg_replication_slots),
       EXISTS (SELECT FROM pg_catalog.pg_replication_slots
               WHERE slot_name::pg_catalog.text ^@ 'embedd_' AND database = pg_catalog.current_database())
FROM pg_catalog.pg_roles r WHERE r.rolname = CURRENT_USER
"""
