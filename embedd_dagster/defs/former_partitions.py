"""Moves a partition's history to another key, in Dagster's own storage, which has no call for it.

Until version 0013 of the catalog the key of a vector table's partition was its id. What was recorded under the id belongs to
the key that people can read. Runs that have ended keep the tag that they were launched with.
"""

from __future__ import annotations

import dagster as dg
from dagster._core.storage.event_log import SqlEventLogStorage
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable, AssetKeyTable, SqlEventLogStorageTable
from sqlalchemy import ColumnElement, func, update

from embedd_dagster.defs.backfills import ASSET_KEY


def move_history(instance: dg.DagsterInstance, old_key: str, new_key: str) -> None:
    """Records what happened to one partition of the asset, and what its checks said, under another key. Idempotent."""
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        return
    asset = ASSET_KEY.to_string()
    events, checks, assets = SqlEventLogStorageTable.c, AssetCheckExecutionsTable.c, AssetKeyTable.c

    def renamed(column: ColumnElement[str]) -> ColumnElement[str]:
        # whole strings of the JSON, and of JSON within it: a link that ends in the id stays as it is
        quoted = func.replace(column, f'"{old_key}"', f'"{new_key}"')
        return func.replace(quoted, f'\\"{old_key}\\"', f'\\"{new_key}\\"')

    statements = (
        update(SqlEventLogStorageTable)
        .where(events.asset_key == asset, events.partition == old_key)
        .values(partition=new_key, event=renamed(events.event)),
        update(AssetCheckExecutionsTable)
        .where(checks.asset_key == asset, checks.partition == old_key)
        .values(partition=new_key, evaluation_event=renamed(checks.evaluation_event)),
        # what Dagster has reckoned of partitions so far is made again from the events
        update(AssetKeyTable)
        .where(assets.asset_key == asset)
        .values(last_materialization=renamed(assets.last_materialization), cached_status_data=None),
    )
    with storage.index_connection() as connection:
        for statement in statements:
            connection.execute(statement)
