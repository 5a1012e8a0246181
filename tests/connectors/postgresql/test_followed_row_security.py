"""Tables with row-level security: the log does not say when the rows change that a role sees."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from embedd_dagster.connectors.registry import open_source
from embedd_dagster.errors import SourceRejected
from embedd_dagster.protocols.cdc import CdcStream
from embedd_dagster.protocols.source import Source
from tests.support.cdc_source import Admin, StreamReader, T, credentials_of, published, refusal, statements_of

_POLICY = "CREATE POLICY visible ON t USING (id < 3)"


@pytest.fixture
def role(admin: Admin, table: None) -> Iterator[str]:
    """A user that owns `t` and may replicate, but is subject to policies."""
    name = f"follower_{uuid4().hex[:8]}"
    admin.execute(
        f"""CREATE ROLE {name} LOGIN REPLICATION PASSWORD 'secret'; ALTER TABLE t OWNER TO {name};
        GRANT CREATE ON DATABASE "{admin.info.dbname}" TO {name}"""
    )
    yield name
    admin.execute(f"REASSIGN OWNED BY {name} TO CURRENT_USER; DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.fixture
def source(role: str, database_url: str) -> Iterator[Source]:
    with open_source("postgresql", credentials_of(database_url, user=role, password="secret")) as opened:
        yield opened


@pytest.mark.parametrize(
    ("statements", "helps"),
    [
        (
            f"{_POLICY}; ALTER TABLE t ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            'ALTER TABLE "public"."t" NO FORCE ROW LEVEL SECURITY;',
        ),
        (
            "ALTER TABLE t ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            'ALTER TABLE "public"."t" NO FORCE ROW LEVEL SECURITY;',
        ),
        (
            (
                f"{_POLICY}; ALTER TABLE t OWNER TO CURRENT_USER, ENABLE ROW LEVEL SECURITY;"
                "GRANT SELECT ON t TO {role}; CREATE PUBLICATION embedd_made FOR TABLE t"
            ),
            'ALTER ROLE "{role}" BYPASSRLS;',
        ),
    ],
)
def test_a_table_whose_policies_apply_to_the_role_is_refused_with_the_statement_that_helps(
    admin: Admin, role: str, source: Source, statements: str, helps: str
) -> None:
    admin.execute(statements.format(role=role))
    error = refusal(source, T)
    assert isinstance(error, SourceRejected)
    assert "row-level security" in error.message
    assert statements_of(error) == helps.format(role=role)
    admin.execute(statements_of(error))
    source.check_cdc_eligible(T)


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE t ENABLE ROW LEVEL SECURITY",
        "ALTER ROLE {role} BYPASSRLS; ALTER TABLE t ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        _POLICY,
    ],
)
def test_a_table_whose_policies_do_not_apply_to_the_role_is_followed(
    admin: Admin, role: str, source: Source, statement: str
) -> None:
    admin.execute(statement.format(role=role))
    source.check_cdc_eligible(T)


def test_a_followed_table_whose_policies_begin_to_apply_is_refused_and_named_for_a_comparison(
    admin: Admin, role: str, source: Source, feed: CdcStream, stream_reader: StreamReader, name: str
) -> None:
    admin.execute(f"{_POLICY}; ALTER TABLE t ENABLE ROW LEVEL SECURITY")
    subscription = stream_reader.subscribe()
    assert not subscription.rejected, "its owner sees all rows"
    stream_reader.read()
    admin.execute("ALTER TABLE t FORCE ROW LEVEL SECURITY")
    stream_reader.read()
    assert feed.is_altered
    subscription = stream_reader.subscribe()
    assert subscription.hidden == {T}
    assert "row-level security" in subscription.rejected[T].message
    assert published(admin, name) == set()
    admin.execute(statements_of(subscription.rejected[T]))
    subscription = stream_reader.subscribe()
    assert (subscription.newly_subscribed, subscription.hidden, subscription.rejected) == ({T}, frozenset(), {})


def test_a_role_that_loses_bypassrls_is_refused(admin: Admin, role: str, feed: CdcStream, table: None) -> None:
    admin.execute(f"ALTER ROLE {role} BYPASSRLS; ALTER TABLE t ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    stream_reader = StreamReader(feed, T)
    assert stream_reader.subscribe().newly_subscribed == {T}
    stream_reader.read()
    admin.execute(f"ALTER ROLE {role} NOBYPASSRLS")
    stream_reader.read()
    assert feed.is_altered
    assert stream_reader.subscribe().hidden == {T}
