"""What a consumer owns in the source, its slot and its publication, and what becomes of it: lost, left, renamed, too long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from embedd_dagster.catalog import cdc, connections, vector_tables
from embedd_dagster.catalog.tables import CdcStreamRow
from embedd_dagster.connectors import registry
from embedd_dagster.connectors.postgresql.cdc.alterations import Alterations
from embedd_dagster.connectors.postgresql.credentials_model import PostgresqlCredentials
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.engine.teardown import drop_unused_streams, teardown
from embedd_dagster.errors import CatalogUnavailable, Conflict, SourceRejected, SourceTableNotFound, SourceUnavailable
from tests.engine.conftest import Product
from tests.support.cdc_product import (
    INSERT,
    ONE_STORE,
    RunningConsumer,
    another_table,
    consumer_of,
    eventually,
    feed_of,
    is_resync_pending,
    is_subscribed,
    is_true,
    run_owed,
    settled,
    slots_of,
)


@ONE_STORE
@pytest.mark.parametrize("is_written_to", [True, False])
def test_a_configured_column_that_is_dropped_is_named(
    followed: tuple[Product, RunningConsumer], is_written_to: bool
) -> None:
    product, _consumer = followed
    product.sql("ALTER TABLE products ADD COLUMN note text DEFAULT 'x'; ALTER TABLE products DROP COLUMN note")
    product.sql(INSERT, 6000)
    eventually(is_true(product))
    product.sql("ALTER TABLE products DROP COLUMN body")
    if is_written_to:
        product.sql("UPDATE products SET price = 5 WHERE id = 1")
    eventually(lambda: is_resync_pending(product))
    if product.table().sync_status != SyncStatus.ERROR:
        # the table's fingerprint revealed it before a change was read, if there is one: the sync finds it
        with pytest.raises(SourceTableNotFound, match="'body'"):
            run_owed(product)
    eventually(lambda: product.table().sync_status == SyncStatus.ERROR)
    assert "'body'" in (product.table().last_error or "")
    assert product.search("product 1"), "what is live stays live"
    product.sql("ALTER TABLE products ADD COLUMN body text")
    eventually(lambda: settled(product))
    assert product.table().sync_status == SyncStatus.SYNCED
    eventually(is_true(product))


@ONE_STORE
@pytest.mark.parametrize("statement", ["ALTER TABLE products RENAME TO goods", "DROP TABLE products"])
def test_a_table_that_is_renamed_or_dropped_is_an_error_that_says_so(
    followed: tuple[Product, RunningConsumer], statement: str
) -> None:
    product, consumer = followed
    count = len(product.points())
    product.sql(statement)
    eventually(lambda: product.table().sync_status == SyncStatus.ERROR)
    assert "products" in (product.table().last_error or "")
    assert len(product.points()) == count
    assert consumer.reason is None
    assert consumer.error is None


@ONE_STORE
def test_a_table_that_comes_back_is_followed_again(followed: tuple[Product, RunningConsumer]) -> None:
    product, _consumer = followed
    product.sql("ALTER TABLE products RENAME TO goods")
    product.sql("UPDATE goods SET title = 'elsewhere' WHERE id = 1")
    eventually(lambda: product.table().sync_status == SyncStatus.ERROR)
    product.sql("ALTER TABLE goods RENAME TO products")
    eventually(lambda: is_subscribed(product) and settled(product))
    assert product.table().sync_status == SyncStatus.SYNCED
    product.sql(INSERT, 6001)
    eventually(is_true(product))


@ONE_STORE
def test_updates_that_fail_for_want_of_a_replica_identity_go_on_before_the_next_regular_look(
    followed: tuple[Product, RunningConsumer],
) -> None:
    product, consumer = followed
    consumer.options.subscribe_seconds = 3600.0
    product.sql("ALTER TABLE products REPLICA IDENTITY NOTHING")
    eventually(_retried(lambda: not product.sql("UPDATE products SET price = 5 WHERE id = 1")))
    eventually(lambda: product.table().sync_status == SyncStatus.ERROR)
    assert "REPLICA IDENTITY DEFAULT" in (product.table().last_error or "")


@ONE_STORE
def test_rows_of_another_enum_label_are_compared(followed: tuple[Product, RunningConsumer]) -> None:
    product, _consumer = followed
    product.sql(
        """CREATE TYPE colour AS ENUM ('red', 'green', 'blue');
        ALTER TABLE products ALTER COLUMN category TYPE colour USING category::colour"""
    )
    eventually(lambda: is_resync_pending(product))
    eventually(lambda: is_subscribed(product) and settled(product))
    product.sql("ALTER TYPE colour RENAME VALUE 'red' TO 'crimson'")
    eventually(lambda: is_resync_pending(product))
    eventually(lambda: is_subscribed(product) and settled(product))
    product.assert_true_to_source()
    found = product.search("product 3", filters={"category": "crimson"})
    assert len(found) == 10


@ONE_STORE
def test_a_name_that_begins_to_mean_another_table_is_an_error_until_it_means_the_former_again(
    followed: tuple[Product, RunningConsumer],
) -> None:
    product, _consumer = followed
    points = product.points()
    product.sql("CREATE SCHEMA app")
    product.sql(
        f"""ALTER DATABASE "{product.sql("SELECT current_database()")[0][0]}" SET search_path = app, public;
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'embedd'"""
    )
    product.sql(INSERT, 6000)
    eventually(is_true(product))
    product.sql("CREATE TABLE app.products (LIKE public.products INCLUDING ALL)")
    product.sql("INSERT INTO app.products VALUES (1, 'other', 'table', 'red', 1)")
    eventually(lambda: is_resync_pending(product))
    with pytest.raises(SourceRejected, match=r'now means table "app"\."products".*from "public"\."products"'):
        run_owed(product)
    eventually(lambda: product.table().sync_status == SyncStatus.ERROR)
    assert points.keys() | {6000} == product.points().keys(), "what is live stays live"
    product.sql("UPDATE app.products SET title = 'changed'")
    product.sql("DROP TABLE app.products; UPDATE products SET title = 'again' WHERE id = 2")
    eventually(lambda: is_subscribed(product) and settled(product))
    eventually(is_true(product))
    assert product.table().sync_status == SyncStatus.SYNCED


@ONE_STORE
def test_a_batch_sync_does_not_take_another_table_for_the_one_that_was_built(product: Product) -> None:
    product.run()
    points = product.points()
    product.sql("CREATE SCHEMA app; CREATE TABLE app.products (LIKE public.products INCLUDING ALL)")
    product.sql("INSERT INTO app.products SELECT * FROM public.products WHERE id < 400")
    product.sql(f"""ALTER DATABASE "{product.sql("SELECT current_database()")[0][0]}" SET search_path = app, public""")
    with pytest.raises(SourceRejected, match="means table"):
        product.run(TaskType.SYNC)
    assert product.points() == points
    product.run()
    assert len(product.points()) == 399, "a backfill takes the table that the name means"
    product.run(TaskType.SYNC)


@pytest.fixture
def reader_role(cdc_product: Product) -> Iterator[str]:
    """The role of the connection: owns `products`, and may replicate."""
    role = f"reader_{uuid4().hex[:8]}"
    database = cdc_product.sql("SELECT current_database()")[0][0]
    cdc_product.sql(
        f"""CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'secret'; ALTER TABLE products OWNER TO {role};
        GRANT CREATE ON DATABASE "{database}" TO {role}"""
    )
    _use(cdc_product, user=role, password="secret")
    yield role
    cdc_product.sql(f"REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize("product", [Mode.MANAGED], indirect=True, ids=["qdrant"])
def test_rows_that_row_level_security_hides_from_a_role_are_removed(cdc_product: Product, reader_role: str) -> None:
    product = cdc_product
    product.run()
    with consumer_of(product):
        eventually(lambda: is_subscribed(product) and settled(product))
        product.sql(
            """CREATE POLICY cheap ON products USING (id <= 300);
            ALTER TABLE products ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"""
        )
        eventually(lambda: is_resync_pending(product))
        assert run_owed(product) == 1
        assert len(product.points()) == 300
        eventually(lambda: product.table().sync_status == SyncStatus.ERROR)
        assert "NO FORCE ROW LEVEL SECURITY" in (product.table().last_error or "")
        product.sql("ALTER TABLE products NO FORCE ROW LEVEL SECURITY")
        eventually(lambda: is_subscribed(product) and settled(product))
        assert len(product.points()) == 500
        assert product.table().sync_status == SyncStatus.SYNCED


@ONE_STORE
def test_a_lost_slot_is_made_anew_and_everything_compared(followed: tuple[Product, RunningConsumer]) -> None:
    product, consumer = followed

    def dropped() -> bool:
        product.sql(
            """SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
               WHERE database = current_database() AND NOT active"""
        )
        return True

    eventually(_retried(dropped))
    product.sql(INSERT, 6100)
    eventually(lambda: is_resync_pending(product))
    eventually(lambda: settled(product))
    eventually(is_true(product))
    assert slots_of(product)
    product.sql(INSERT, 6101)
    eventually(is_true(product))
    assert any("Following" in line for line in consumer.log)


def _retried(action: Callable[[], bool]) -> Callable[[], bool]:
    def attempt() -> bool:
        try:
            return action()
        except Exception:
            return False

    return attempt


@ONE_STORE
def test_the_last_table_takes_slot_and_publication_with_it(followed: tuple[Product, RunningConsumer]) -> None:
    product, consumer = followed
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id, lock=True)
        assert table is not None
        connection_id = table.connection_id
        vector_tables.mark_deleted(table)
    eventually(lambda: consumer.reason is not None)
    assert slots_of(product) == []
    assert product.sql("SELECT pubname FROM pg_publication") == []
    assert teardown(product.runtime, product.vector_table_id)
    with product.runtime.catalog.transaction() as session:
        assert cdc.find(session, connection_id) is None
        connections.delete(
            session, product.environment_id, connection_id, leftover_resolution=registry.leftover_resolution
        )


@ONE_STORE
def test_a_connection_is_not_deleted_from_under_its_slot(followed: tuple[Product, RunningConsumer]) -> None:
    """While it cannot be dropped, somebody must say that it may be left behind."""
    product, consumer = followed
    connection = product.connection()
    consumer.stop()
    with product.runtime.catalog.transaction() as session:
        vector_tables.mark_deleted(
            vector_tables.get(session, product.environment_id, product.vector_table_id, lock=True)
        )
    assert teardown(product.runtime, product.vector_table_id)
    ((slot,),) = slots_of(product)
    port = connection.settings["port"]
    _lead_to_port(product, connection.id, 1)
    with pytest.raises(SourceUnavailable):
        drop_unused_streams(product.runtime)
    with pytest.raises(Conflict, match="still to be removed") as refused:
        _delete_connection(product, connection.id)
    assert "127.0.0.1:1" in refused.value.message
    assert f"pg_drop_replication_slot('{slot}')" in refused.value.resolution
    _lead_to_port(product, connection.id, port)
    assert drop_unused_streams(product.runtime) == 1
    assert slots_of(product) == []
    _delete_connection(product, connection.id)


@ONE_STORE
def test_a_connection_is_deleted_by_force_with_its_database_gone(followed: tuple[Product, RunningConsumer]) -> None:
    product, consumer = followed
    connection = product.connection()
    consumer.stop()
    with product.runtime.catalog.transaction() as session:
        vector_tables.mark_deleted(
            vector_tables.get(session, product.environment_id, product.vector_table_id, lock=True)
        )
    assert teardown(product.runtime, product.vector_table_id)
    _delete_connection(product, connection.id, force=True)
    with product.runtime.catalog.transaction() as session:
        assert connections.find(session, connection.id) is None
        assert cdc.find(session, connection.id) is None


def _delete_connection(product: Product, connection_id: str, *, force: bool = False) -> None:
    with product.runtime.catalog.transaction() as session:
        connections.delete(
            session,
            product.environment_id,
            connection_id,
            leftover_resolution=registry.leftover_resolution,
            force=force,
        )


def _lead_to_port(product: Product, connection_id: str, port: int) -> None:
    with product.runtime.catalog.transaction() as session:
        connection = connections.get(session, product.environment_id, connection_id, lock=True)
        connection.settings = {**connection.settings, "port": port}


@ONE_STORE
def test_what_a_dead_consumer_left_is_dropped_without_one(followed: tuple[Product, RunningConsumer]) -> None:
    product, consumer = followed
    consumer.stop()
    assert slots_of(product)
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id, lock=True)
        assert table is not None
        vector_tables.mark_deleted(table)
    assert drop_unused_streams(product.runtime) == 1
    assert drop_unused_streams(product.runtime) == 0
    assert slots_of(product) == []


@ONE_STORE
def test_a_second_consumer_ends_at_once_and_a_successor_takes_over(followed: tuple[Product, RunningConsumer]) -> None:
    product, first = followed
    with consumer_of(product) as second:
        second.join()
    assert first.run_id in (second.reason or "")
    assert first.reason is None
    product.runtime.settings.__dict__.update(follow_renew_seconds=0.01)
    with consumer_of(product) as successor:
        eventually(lambda: first.reason is not None)
        product.sql(INSERT, 6200)
        eventually(is_true(product))
        assert successor.reason is None


@ONE_STORE
def test_a_stopped_consumer_goes_on_where_it_was(followed: tuple[Product, RunningConsumer]) -> None:
    product, first = followed
    first.stop()
    product.sql(INSERT, 6300)
    with consumer_of(product) as second:
        eventually(is_true(product))
        assert not is_resync_pending(product)
    assert second.error is None


@ONE_STORE
def test_a_log_that_grows_too_long_is_given_up_by_setting(followed: tuple[Product, RunningConsumer]) -> None:
    product, consumer = followed
    consumer.stop()
    product.sql("CREATE TABLE filler AS SELECT n, repeat('x', 500) AS t FROM generate_series(1, 20000) n")
    product.provider.behave(fail_every=1, fail_status=503)
    product.sql(INSERT, 6400)
    product.runtime.settings.__dict__.update(
        cdc_max_lag_bytes=1_000_000, cdc_drop_above_max_lag=True, follow_patience_seconds=30
    )
    with consumer_of(product):
        eventually(lambda: is_resync_pending(product))
        product.runtime.settings.__dict__.update(cdc_max_lag_bytes=0)
        assert "of its log" in (product.table().last_error or "")
        product.provider.behave(fail_every=0)
        eventually(lambda: is_subscribed(product) and settled(product))
        eventually(is_true(product))


@ONE_STORE
def test_a_log_that_gets_too_long_while_changes_are_gathered_is_given_up(
    followed: tuple[Product, RunningConsumer],
) -> None:
    product, consumer = followed
    consumer.stop()
    product.runtime.settings.__dict__.update(follow_poll_seconds=60, heartbeat_seconds=0.2)
    with consumer_of(product) as gathering:
        eventually(lambda: gathering.log or (feed_of(product) or CdcStreamRow()).lag_bytes is not None)
        product.sql("CREATE TABLE filler AS SELECT n, repeat('x', 500) AS t FROM generate_series(1, 20000) n")
        product.runtime.settings.__dict__.update(cdc_max_lag_bytes=1_000_000, cdc_drop_above_max_lag=True)
        eventually(lambda: is_resync_pending(product))
        product.runtime.settings.__dict__.update(cdc_max_lag_bytes=0)
        assert "of its log" in (product.table().last_error or "")
        assert gathering.error is None


@ONE_STORE
def test_a_database_that_cannot_be_followed_any_more_is_told_by_its_tables(
    followed: tuple[Product, RunningConsumer],
) -> None:
    product, consumer = followed
    consumer.stop()
    role = f"reader_{uuid4().hex[:8]}"  # of the whole server
    product.sql(
        f"""CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT SELECT ON products TO {role};
        GRANT ALL ON SCHEMA public TO {role}"""
    )
    good = _use(product, user=role, password="x")
    with consumer_of(product) as refused:
        refused.join()
        error, refused.error = refused.error, None
    assert isinstance(error, SourceRejected)
    assert "REPLICATION" in error.resolution
    assert product.table().sync_status == SyncStatus.ERROR
    assert "REPLICATION" in (product.table().last_error or "")
    product.sql(INSERT, 6500)
    _use(product, **good)
    with consumer_of(product):
        eventually(lambda: is_subscribed(product) and settled(product))
        assert product.table().sync_status == SyncStatus.SYNCED
        eventually(is_true(product))
    product.sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


def _use(product: Product, **changes: Any) -> dict[str, Any]:
    """Changes the connection's credentials; those before."""
    with product.runtime.catalog.transaction() as session:
        connection = connections.find(session, product.table().connection_id)
        assert connection is not None
        before = connections.open_credentials(connection, product.runtime.box)
        credentials = PostgresqlCredentials(**{**before, **changes})
        connections.set_credentials(connection, product.runtime.box, credentials.model_dump())
        connections.record_test(connection, None)
        return before


