"""What becomes of a run in whose midst somebody does something else: every row of the table in docs/concepts.

The provider holds its answers, so each run is caught while it embeds; what is done then is what the API does.
"""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest

from embedd_dagster.catalog import connections, due_tables, embedding_providers, tasks, vector_tables
from embedd_dagster.connectors import registry
from embedd_dagster.connectors.postgresql.credentials_model import PostgresqlCredentials
from embedd_dagster.core.status import SyncStatus, TaskStatus, TaskType
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.engine.teardown import teardown
from embedd_dagster.errors import (
    Conflict,
    EmbeddError,
    EmbeddingRejected,
    RunCancelled,
    SourceUnavailable,
    VectorStoreUnavailable,
)
from tests.engine.conftest import COLUMNS, DIMENSIONS, Product
from tests.support.openai_server import running_openai_server

one_store = pytest.mark.parametrize("product", [Mode.PLATFORM], ids=["pgvector"], indirect=True)
"""For outcomes that the catalog alone decides."""

ITEM_COLUMNS = (replace(COLUMNS[0], name_prefix="item: "), *COLUMNS[1:])


def begin_sync(product: Product) -> str:
    """The task of a sync that has 20 texts to embed."""
    product.sql("UPDATE products SET body = 'rewritten ' || id || %s WHERE id <= 20", uuid4().hex)
    return product.add_task(TaskType.SYNC)


def pause(product: Product) -> None:
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.get(session, product.environment_id, product.vector_table_id, lock=True)
        vector_tables.pause(table)


def resume(product: Product) -> None:
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.get(session, product.environment_id, product.vector_table_id, lock=True)
        vector_tables.resume(table)


def delete(product: Product) -> None:
    with product.runtime.catalog.transaction() as session:
        vector_tables.mark_deleted(
            vector_tables.get(session, product.environment_id, product.vector_table_id, lock=True)
        )
        live = tasks.find_live(session, product.vector_table_id)
        assert live is not None
        tasks.request_cancel(session, live)


def cancel(product: Product, task_id: str) -> None:
    with product.runtime.catalog.transaction() as session:
        task = tasks.find(session, task_id, lock=True)
        assert task is not None
        tasks.request_cancel(session, task)


def status(product: Product) -> SyncStatus:
    return SyncStatus(product.table().sync_status)


def is_awaiting_rebackfill(product: Product) -> bool:
    """Whether the sensor would build the newer configuration."""
    with product.runtime.catalog.transaction() as session:
        return product.vector_table_id in {table.id for table in due_tables.awaiting_rebackfill(session)}


def prefixes(product: Product) -> set[str]:
    return {hit.embedded_text.split(":")[0] for hit in product.search("x")}


# the configuration changes


@one_store
def test_a_configuration_changed_during_a_sync_is_built_after_it(product: Product) -> None:
    product.run()
    with product.caught(begin_sync(product)) as running:
        product.reconfigure(columns=ITEM_COLUMNS)
        assert status(product) is SyncStatus.PENDING_REBACKFILL
        with pytest.raises(Conflict):
            product.add_task(TaskType.REBACKFILL)
    assert running.result().rows_embedded == 20, "with the columns of what is live"
    assert prefixes(product) == {"title"}
    assert status(product) is SyncStatus.PENDING_REBACKFILL
    assert is_awaiting_rebackfill(product)
    product.run(TaskType.REBACKFILL)
    assert (status(product), prefixes(product)) == (SyncStatus.SYNCED, {"item"})
    product.assert_true_to_source()


@one_store
def test_a_configuration_changed_during_a_sync_that_fails_is_built_all_the_same(product: Product) -> None:
    product.run()
    with product.caught(begin_sync(product)) as running:
        product.reconfigure(columns=ITEM_COLUMNS)
        product.provider.behave(api_key="another")
    assert isinstance(running.exception(), EmbeddError)
    assert product.table().last_error
    assert is_awaiting_rebackfill(product)
    product.provider.behave(api_key=None)
    product.run(TaskType.REBACKFILL)
    assert (status(product), product.table().last_error) == (SyncStatus.SYNCED, None)
    product.assert_true_to_source()


