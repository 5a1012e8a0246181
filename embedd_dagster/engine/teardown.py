"""Teardown: removes replaced vector sets, deleted vector tables and unused CDC streams."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial

from embedd_dagster.catalog import cdc, due_tables, tasks, vector_sets, vector_tables
from embedd_dagster.catalog.tables import Connection
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.deadlines import deadline
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import EmbeddError

_DROP_SECONDS = 10.0

Attempt = Callable[[str, str, Callable[[], bool]], bool]
"""Tries one drop or postpones it. Arguments: a name for the log, the location, the function that drops; returns whether it did.

A location is what fails as one: if one drop in it gets no answer, the others need not be tried.
"""


def _at_once(_name: str, _location: str, drop: Callable[[], bool]) -> bool:
    return drop()


def drop_deleted_tables(runtime: Runtime, attempt: Attempt) -> int:
    """Tears down the vector tables that were deleted; returns how many are gone completely."""
    with runtime.catalog.transaction() as session:
        deleted = [table.id for table in due_tables.being_deleted(session)]
        places = vector_tables.storage_places(session, deleted)
    return sum(attempt(key, places[key], partial(teardown, runtime, key)) for key in deleted)


def teardown(runtime: Runtime, vector_table_id: str) -> bool:
    """Drops every set and the public name of a deleted vector table, then its record. Returns whether all of it is gone.

    False while it has a live task, whose run could write again. Idempotent. An unreachable store raises, and the record
    stays for the next attempt.
    """
    with runtime.catalog.transaction() as session:
        endpoints = vector_tables.load_endpoints(session, vector_table_id)
        if endpoints is None:
            return True
        if endpoints.vector_table.deleted_at is None or tasks.find_live(session, vector_table_id) is not None:
            return False
    table = endpoints.vector_table
    with runtime.open_store(Mode(table.mode), endpoints.connection) as store:
        store.drop_public_name(table.id, table.storage_name)
        for version in store.versions(table.id):
            store.drop(table.id, version)
    with runtime.catalog.transaction() as session:
        vector_tables.remove(session, vector_table_id)
    return True


def drop_unused_streams(runtime: Runtime, attempt: Attempt = _at_once) -> int:
    """Drops the CDC streams of sources without CDC tables; returns how many."""
    with runtime.catalog.transaction() as session:
        unused = cdc.unused_streams(session)
    return sum(
        attempt(
            f"CDC stream of {connection.id}", connection.id, partial(_drop_stream, runtime, connection, stream.name)
        )
        for stream, connection in unused
    )


def _drop_stream(runtime: Runtime, connection: Connection, name: str) -> bool:
    try:
        # locked while it is dropped: a consumer that starts now claims the stream before that, or creates it again after
        with runtime.catalog.transaction() as session:
            if cdc.find(session, connection.id, lock=True) is None:
                return False
            if not cdc.unused_streams(session, connection.id):  # another CDC table has been added meanwhile
                return False
            with (
                deadline(_DROP_SECONDS),
                runtime.open_source(connection) as source,
                source.cdc_stream(name) as opened,
            ):
                opened.drop()
            cdc.remove(session, connection.id)
    except EmbeddError as error:
        with runtime.catalog.transaction() as session:
            cdc.record_error(session, connection.id, error.message)
        raise
    return True


def drop_retired_sets(runtime: Runtime, attempt: Attempt = _at_once) -> int:
    """Drops the sets that were replaced longer than the grace period ago; returns how many."""
    grace = timedelta(seconds=runtime.settings.retired_set_grace_seconds)
    with runtime.catalog.transaction() as session:
        retired = vector_sets.retired(session, grace)
        places = vector_tables.storage_places(session, {vector_table_id for vector_table_id, _version in retired})
    return sum(
        attempt(
            f"set {version} of {vector_table_id}",
            places.get(vector_table_id, ""),
            partial(_drop_set, runtime, vector_table_id, version),
        )
        for vector_table_id, version in retired
    )


def _drop_set(runtime: Runtime, vector_table_id: str, version: int) -> bool:
    with runtime.catalog.transaction() as session:
        endpoints = vector_tables.load_endpoints(session, vector_table_id)
    if endpoints is not None:
        with runtime.open_store(Mode(endpoints.vector_table.mode), endpoints.connection) as store:
            store.drop(vector_table_id, version)
    with runtime.catalog.transaction() as session:
        vector_sets.forget(session, vector_table_id, version)
    return True
