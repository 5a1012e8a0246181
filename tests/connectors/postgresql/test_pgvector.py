"""What is pgvector's alone: the public view, the index behind it, whose objects are whose, rights, and the key's type."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from psycopg import sql

from embedd_dagster.connectors.postgresql.pgvector import indexes as pgvector_index
from embedd_dagster.connectors.postgresql.pgvector.filters import compile_filter
from embedd_dagster.connectors.postgresql.pgvector.names import platform_vector_ref, table_name
from embedd_dagster.connectors.postgresql.pgvector.objects import OwnedRelation
from embedd_dagster.connectors.postgresql.pgvector.store import PgvectorStore
from embedd_dagster.connectors.registry import open_platform_store
from embedd_dagster.core.filters import parse_filter
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import PointBatch, VectorSet
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import ConfigurationError, SourceAccessDenied, VectorStoreRejected, VectorStoreUnavailable
from embedd_dagster.protocols.store import SearchRequest
from tests.support.cdc_source import credentials_of

Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture
def credentials(database_url: str) -> dict[str, object]:
    return credentials_of(database_url)


@pytest.fixture
def store(credentials: dict[str, object]) -> Iterator[PgvectorStore]:
    with PgvectorStore(credentials) as opened:
        yield opened


@pytest.fixture
def admin(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def role(admin: Connection, credentials: dict[str, object]) -> Iterator[dict[str, object]]:
    """The credentials of a user without any rights, whose password needs escaping everywhere."""
    name, password = f"user_{uuid4().hex[:8]}", "p@:/%w' \\"
    admin.execute(
        sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(password))  # type: ignore[arg-type]
    )
    yield {**credentials, "user": name, "password": password}
    admin.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


def new_set(
    version: int = 1, *, dimensions: int = 8, key_type: str = "bigint", like: VectorSet | None = None
) -> VectorSet:
    vector_table_id = like.vector_table_id if like else f"vt_{uuid4().hex[:26]}"
    types = {"color": FilterType.KEYWORD, "price": FilterType.FLOAT}
    return VectorSet(vector_table_id, version, f"{vector_table_id[:11]}_My-things", dimensions, types, key_type)


def batch(keys: list[Key], dimensions: int = 8, text: str = "t") -> PointBatch:
    count = len(keys)
    vectors = np.random.default_rng(1).standard_normal((count, dimensions)).astype(np.float32)
    metadata: list[dict[str, object]] = [{"color": f"c{index % 7}", "price": index / 2} for index in range(count)]
    return PointBatch(
        keys, [text] * count, metadata, [1] * count, [2] * count, [index % 65536 for index in range(count)], vectors
    )


def built(store: PgvectorStore, vector_set: VectorSet, points: PointBatch) -> VectorSet:
    store.create(vector_set)
    store.upsert(vector_set, points)
    store.finish_load(vector_set)
    return vector_set


def view_of(vector_set: VectorSet) -> str:
    return f'"embedd_{vector_set.public_name}"'


@pytest.mark.parametrize(("dimensions", "order"), [(8, "embedding"), (2100, "embedding::halfvec(2100)")])
def test_a_search_by_sql_through_the_view_uses_the_index(
    store: PgvectorStore, admin: Connection, dimensions: int, order: str
) -> None:
    points = batch(list(range(1500)), dimensions)
    vector_set = built(store, new_set(dimensions=dimensions), points)
    store.publish(vector_set)
    kind = order.partition("::")[2] or "vector"
    asked = f"'{points.vectors[5].tolist()}'::{kind}"
    query = f"SELECT pk_value FROM {view_of(vector_set)} ORDER BY {order} <=> {asked} LIMIT 3"
    admin.execute("SET enable_seqscan = off")  # a table of this size is scanned otherwise
    assert "_hnsw" in str(admin.execute(f"EXPLAIN {query}").fetchall())  # type: ignore[arg-type]
    assert admin.execute(query).fetchall()[0] == (5,)  # type: ignore[arg-type]
    hits = store.search(vector_set, SearchRequest(points.vectors[5], limit=10))
    assert hits[0].key == 5
    assert len(hits) == 10
    assert "ready" in str(store.info(vector_set)["index"])


def test_above_4_000_dimensions_search_is_exact_and_says_so(store: PgvectorStore) -> None:
    points = batch([1, 2, 3], 5000)
    vector_set = built(store, new_set(dimensions=5000), points)
    assert store.search(vector_set, SearchRequest(points.vectors[1], limit=1))[0].key == 2
    assert "exact" in str(store.info(vector_set)["index"])


@pytest.mark.parametrize(
    "raw", [{"color": "c1"}, {"color": {"in": ["c1", "c2"]}}, {"price": 1.5}, {"price": {"gte": 1, "lt": 3}}]
)
def test_filters_are_served_by_an_index(store: PgvectorStore, admin: Connection, raw: dict[str, object]) -> None:
    vector_set = built(store, new_set(), batch(list(range(100))))
    condition = compile_filter(parse_filter(raw, vector_set.filter_types), vector_set.filter_types)
    admin.execute("SET enable_seqscan = off")
    table = sql.Identifier(table_name(vector_set))
    plan = admin.execute(sql.SQL("EXPLAIN SELECT FROM {} WHERE {}").format(table, condition)).fetchall()
    assert "_filter" in str(plan)


def test_the_view_joins_the_source_and_shows_every_column(store: PgvectorStore, admin: Connection) -> None:
    admin.execute(
        "CREATE TABLE things (id uuid PRIMARY KEY); INSERT INTO things VALUES ('00000000-0000-0000-0000-000000000007')"
    )
    key = uuid4()
    admin.execute("INSERT INTO things VALUES (%s)", [key])
    vector_set = built(store, new_set(key_type="uuid"), batch([key]))
    store.publish(vector_set)
    joined = admin.execute(
        f"SELECT id, v.metadata->>'color' FROM things JOIN {view_of(vector_set)} v ON v.pk_value = id"  # type: ignore[arg-type]
    )
    assert joined.fetchall() == [(key, "c0")]
    described = admin.execute(f"SELECT * FROM {view_of(vector_set)}").description or []  # type: ignore[arg-type]
    assert [column.name for column in described] == [
        "pk_value", "embedding", "embedded_text", "metadata", "row_hash", "text_hash", "bucket", "updated_at",
    ]  # fmt: skip
    assert platform_vector_ref(store.schema, vector_set.public_name) == f"public.embedd_{vector_set.public_name}"


def test_views_and_grants_of_users_outlive_a_new_version_of_other_dimensions(
    store: PgvectorStore, admin: Connection, role: dict[str, object]
) -> None:
    first = built(store, new_set(), batch([1], text="old"))
    store.publish(first)
    admin.execute(f"CREATE VIEW mine AS SELECT embedded_text, embedding FROM {view_of(first)}")  # type: ignore[arg-type]
    admin.execute(f"GRANT SELECT ON {view_of(first)} TO {role['user']}")  # type: ignore[arg-type]
    second = built(store, new_set(2, dimensions=16, like=first), batch([1], 16, text="new"))
    store.publish(second)
    store.drop(first.vector_table_id, 1)
    assert admin.execute("SELECT embedded_text, vector_dims(embedding) FROM mine").fetchall() == [("new", 16)]
    granted = admin.execute("SELECT has_table_privilege(%s, %s, 'SELECT')", [role["user"], view_of(first)])
    assert granted.fetchall() == [(True,)]
    with pytest.raises(VectorStoreRejected, match=r"public\.mine"):
        store.drop_public_name(first.vector_table_id, first.public_name)
    admin.execute("DROP VIEW mine")
    store.drop_public_name(first.vector_table_id, first.public_name)


def test_another_key_type_replaces_the_view_unless_others_stand_on_it(store: PgvectorStore, admin: Connection) -> None:
    first = built(store, new_set(), batch([1]))
    store.publish(first)
    second = built(store, new_set(2, key_type="text", like=first), batch(["a"]))
    admin.execute(f"CREATE VIEW mine AS SELECT * FROM {view_of(first)}")  # type: ignore[arg-type]
    with pytest.raises(VectorStoreRejected, match=r"public\.mine"):
        store.publish(second)
    assert admin.execute("SELECT pk_value FROM mine").fetchall() == [(1,)]
    admin.execute("DROP VIEW mine")
    store.publish(second)
    assert admin.execute(f"SELECT pk_value FROM {view_of(first)}").fetchall() == [("a",)]  # type: ignore[arg-type]


def test_objects_of_others_are_never_touched(store: PgvectorStore, admin: Connection) -> None:
    vector_set = new_set()
    admin.execute(f'CREATE TABLE "{table_name(vector_set)}" (mine int)')  # type: ignore[arg-type]
    admin.execute(f"CREATE TABLE {view_of(vector_set)} (mine int)")  # type: ignore[arg-type]
    for call in (
        lambda: store.create(vector_set),
        lambda: store.drop(vector_set.vector_table_id, 1),
        lambda: store.drop_public_name(vector_set.vector_table_id, vector_set.public_name),
    ):
        with pytest.raises(VectorStoreRejected, match="is not part of this vector table"):
            call()
    other = new_set(2, like=vector_set)
    store.create(other)
    with pytest.raises(VectorStoreRejected, match="is not part of this vector table"):
        store.publish(other)
    assert store.versions(vector_set.vector_table_id) == [2]
    assert admin.execute(f"SELECT mine FROM {view_of(vector_set)}").fetchall() == []  # type: ignore[arg-type]


def test_missing_rights_are_told_with_the_grant(
    store: PgvectorStore, admin: Connection, role: dict[str, object], credentials: dict[str, object]
) -> None:
    with PgvectorStore(role) as poor, pytest.raises(SourceAccessDenied) as caught:
        poor.check()
    assert caught.value.resolution == (
        f'Run as the owner or an administrator: GRANT USAGE, CREATE ON SCHEMA "public" TO "{role["user"]}";'
    )
    admin.execute(f"GRANT CREATE ON SCHEMA public TO {role['user']}")  # type: ignore[arg-type]
    with PgvectorStore(role) as poor, pytest.raises(SourceAccessDenied, match="extension pgvector"):
        poor.check()
    store.create(new_set())
    with PgvectorStore(role) as poor:
        poor.check()
        vector_set = built(poor, new_set(), batch([1, 2]))
        poor.publish(vector_set)
        assert poor.count(vector_set) == 2
    with PgvectorStore({**role, "password": "wr@ng"}) as wrong, pytest.raises(SourceAccessDenied) as refused:
        wrong.check()
    assert "wr@ng" not in str(refused.value)
    with PgvectorStore({**credentials, "database": "nope"}) as nowhere, pytest.raises(VectorStoreRejected):
        nowhere.check()
    with pytest.raises(ConfigurationError, match="host"):
        PgvectorStore({"database": "x", "user": "y"})


def test_check_leaves_nothing_behind(store: PgvectorStore, admin: Connection) -> None:
    store.check()
    assert admin.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'").fetchall() == []


def test_pgvector_and_tables_may_be_in_schemas_outside_of_the_search_path(
    admin: Connection, credentials: dict[str, object]
) -> None:
    admin.execute('CREATE SCHEMA "ext %s"; CREATE SCHEMA "Vec""tors"; CREATE EXTENSION vector SCHEMA "ext %s"')
    with PgvectorStore(credentials, schema='Vec"tors') as store:
        points = batch(list(range(50)))
        vector_set = built(store, new_set(), points)
        store.publish(vector_set)
        tree = parse_filter({"color": {"in": ["c1", "c2"]}}, vector_set.filter_types)
        assert store.search(vector_set, SearchRequest(points.vectors[1], limit=3, filter=tree))[0].key == 1
        assert store.versions(vector_set.vector_table_id) == [1]
    with PgvectorStore(credentials) as elsewhere:  # opened without the schema, it finds what is there
        assert elsewhere.schema == "public"
        assert elsewhere.count(vector_set) == 50
        second = built(elsewhere, new_set(2, like=vector_set), batch([1]))
        elsewhere.publish(second)
        elsewhere.drop(vector_set.vector_table_id, 1)
        assert str(elsewhere.info(second)["table"]).startswith('Vec"tors.')


@pytest.mark.parametrize(
    ("definition", "type_name", "keys"),
    [
        ("CREATE DOMAIN sku AS text CHECK (length(VALUE) < 10)", "sku", ["a", "b"]),
        ("CREATE TYPE size AS ENUM ('s', 'm')", "size", ["s", "m"]),
        ('CREATE DOMAIN "Odd ""id" AS bigint', '"Odd ""id"', [1, 2]),
        ("SELECT 1", "character(5)", ["ab   ", "cd   "]),
    ],
)
def test_keys_of_the_sources_own_types(
    store: PgvectorStore, admin: Connection, definition: str, type_name: str, keys: list[Key]
) -> None:
    admin.execute(definition)  # type: ignore[arg-type]
    points = batch(keys)
    vector_set = built(store, new_set(key_type=type_name), points)
    store.upsert(vector_set, points)
    assert sorted(point.key for point in store.fingerprints(vector_set, 0, None)) == sorted(keys)  # type: ignore[type-var]
    assert store.vectors(vector_set, keys).keys() == set(keys)
    assert store.search(vector_set, SearchRequest(points.vectors[1], limit=1))[0].key == keys[1]
    store.delete(vector_set, keys[:1])
    assert store.count(vector_set) == 1


@pytest.mark.parametrize("type_name", ["json", "no_such_type", "bigint); DROP TABLE x; --", "double precision", None])
def test_types_that_are_no_keys_are_refused(store: PgvectorStore, type_name: str | None) -> None:
    with pytest.raises(VectorStoreRejected):
        store.create(new_set(key_type=type_name))  # type: ignore[arg-type]


def test_a_key_of_another_type_is_refused(store: PgvectorStore) -> None:
    vector_set = new_set(key_type="integer")
    store.create(vector_set)
    for key in ("text", 2**40):
        with pytest.raises(VectorStoreRejected):
            store.upsert(vector_set, batch([key]))


def test_no_row_content_is_in_an_error(store: PgvectorStore) -> None:
    vector_set = new_set()
    store.create(vector_set)
    points = batch([1], text="secret text")
    points.vectors[0, 0] = np.nan
    with pytest.raises(VectorStoreRejected) as caught:
        store.upsert(vector_set, points)
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert store.count(vector_set) == 0


def test_an_index_that_a_killed_build_left_invalid_is_built_anew(store: PgvectorStore, admin: Connection) -> None:
    vector_set = built(store, new_set(), batch(list(range(100))))
    index = f"{table_name(vector_set)}_hnsw"
    admin.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = to_regclass(%s)", [index])
    assert "not built" in str(store.info(vector_set)["index"])
    store.finish_load(vector_set)
    assert "ready" in str(store.info(vector_set)["index"])


def test_too_little_memory_for_a_parallel_build_is_lived_with(
    store: PgvectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, modest = pgvector_index._build, []

    def short_of_memory(
        connection: Connection, place: OwnedRelation, suffix: str, method: sql.Composable, settings: dict[str, str]
    ) -> None:
        if "maintenance_work_mem" in settings:
            method = sql.SQL("(bucket); DO $$ BEGIN RAISE disk_full; END $$")
        elif settings:
            modest.append(settings)
        real(connection, place, suffix, method, settings)

    monkeypatch.setattr(pgvector_index, "_build", short_of_memory)
    vector_set = built(store, new_set(), batch(list(range(10))))
    assert "ready" in str(store.info(vector_set)["index"])
    assert modest[0] == {"max_parallel_maintenance_workers": "0"}


def test_a_roles_statement_timeout_does_not_end_a_load(
    store: PgvectorStore, admin: Connection, role: dict[str, object]
) -> None:
    store.create(new_set())
    admin.execute(
        f"GRANT CREATE ON SCHEMA public TO {role['user']}; ALTER ROLE {role['user']} SET statement_timeout = '40ms'"
    )  # type: ignore[arg-type]
    with PgvectorStore(role) as impatient:
        built(impatient, new_set(), batch(list(range(3000))))


def test_an_abandoned_iteration_leaves_no_transaction_open(store: PgvectorStore, admin: Connection) -> None:
    vector_set = built(store, new_set(), batch(list(range(100))))
    iterator = store.fingerprints(vector_set, 0, None)
    next(iterator)
    del iterator
    store.search(vector_set, SearchRequest(np.ones(8, np.float32), limit=1))
    open_ones = (
        "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND datname = current_database()"
    )
    assert admin.execute(open_ones).fetchall() == [(0,)]


def test_connections_that_died_are_replaced(store: PgvectorStore, admin: Connection) -> None:
    vector_set = built(store, new_set(), batch([1]))
    admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    assert store.count(vector_set) == 1


def test_publish_waits_for_a_reader_that_holds_the_view(
    store: PgvectorStore, admin: Connection, database_url: str
) -> None:
    first = built(store, new_set(), batch([1], text="old"))
    store.publish(first)
    second = built(store, new_set(2, like=first), batch([1], text="new"))
    with psycopg.connect(database_url) as reader:
        reader.execute(f"SELECT * FROM {view_of(first)}")  # type: ignore[arg-type]
        hurried = PgvectorStore(credentials_of(database_url), lock_attempt_seconds=0.5, lock_seconds=0.5)
        with hurried, pytest.raises(VectorStoreUnavailable):
            hurried.publish(second)
        publishing = threading.Thread(target=store.publish, args=[second])
        publishing.start()
        publishing.join(0.3)
        assert publishing.is_alive()
        reader.commit()
        publishing.join()
    assert admin.execute(f"SELECT embedded_text FROM {view_of(first)}").fetchall() == [("new",)]  # type: ignore[arg-type]


def test_all_matching_rows_are_found_also_by_way_of_the_index(store: PgvectorStore, database_url: str) -> None:
    points = batch(list(range(4000)))
    vector_set = built(store, new_set(), points)
    tree = parse_filter({"price": {"lt": 3}}, vector_set.filter_types)
    # the scan of the index ends early, and the exact search takes over
    with PgvectorStore(credentials_of(database_url), exact_rows=0, max_scan_tuples=50) as short:
        hits = short.search(vector_set, SearchRequest(points.vectors[3], limit=10, filter=tree))
    assert {hit.key for hit in hits} == set(range(6))


@pytest.mark.parametrize(("host", "denied"), [("169.254.169.254", False), ("127.0.0.1", True), ("/tmp", True)])
def test_an_address_that_is_not_to_be_reached_is_not_connected_to(host: str, denied: bool) -> None:
    credentials = {"host": host, "port": 5432, "database": "d", "user": "u", "password": "p"}
    with open_platform_store("postgresql", credentials, deny_private_networks=denied) as store:
        with pytest.raises((VectorStoreRejected, VectorStoreUnavailable)) as refused:
            store.check()
    assert "does not connect" in refused.value.message or "resolve" in refused.value.message


def test_the_index_stage_reports_how_many_rows_postgresql_has_indexed(
    database_url: str,
) -> None:
    vector_set = new_set(dimensions=500)
    reported: list[tuple[int, int]] = []
    with PgvectorStore(credentials_of(database_url), report_seconds=0.01) as store:
        store.create(vector_set)
        store.upsert(vector_set, batch(list(range(4000)), 500))
        store.finish_load(vector_set, lambda indexed, total: reported.append((indexed, total)))
    assert reported
    assert {total for _indexed, total in reported} == {4000}
    assert all(0 <= indexed <= total for indexed, total in reported)