@one_store
def test_a_configuration_changed_during_a_backfill_is_built_after_it(product: Product) -> None:
    with product.caught(product.add_task()):
        product.reconfigure(columns=ITEM_COLUMNS)
        product.reconfigure(columns=ITEM_COLUMNS, dimensions=24)
        assert status(product) is SyncStatus.BACKFILLING
    assert prefixes(product) == {"title"}, "what was begun is finished, and answers"
    assert status(product) is SyncStatus.PENDING_REBACKFILL
    assert is_awaiting_rebackfill(product)
    product.run(TaskType.REBACKFILL)
    assert (status(product), prefixes(product)) == (SyncStatus.SYNCED, {"item"})
    assert product.live_set().dimensions == 24, "the last of the changes"


@one_store
def test_a_configuration_changed_while_a_backfill_is_queued_is_the_one_built(product: Product) -> None:
    task_id = product.add_task()
    product.reconfigure(columns=ITEM_COLUMNS)
    product.run_task(task_id)
    assert product.provider.stats()["texts"] == 500
    assert (status(product), prefixes(product)) == (SyncStatus.SYNCED, {"item"})


@one_store
def test_a_name_changed_during_a_sync_changes_nothing_else(product: Product) -> None:
    product.run()
    before = product.table()
    with (
        product.caught(begin_sync(product)) as running,
        product.runtime.catalog.transaction() as session,
    ):
        vector_tables.rename(session, vector_tables.get(session, product.environment_id, before.id, lock=True), "new")
    assert running.result().rows_embedded == 20
    after = product.table()
    assert (after.name, after.sync_status, after.total_rows) == ("new", SyncStatus.SYNCED, 500)
    assert (after.storage_name, after.config_version) == (before.storage_name, before.config_version)
    product.assert_true_to_source()


# pause and resume


@one_store
def test_a_pause_during_a_backfill_lets_it_finish(product: Product) -> None:
    with product.caught(product.add_task()):
        pause(product)
        assert status(product) is SyncStatus.BACKFILLING
    assert (status(product), product.table().synced_rows) == (SyncStatus.PAUSED, 500)
    assert len(product.search("x")) == 10, "it answers"
    resume(product)
    assert status(product) is SyncStatus.SYNCED


@one_store
def test_a_pause_during_a_sync_lets_it_finish(product: Product) -> None:
    product.run()
    with product.caught(begin_sync(product)):
        pause(product)
        assert status(product) is SyncStatus.PAUSED
    assert status(product) is SyncStatus.PAUSED
    product.assert_true_to_source()


@one_store
@pytest.mark.parametrize("task_type", [TaskType.BACKFILL, TaskType.SYNC])
def test_a_pause_and_a_resume_during_a_run_leave_no_trace(product: Product, task_type: TaskType) -> None:
    product.run()
    product.sql("UPDATE products SET body = 'rewritten ' || id WHERE id <= 20")
    with product.caught(product.add_task(task_type)):
        pause(product)
        resume(product)
    assert status(product) is SyncStatus.SYNCED
    product.assert_true_to_source()


@one_store
def test_a_run_that_fails_while_its_table_is_paused_shows_when_it_is_resumed(product: Product) -> None:
    product.run()
    with product.caught(begin_sync(product)):
        pause(product)
        product.provider.behave(api_key="another")
    assert status(product) is SyncStatus.PAUSED
    told = product.table().last_error
    assert told
    resume(product)
    assert (status(product), product.table().last_error) == (SyncStatus.ERROR, told)
    product.provider.behave(api_key=None)
    product.run(TaskType.SYNC)
    assert (status(product), product.table().last_error) == (SyncStatus.SYNCED, None)


@one_store
def test_a_paused_table_is_synced_and_built_on_demand_and_stays_paused(product: Product) -> None:
    product.run()
    pause(product)
    product.sql("UPDATE products SET body = 'rewritten' WHERE id = 1")
    product.run(TaskType.SYNC)
    assert status(product) is SyncStatus.PAUSED
    product.assert_true_to_source()
    product.reconfigure(columns=ITEM_COLUMNS)
    assert not is_awaiting_rebackfill(product)
    product.run(TaskType.REBACKFILL)
    assert (status(product), prefixes(product)) == (SyncStatus.PAUSED, {"item"})