@ONE_STORE
def test_a_table_that_waits_for_a_transaction_says_so(
    followed: tuple[Product, RunningConsumer],
) -> None:
    """It cannot join the log while somebody who has written to it may yet commit; the others go on."""
    product, consumer = followed
    consumer.options.blocked_seconds, consumer.options.subscribe_seconds = 0.5, 0.2
    held = another_table(product, "held")
    with psycopg.connect(product.database_url) as writer:
        writer.execute("INSERT INTO held VALUES (1, 'written', 'and not committed', 'red', 1)")
        eventually(lambda: "is open for long" in (held.table().last_error or ""))
        assert held.table().cdc.subscribed_since is None
        product.sql(INSERT, 9700)
        eventually(lambda: 9700 in product.points())
    eventually(lambda: is_subscribed(held))
    held.run()
    assert held.table().last_error is None
    assert list(held.points()) == [1]
    assert consumer.error is None


@ONE_STORE
def test_a_table_that_joined_is_compared_also_where_that_could_not_be_recorded_at_once(
    followed: tuple[Product, RunningConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    product, _consumer = followed
    original, away = cdc.record_subscribed, iter([True])

    def set_followed(session: Any, connection_id: str, shapes: Any, joined: Any) -> Any:
        if joined and next(away, False):
            raise CatalogUnavailable("The catalog database does not answer.")
        return original(session, connection_id, shapes, joined)

    monkeypatch.setattr(cdc, "record_subscribed", set_followed)
    publication = product.sql("SELECT pubname FROM pg_publication")[0][0]
    product.sql(f'ALTER PUBLICATION "{publication}" DROP TABLE products')
    product.sql(INSERT, 9900)
    eventually(lambda: is_resync_pending(product))
    eventually(lambda: settled(product))
    eventually(is_true(product))
    assert next(away, None) is None


@ONE_STORE
def test_a_connection_that_leads_elsewhere_leaves_no_slot_behind(followed: tuple[Product, RunningConsumer]) -> None:
    product, consumer = followed
    assert slots_of(product)
    _use(product, host="localhost")
    consumer.join()
    assert "was changed" in (consumer.reason or "")
    assert slots_of(product) == []


@ONE_STORE
def test_a_column_that_is_swapped_for_another_by_renaming_is_compared(
    followed: tuple[Product, RunningConsumer],
) -> None:
    """The last step of every expand-and-contract migration; no event reports it."""
    product, consumer = followed
    product.sql("ALTER TABLE products ADD COLUMN new_title text; UPDATE products SET new_title = 'better ' || id")
    eventually(lambda: settled(product))
    product.sql(
        "BEGIN; ALTER TABLE products RENAME title TO old_title; ALTER TABLE products RENAME new_title TO title; COMMIT"
    )
    eventually(lambda: is_resync_pending(product))
    eventually(lambda: settled(product))
    product.assert_true_to_source()
    assert consumer.error is None
    assert product.table().sync_status == SyncStatus.SYNCED


@ONE_STORE
def test_a_table_that_is_rewritten_while_no_consumer_runs_is_compared(cdc_product: Product) -> None:
    product = cdc_product
    product.run()
    with consumer_of(product):
        eventually(lambda: is_subscribed(product) and settled(product))
    product.sql("ALTER TABLE products ALTER COLUMN body TYPE text USING 'migrated ' || id")
    with consumer_of(product):
        eventually(lambda: is_resync_pending(product))
        eventually(lambda: settled(product))
        product.assert_true_to_source()


@ONE_STORE
def test_a_shape_is_written_where_it_changed_and_forgotten_where_nobody_follows(
    followed: tuple[Product, RunningConsumer],
) -> None:
    product, consumer = followed
    consumer.options.subscribe_seconds = 0.05
    before = product.table().cdc.table_fingerprint
    version = "SELECT xmin::text FROM vector_tables WHERE id = %s"
    # everything else in the row is written only when there are changes
    written = product.sql(version, product.vector_table_id)
    time.sleep(1)
    assert product.sql(version, product.vector_table_id) == written
    product.sql("ALTER TABLE products ADD COLUMN note text")
    eventually(lambda: product.table().cdc.table_fingerprint != before)
    assert not is_resync_pending(product)
    with product.runtime.catalog.transaction() as session:
        vector_tables.pause(vector_tables.get(session, product.environment_id, product.vector_table_id))
    eventually(lambda: consumer.reason is not None)
    assert product.table().cdc.subscribed_since is None
    assert product.table().cdc.table_fingerprint is None


@ONE_STORE
def test_an_installation_that_kept_no_shapes_compares_nothing(followed: tuple[Product, RunningConsumer]) -> None:
    product, first = followed
    first.stop()
    product.sql("UPDATE cdc_states SET table_fingerprint = NULL")
    with consumer_of(product):
        eventually(lambda: product.table().cdc.table_fingerprint is not None)
        product.sql(INSERT, 6600)
        eventually(is_true(product))
        assert not is_resync_pending(product)


@pytest.mark.parametrize("product", [Mode.MANAGED], indirect=True, ids=["qdrant"])
def test_a_primary_key_of_another_type_is_read_as_what_it_is_now(
    followed: tuple[Product, RunningConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of the old type takes the new keys for impossible: they must not count as gone."""
    product, consumer = followed
    product.sql("UPDATE products SET price = 5 WHERE id = 1")
    eventually(is_true(product))
    with monkeypatch.context() as patched:
        # the changes are read before the consumer sees the new type
        consumer.options.subscribe_seconds = 3600
        patched.setattr(Alterations, "look", lambda self, connection: None)
        product.sql("ALTER TABLE products ALTER COLUMN id TYPE text USING 'p' || id")
        product.sql("UPDATE products SET price = 6 WHERE id = 'p1'")
        eventually(lambda: "p1" in product.points())
    consumer.options.subscribe_seconds = 5.0
    eventually(lambda: is_resync_pending(product))
    eventually(lambda: settled(product))
    product.sql("UPDATE products SET price = 7 WHERE id = 'p2'")
    eventually(is_true(product))
    assert product.table().sync_status == SyncStatus.SYNCED
