"""What becomes of a run in whose midst somebody does something else, on the running stack; the table is in docs/concepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest

from tests.support.e2e import COLUMNS, Embedd

pytestmark = pytest.mark.e2e

ROWS = 200
CHANGED = 30


@contextmanager
def _caught(embedd: Embedd, eventually: Callable[..., Any], path: str) -> Iterator[str]:
    """The id of a task begun by this call, whose run waits for its provider as long as the block lasts."""
    embedd.provider_server.behave(held=True)
    try:
        task_id: str = embedd.post(path)["task_id"]
        eventually(lambda: embedd.provider_server.stats()["in_flight"] > 0)
        yield task_id
    finally:
        embedd.provider_server.behave(held=False)


def _change_rows(embedd: Embedd) -> None:
    embedd.sql(f"UPDATE products SET body = '{uuid4().hex}' || id WHERE id <= {CHANGED}")


def _texts(embedd: Embedd, vector_table_id: str) -> set[str]:
    """How the texts found begin."""
    return {row["embedded_text"].split(":")[0] for row in embedd.query(vector_table_id, "x", limit=20)}


def test_a_pause_during_a_backfill_then_a_backfill_and_a_new_configuration_during_a_sync(
    embedd: Embedd, eventually: Callable[..., Any]
) -> None:
    embedd.create_source(ROWS)
    vector_table_id = embedd.create_vector_table()
    path = f"/v1/vector-tables/{vector_table_id}"

    with _caught(embedd, eventually, f"{path}/backfill") as task_id:
        assert embedd.post(f"{path}/sync/pause")["sync_status"] == "backfilling"
    assert embedd.wait_for_task(task_id)["status"] == "completed"
    assert embedd.table(vector_table_id)["sync_status"] == "paused"
    assert _texts(embedd, vector_table_id) == {"title"}
    assert embedd.post(f"{path}/sync/resume")["sync_status"] == "synced"

    _change_rows(embedd)
    with _caught(embedd, eventually, f"{path}/sync") as task_id:
        for asked in ("backfill", "sync"):
            refused = embedd.post(f"{path}/{asked}", expect=409)["error"]
            assert refused["code"] == "backfill_in_progress"
            assert task_id in refused["message"]
        columns = [{**COLUMNS[0], "name_prefix": "item: "}, *COLUMNS[1:]]
        changed = embedd.api.put(path, json={"columns": columns})
        assert changed.json()["sync_status"] == "pending_rebackfill"
    assert embedd.wait_for_task(task_id)["status"] == "completed"
    eventually(lambda: embedd.table(vector_table_id)["sync_status"] == "synced")
    assert _texts(embedd, vector_table_id) == {"item"}
    done = [task["task_type"] for task in embedd.get(f"/v1/tasks?target_id={vector_table_id}")["data"]]
    assert done == ["rebackfill", "sync", "backfill"]


def test_a_delete_during_a_sync(embedd: Embedd, eventually: Callable[..., Any]) -> None:
    embedd.create_source(ROWS)
    vector_table_id = embedd.create_vector_table()
    embedd.build(vector_table_id)
    path = f"/v1/vector-tables/{vector_table_id}"
    _change_rows(embedd)
    with _caught(embedd, eventually, f"{path}/sync") as task_id:
        run_id = embedd.task(task_id)["dagster_run_id"]
        assert embedd.api.delete(path).status_code == 204
        assert embedd.api.get(path).status_code == 404
    assert embedd.wait_for_task(task_id)["status"] == "cancelled"
    eventually(lambda: embedd.run_status(run_id) == "CANCELED")

    def is_stored() -> bool:
        names = [entry["name"] for entry in embedd.qdrant("GET", "/collections")["collections"]]
        return any(vector_table_id in name for name in names)

    eventually(lambda: not is_stored())