@one_store
def test_a_configuration_changed_while_paused_is_built_after_the_resume(product: Product) -> None:
    product.run()
    pause(product)
    product.reconfigure(columns=ITEM_COLUMNS)
    assert (status(product), is_awaiting_rebackfill(product)) == (SyncStatus.PAUSED, False)
    resume(product)
    assert (status(product), is_awaiting_rebackfill(product)) == (SyncStatus.PENDING_REBACKFILL, True)


# one run a vector table


@one_store
@pytest.mark.parametrize("running_type", [TaskType.BACKFILL, TaskType.SYNC])
@pytest.mark.parametrize("asked", [TaskType.BACKFILL, TaskType.SYNC])
def test_while_one_runs_another_is_refused(product: Product, running_type: TaskType, asked: TaskType) -> None:
    if running_type is TaskType.SYNC:
        product.run()
    task_id = begin_sync(product) if running_type is TaskType.SYNC else product.add_task()
    with product.caught(task_id) as running:
        before = status(product)
        with pytest.raises(Conflict) as refused:
            product.add_task(asked)
        assert refused.value.code == "backfill_in_progress"
        assert task_id in refused.value.message
        assert running_type.value in refused.value.message
        assert status(product) is before
    running.result()
    assert product.latest_task().id == task_id
    assert status(product) is SyncStatus.SYNCED
    product.run(asked)
    product.assert_true_to_source()


@one_store
def test_a_sync_cancelled_in_the_middle_loses_nothing(product: Product) -> None:
    product.run()
    task_id = begin_sync(product)
    with product.caught(task_id) as running:
        cancel(product, task_id)
        assert product.task(task_id).status == TaskStatus.RUNNING
    assert isinstance(running.exception(), RunCancelled)
    assert product.task(task_id).status == TaskStatus.CANCELLED
    assert status(product) is SyncStatus.SYNCED
    assert "sync" in product.run(TaskType.SYNC).seconds, "the next one looks at the same buckets again"
    product.assert_true_to_source()
    assert product.provider.stats()["texts"] == 520, "what was embedded before the end was kept"


@one_store
@pytest.mark.parametrize("how", ["before it began", "by its task", "by its run"])
def test_a_cancelled_rebackfill_waits_until_it_is_asked_for(product: Product, how: str) -> None:
    product.run()
    product.reconfigure(columns=ITEM_COLUMNS)
    task_id = product.add_task(TaskType.REBACKFILL)
    if how == "before it began":
        cancel(product, task_id)
    elif how == "by its run":
        with pytest.raises(RunCancelled):
            product.run_task(task_id, should_stop=lambda: True)
    else:
        with product.caught(task_id):
            cancel(product, task_id)
    assert product.task(task_id).status == TaskStatus.CANCELLED
    assert (status(product), is_awaiting_rebackfill(product)) == (SyncStatus.PENDING_REBACKFILL, False)
    assert "/backfill starts it" in (product.table().last_error or "")
    product.run_task(begin_sync(product))
    assert (status(product), is_awaiting_rebackfill(product)) == (SyncStatus.PENDING_REBACKFILL, False)
    assert "/backfill starts it" in (product.table().last_error or ""), "told as long as it is so"
    product.assert_true_to_source()
    product.run()
    assert (status(product), product.table().last_error, prefixes(product)) == (SyncStatus.SYNCED, None, {"item"})


@one_store
def test_after_a_cancelled_rebackfill_a_new_configuration_is_built_by_itself(product: Product) -> None:
    product.run()
    product.reconfigure(columns=ITEM_COLUMNS)
    cancel(product, product.add_task(TaskType.REBACKFILL))
    product.reconfigure(columns=ITEM_COLUMNS)
    assert not is_awaiting_rebackfill(product), "it is the one that was cancelled"
    product.reconfigure(columns=ITEM_COLUMNS, dimensions=24)
    assert (status(product), is_awaiting_rebackfill(product)) == (SyncStatus.PENDING_REBACKFILL, True)
    assert product.table().last_error is None


