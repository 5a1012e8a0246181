"""A table of which row-level security shows our role nothing is told from an empty one."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from embedd_dagster.connectors.registry import open_source
from embedd_dagster.errors import SourceAccessDenied
from embedd_dagster.protocols.source import Selection, Source
from tests.support.cdc_source import Admin, credentials_of

T = Selection("t", "id", ("v",))


@pytest.fixture
def role(admin: Admin) -> Iterator[str]:
    name = f"reader_{uuid4().hex[:8]}"
    admin.execute(
        f"CREATE ROLE {name} LOGIN PASSWORD 'word'; CREATE ROLE {name}_group; GRANT {name}_group TO {name};"
        "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b');"
        f"ALTER TABLE t ENABLE ROW LEVEL SECURITY; GRANT SELECT ON t TO {name}"
    )
    yield name
    for one in (name, f"{name}_group"):
        admin.execute(f"DROP OWNED BY {one}; DROP ROLE {one}")


@pytest.fixture
def reading(role: str, database_url: str) -> Iterator[Source]:
    with open_source("postgresql", credentials_of(database_url, user=role, password="word")) as opened:
        yield opened


def test_a_table_without_a_policy_for_the_role_says_so_and_the_statement_helps(
    admin: Admin, role: str, reading: Source
) -> None:
    with pytest.raises(SourceAccessDenied, match="no policy lets this user read any row") as caught:
        reading.reader(T)
    statement = f'CREATE POLICY embedd ON "public"."t" FOR SELECT TO "{role}" USING (true);'
    assert statement in caught.value.resolution
    admin.execute(statement)
    assert reading.reader(T).count() == 2


def test_policies_that_let_nothing_through_say_so(admin: Admin, role: str, reading: Source) -> None:
    admin.execute("CREATE POLICY p ON t USING (v = current_setting('app.tenant', true))")
    with pytest.raises(SourceAccessDenied, match="let none of the rows through"):
        reading.reader(T)
    admin.execute("ANALYZE t")
    with pytest.raises(SourceAccessDenied, match="let none of the rows through"):
        reading.reader(T)
    admin.execute("DELETE FROM t")
    admin.execute("ANALYZE t")
    assert reading.reader(T).count() == 0, "a table that is empty for everybody may be read"


@pytest.mark.parametrize(
    ("policy", "count"),
    [
        ("CREATE POLICY p ON t FOR SELECT TO {role}_group USING (id = 1)", 1),
        ("CREATE POLICY p ON t USING (id = 1)", 1),
        ("CREATE POLICY p ON t FOR SELECT TO {role} USING (true)", 2),
        ("ALTER ROLE {role} BYPASSRLS", 2),
        ("CREATE POLICY p ON t FOR UPDATE TO {role} USING (true)", None),
        ("CREATE POLICY p ON t AS RESTRICTIVE TO {role} USING (true)", None),
        ("CREATE POLICY p ON t TO CURRENT_USER USING (true)", None),
    ],
)
def test_a_policy_counts_where_it_lets_the_role_read(
    admin: Admin, role: str, reading: Source, policy: str, count: int | None
) -> None:
    admin.execute(policy.format(role=role))
    if count is None:
        with pytest.raises(SourceAccessDenied):
            reading.reader(T)
    else:
        assert reading.reader(T).count() == count


def test_partitions_and_owners_are_told_apart(admin: Admin, role: str, reading: Source) -> None:
    admin.execute(
        "CREATE TABLE parts (id int PRIMARY KEY, v text) PARTITION BY LIST (id); CREATE TABLE part PARTITION OF parts DEFAULT;"
        "INSERT INTO parts VALUES (1, 'a'); ALTER TABLE parts ENABLE ROW LEVEL SECURITY;"
        f"GRANT SELECT ON parts TO {role}; CREATE POLICY p ON parts USING (id > 5)"
    )
    with pytest.raises(SourceAccessDenied, match="let none of the rows through"):
        reading.reader(Selection("parts", "id", ()))
    admin.execute(f"ALTER TABLE parts OWNER TO {role}; ALTER TABLE part OWNER TO {role}")
    assert reading.reader(Selection("parts", "id", ())).count() == 1
    admin.execute("ALTER TABLE parts FORCE ROW LEVEL SECURITY")
    with pytest.raises(SourceAccessDenied) as caught:
        reading.reader(Selection("parts", "id", ()))
    assert 'ALTER TABLE "public"."parts" NO FORCE ROW LEVEL SECURITY;' in caught.value.resolution
