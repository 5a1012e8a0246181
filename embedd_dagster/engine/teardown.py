"""Removing what is no longer needed from the stores: replaced sets, and vector tables that were deleted."""

from __future__ import annotations

from datetime import timedelta

from embedd_dagster.catalog import change_feeds, tasks, vector_sets, vector_tables
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import EmbeddError


def teardown(runtime: Runtime, vector_table_id: str) -> bool:
    """Drops every set and public name of a deleted vector table, then its record. True once all of it is gone.

    False while a task of it is live: its run could write again. Idempotent; an unreachable store raises, and the record
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


def drop_unused_feeds(runtime: Runtime) -> int:
    """Drops what following has made in sources of which no table is followed any more; how many feeds.

    A source that does not answer is left for the next call, and does not stop the others; the last such error is raised.
    """
    with runtime.catalog.transaction() as session:
        unused = change_feeds.unused(session)
    dropped = 0
    failure: EmbeddError | None = None
    for feed, connection in unused:
        try:
            # locked while it is dropped: a follower that begins at this moment claims it before, or makes it anew behind
            with runtime.catalog.transaction() as session:
                if change_feeds.find(session, connection.id, lock=True) is None:
                    continue
                with runtime.open_source(connection) as source, source.change_feed(feed.name) as opened:
                    opened.drop()
                change_feeds.remove(session, connection.id)
            dropped += 1
        except EmbeddError as error:
            failure = error
            with runtime.catalog.transaction() as session:
                change_feeds.note_error(session, connection.id, error.message)
    if failure is not None:
        raise failure
    return dropped


def drop_retired_sets(runtime: Runtime) -> int:
    """Drops the sets that were replaced longer than the grace period ago; how many were.

    A store that fails leaves its sets for the next call, and does not stop the others; the last such error is raised.
    """
    grace = timedelta(seconds=runtime.settings.retired_set_grace_seconds)
    with runtime.catalog.transaction() as session:
        retired = vector_sets.retired(session, grace)
    dropped = 0
    failure: EmbeddError | None = None
    for vector_table_id, version in retired:
        try:
            _drop(runtime, vector_table_id, version)
            dropped += 1
        except EmbeddError as error:
            failure = error
    if failure is not None:
        raise failure
    return dropped


def _drop(runtime: Runtime, vector_table_id: str, version: int) -> None:
    with runtime.catalog.transaction() as session:
        endpoints = vector_tables.load_endpoints(session, vector_table_id)
    if endpoints is not None:
        with runtime.open_store(Mode(endpoints.vector_table.mode), endpoints.connection) as store:
            store.drop(vector_table_id, version)
    with runtime.catalog.transaction() as session:
        vector_sets.forget(session, vector_table_id, version)