@one_store
def test_a_rebackfill_cancelled_for_a_newer_configuration_does_not_hold_that_one_back(product: Product) -> None:
    product.run()
    product.reconfigure(columns=ITEM_COLUMNS)
    task_id = product.add_task(TaskType.REBACKFILL)
    with product.caught(task_id):
        product.reconfigure(columns=ITEM_COLUMNS, dimensions=24)
        cancel(product, task_id)
    assert (status(product), is_awaiting_rebackfill(product)) == (SyncStatus.PENDING_REBACKFILL, True)
    assert product.table().last_error is None


@one_store
def test_a_rebackfill_cancelled_while_it_waits_for_its_next_attempt_holds_what_that_would_build(
    product: Product,
) -> None:
    product.run()
    product.reconfigure(columns=ITEM_COLUMNS)
    task_id = product.add_task(TaskType.REBACKFILL)

    def fail() -> bool:
        raise SourceUnavailable("The source does not answer.")

    with pytest.raises(SourceUnavailable):
        product.run_task(task_id, should_stop=fail)
    product.reconfigure(columns=ITEM_COLUMNS, dimensions=24)
    cancel(product, task_id)
    assert (status(product), is_awaiting_rebackfill(product)) == (SyncStatus.PENDING_REBACKFILL, False)


@one_store
def test_a_rebackfill_whose_process_was_ended_is_begun_again(product: Product) -> None:
    product.run()
    product.reconfigure(columns=ITEM_COLUMNS)

    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        product.run(TaskType.REBACKFILL, should_stop=interrupt)
    assert (status(product), is_awaiting_rebackfill(product)) == (SyncStatus.PENDING_REBACKFILL, True)


@one_store
def test_a_cancelled_rebackfill_is_not_begun_by_a_resume(product: Product) -> None:
    product.run()
    product.reconfigure(columns=ITEM_COLUMNS)
    task_id = product.add_task(TaskType.REBACKFILL)
    pause(product)
    cancel(product, task_id)
    assert status(product) is SyncStatus.PAUSED
    resume(product)
    assert (status(product), is_awaiting_rebackfill(product)) == (SyncStatus.PENDING_REBACKFILL, False)
    assert "/backfill starts it" in (product.table().last_error or "")


@one_store
def test_a_cancelled_backfill_of_what_is_live_holds_nothing_back(product: Product) -> None:
    product.run()
    cancel(product, product.add_task())
    assert (status(product), product.table().last_error) == (SyncStatus.SYNCED, None)
    product.reconfigure(columns=ITEM_COLUMNS)
    assert is_awaiting_rebackfill(product)


@one_store
@pytest.mark.parametrize("task_type", [TaskType.BACKFILL, TaskType.SYNC])
def test_a_task_cancelled_on_a_table_in_error_leaves_it_so(product: Product, task_type: TaskType) -> None:
    product.run()
    product.provider.behave(api_key="another")
    with pytest.raises(EmbeddError):
        product.run_task(begin_sync(product))
    told = product.table().last_error
    assert told
    cancel(product, product.add_task(task_type))
    assert (status(product), product.table().last_error) == (SyncStatus.ERROR, told)


# the vector table is deleted


@pytest.mark.parametrize("task_type", [TaskType.BACKFILL, TaskType.SYNC])
def test_a_delete_ends_the_run_and_then_nothing_is_left(product: Product, task_type: TaskType) -> None:
    if task_type is TaskType.SYNC:
        product.run()
    task_id = begin_sync(product) if task_type is TaskType.SYNC else product.add_task()
    with product.runtime.catalog.transaction() as session:
        endpoints = vector_tables.load_endpoints(session, product.vector_table_id)
    assert endpoints is not None
    with product.caught(task_id) as running:
        delete(product)
        assert not teardown(product.runtime, product.vector_table_id), "its run could write again"
    assert isinstance(running.exception(), RunCancelled)
    assert product.task(task_id).status == TaskStatus.CANCELLED
    assert status(product) is SyncStatus.DELETING
    assert teardown(product.runtime, product.vector_table_id)
    with product.runtime.open_store(product.mode, endpoints.connection) as store:
        assert store.versions(product.vector_table_id) == []
    with product.runtime.catalog.transaction() as session:
        assert vector_tables.find(session, product.vector_table_id) is None
        assert tasks.find(session, task_id) is not None, "what was done is still told"


