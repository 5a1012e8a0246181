"""Partitions that were named by ids, as earlier versions made them: their history goes on under the readable keys."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest

from embedd_dagster.defs.backfills import ASSET_KEY
from embedd_dagster.defs.former_partitions import move_history
from embedd_dagster.defs.reconcile import apply
from embedd_dagster.defs.reconcile import sensor as sensors
from embedd_dagster.defs.reconcile.observe import Memory
from embedd_dagster.defs.verdicts import CHECK_NAME
from embedd_dagster.engine.runtime import Runtime


def _record(instance: dg.DagsterInstance, key: str, rows: int) -> None:
    link = dg.MetadataValue.url(f"http://api.test/v1/vector-tables/{key}")
    instance.report_runless_asset_event(
        dg.AssetMaterialization(ASSET_KEY, partition=key, metadata={"rows": rows, "vector_table": link})
    )


def _record_check(instance: dg.DagsterInstance, key: str) -> None:
    instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(ASSET_KEY, CHECK_NAME, passed=True, metadata={}, partition=key)
    )


def _materializations(instance: dg.DagsterInstance, key: str) -> list[dg.AssetMaterialization]:
    wanted = dg.AssetRecordsFilter(asset_key=ASSET_KEY, asset_partitions=[key])
    found = instance.fetch_materializations(wanted, limit=10, ascending=True).records
    return [record.asset_materialization for record in found if record.asset_materialization is not None]


def test_a_tick_moves_the_history_of_a_partition_named_by_an_id_to_the_readable_key(
    instance: dg.DagsterInstance, runtime: Runtime, tables: Any
) -> None:
    table_id, other_id = tables.create("product-search"), tables.create("other")
    new_key = tables.partition(table_id)
    instance.add_dynamic_partitions("vector_tables", [table_id, tables.partition(other_id)])
    _record(instance, table_id, 1)
    _record(instance, table_id, 2)
    _record(instance, tables.partition(other_id), 3)
    for key in (table_id, tables.partition(other_id)):
        _record_check(instance, key)
    result = sensors.reconcile(instance, lambda: runtime, Memory(), print)
    assert isinstance(result, dg.SensorResult)
    add, delete = result.dynamic_partitions_requests or ()
    assert (list(add.partition_keys), list(delete.partition_keys)) == ([new_key], [table_id])
    moved = _materializations(instance, new_key)
    assert [one.metadata["rows"].value for one in moved] == [1, 2]
    assert {one.partition for one in moved} == {new_key}
    assert moved[0].metadata["vector_table"].value == f"http://api.test/v1/vector-tables/{table_id}"
    assert _materializations(instance, table_id) == []
    assert instance.get_materialized_partitions(ASSET_KEY) == {new_key, tables.partition(other_id)}
    infos = instance.event_log_storage.get_asset_check_partition_info([dg.AssetCheckKey(ASSET_KEY, CHECK_NAME)])
    assert {info.partition_key for info in infos} == {new_key, tables.partition(other_id)}


def test_histories_that_are_not_moved_before_the_ticks_deadline_are_moved_at_the_next_ones(
    instance: dg.DagsterInstance, runtime: Runtime, tables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [tables.create(name) for name in ("a", "b", "c")]
    instance.add_dynamic_partitions("vector_tables", ids)
    for key in ids:
        _record(instance, key, 1)
    instant = 0.0

    def slow_move(*asked: Any) -> None:
        nonlocal instant
        instant += 6
        move_history(*asked)

    monkeypatch.setattr(apply, "move_history", slow_move)
    log: list[str] = []
    moved = []
    for _ in range(2):
        result = sensors.reconcile(instance, lambda: runtime, Memory(), log.append, lambda: instant)
        assert isinstance(result, dg.SensorResult)
        for change in result.dynamic_partitions_requests or ():
            if isinstance(change, dg.AddDynamicPartitionsRequest):
                instance.add_dynamic_partitions("vector_tables", change.partition_keys)
            else:
                moved.append(list(change.partition_keys))
                for key in change.partition_keys:
                    instance.delete_dynamic_partition("vector_tables", key)
    assert moved == [sorted(ids)[:2], sorted(ids)[2:]]
    assert "1 partitions are left for the next tick." in log
    assert instance.get_materialized_partitions(ASSET_KEY) == set(map(tables.partition, ids))
    assert set(instance.get_dynamic_partitions("vector_tables")) == set(map(tables.partition, ids))


def test_moving_a_history_twice_is_the_same_as_once(instance: dg.DagsterInstance) -> None:
    _record(instance, "vt_old", 1)
    for _ in range(2):
        move_history(instance, "vt_old", "vt_12345678_new")
    assert [one.partition for one in _materializations(instance, "vt_12345678_new")] == ["vt_12345678_new"]