# what a run was begun with changes


@one_store
def test_a_provider_changed_during_a_run_is_used_by_the_next(product: Product) -> None:
    with running_openai_server(default_dimensions=DIMENSIONS) as other:
        with product.caught(product.add_task()), product.runtime.catalog.transaction() as session:
            table = vector_tables.get(session, product.environment_id, product.vector_table_id)
            provider = embedding_providers.get(session, product.environment_id, table.embedding_provider_id or "")
            credentials = {"api_key": "sk-new", "base_url": other.base_url}
            embedding_providers.set_credentials(provider, product.runtime.box, credentials)
        assert status(product) is SyncStatus.SYNCED
        assert (product.provider.stats()["texts"], other.stats()["texts"]) == (500, 0)
        product.run_task(begin_sync(product))
        assert (product.provider.stats()["texts"], other.stats()["texts"]) == (500, 20)


@one_store
def test_a_connection_changed_during_a_run_is_used_by_the_next(product: Product) -> None:
    with product.caught(product.add_task()) as running, product.runtime.catalog.transaction() as session:
        table = vector_tables.get(session, product.environment_id, product.vector_table_id)
        connection = connections.get(session, product.environment_id, table.connection_id)
        credentials = connections.open_credentials(connection, product.runtime.box)
        elsewhere = PostgresqlCredentials(**{**credentials, "database": "nowhere"}).model_dump()
        connections.set_credentials(connection, product.runtime.box, elsewhere)
    assert running.result().rows_embedded == 500
    assert status(product) is SyncStatus.SYNCED
    with pytest.raises(EmbeddError, match="nowhere"):
        product.run(TaskType.SYNC)
    assert status(product) is SyncStatus.ERROR


@one_store
def test_what_is_cancelled_while_its_provider_fails_is_cancelled(product: Product) -> None:
    """The run fails before it hears of the wish: it must not begin again by itself all the same."""
    product.run()
    product.runtime.settings.__dict__.update(heartbeat_seconds=600)
    product.reconfigure(columns=ITEM_COLUMNS)
    task_id = product.add_task(TaskType.REBACKFILL)
    with product.caught(task_id) as running:
        cancel(product, task_id)
        product.provider.behave(api_key="sk-another")
    with pytest.raises((EmbeddingRejected, RunCancelled)):
        running.result(60)
    product.provider.behave(api_key="sk-test")
    assert product.task(task_id).status == TaskStatus.CANCELLED
    product.run(TaskType.SYNC)
    assert not is_awaiting_rebackfill(product)


@one_store
def test_a_connection_is_deleted_by_force_with_the_vectors_in_its_database(product: Product) -> None:
    """The database never comes back, so what the deleted table has there can never be removed."""
    product.run()
    connection_id = product.connection().id
    with product.runtime.catalog.transaction() as session:
        connection = connections.get(session, product.environment_id, connection_id, lock=True)
        connection.settings = {**connection.settings, "port": 1}
        vector_tables.mark_deleted(
            vector_tables.get(session, product.environment_id, product.vector_table_id, lock=True)
        )
    with pytest.raises(VectorStoreUnavailable):
        teardown(product.runtime, product.vector_table_id)
    with (
        pytest.raises(Conflict, match="still to be removed from its database"),
        product.runtime.catalog.transaction() as session,
    ):
        connections.delete(
            session, product.environment_id, connection_id, leftover_resolution=registry.leftover_resolution
        )
    with product.runtime.catalog.transaction() as session:
        connections.delete(
            session,
            product.environment_id,
            connection_id,
            leftover_resolution=registry.leftover_resolution,
            force=True,
        )
    with product.runtime.catalog.transaction() as session:
        assert vector_tables.find(session, product.vector_table_id) is None
