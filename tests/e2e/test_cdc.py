"""CDC on the real stack: the sensor launches a consumer, and another one when it dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.support.e2e import Embedd, worker_of

pytestmark = pytest.mark.e2e

CONSUMERS = """query($status: [RunStatus!]) {
    runsOrError(filter: {pipelineName: "follow_job", statuses: $status}) {
        ... on Runs { results { runId status tags { key value } } } } }"""
MATERIALIZATIONS = """query($partition: String!) { assetOrError(assetKey: {path: ["vector_table"]}) {
    ... on Asset { assetMaterializations(partitions: [$partition], limit: 10) {
        metadataEntries { label ... on TextMetadataEntry { text } ... on IntMetadataEntry { intValue } } } } } }"""


def _consumers(embedd: Embedd, *statuses: str) -> list[str]:
    """The runs that follow one of this customer's connections."""
    runs = embedd.graphql(CONSUMERS, status=list(statuses) or ["STARTED"])["runsOrError"]["results"]
    mine = set(embedd.connection_ids.values())
    return [run["runId"] for run in runs if mine & {tag["value"] for tag in run["tags"]}]


def _status(embedd: Embedd, vector_table_id: str) -> dict[str, Any]:
    return embedd.get(f"/v1/vector-tables/{vector_table_id}/sync/status")


def _is_followed(embedd: Embedd, vector_table_id: str, built_at: datetime) -> bool:
    """Whether it is known to be true as of later than its build, though nobody compared it."""
    status = _status(embedd, vector_table_id)
    if status["sync_status"] != "synced" or status["log_lag_bytes"] is None:
        return False
    live = [task for task in embedd.get(f"/v1/tasks?target_id={vector_table_id}")["data"] if not task["ended_at"]]
    return not live and datetime.fromisoformat(status["last_sync_at"]) > built_at + timedelta(seconds=10)


@pytest.fixture(params=["managed", "platform"])
def followed(request: pytest.FixtureRequest, embedd: Embedd, eventually: Callable[..., Any]) -> str:
    """A built cdc table that is followed."""
    embedd.create_source(200)
    vector_table_id = embedd.create_vector_table(request.param, sync_mode="cdc")
    embedd.build(vector_table_id)
    built_at = datetime.now(UTC)
    eventually(lambda: _is_followed(embedd, vector_table_id, built_at))
    return vector_table_id


def _finds(embedd: Embedd, vector_table_id: str, key: int, text: str) -> bool:
    found = embedd.query(vector_table_id, text, limit=1)
    return bool(found) and (found[0]["id"], found[0]["embedded_text"]) == (key, text)


def test_a_change_is_found_and_told(embedd: Embedd, followed: str, eventually: Callable[..., Any]) -> None:
    embedd.sql("INSERT INTO products VALUES (1000, 'new', 'row', 'red', 1)")
    eventually(lambda: _finds(embedd, followed, 1000, "title: new\nrow"))
    embedd.sql("DELETE FROM products WHERE id = 1000")
    eventually(lambda: not _finds(embedd, followed, 1000, "title: new\nrow"))

    def told() -> bool:
        materializations = embedd.graphql(MATERIALIZATIONS, partition=embedd.table(followed)["dagster_partition"])[
            "assetOrError"
        ]["assetMaterializations"]
        entries = [{entry["label"]: entry for entry in one["metadataEntries"]} for one in materializations]
        of_following = [one for one in entries if one["task_type"].get("text") == "follow"]
        return bool(of_following) and all("lag_seconds" in one for one in of_following)

    eventually(told)
    metrics = embedd.api.get("/metrics").text
    assert "embedd_change_log_lag_bytes" in metrics
    assert "embedd_changes_pending" in metrics

    runs = _consumers(embedd)
    assert len(runs) == 1
    assert embedd.api.delete(f"/v1/vector-tables/{followed}").status_code == 204
    eventually(lambda: embedd.run_status(runs[0]) == "SUCCESS")
    slots = "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()"
    eventually(lambda: embedd.sql(slots) == [])
    assert embedd.sql("SELECT pubname FROM pg_publication") == []
    assert _consumers(embedd, "STARTED", "STARTING", "QUEUED") == []


@pytest.mark.parametrize("followed", ["platform"], indirect=True)
def test_a_killed_consumer_is_replaced_and_nothing_lost(
    embedd: Embedd, followed: str, eventually: Callable[..., Any]
) -> None:
    run_id = _consumers(embedd)[0]
    os.kill(worker_of(run_id).pid, signal.SIGKILL)
    embedd.sql("UPDATE products SET title = 'while nobody followed', body = NULL WHERE id = 7")
    eventually(lambda: embedd.run_status(run_id) == "FAILURE")
    eventually(lambda: _finds(embedd, followed, 7, "title: while nobody followed"))
    assert [run for run in _consumers(embedd) if run != run_id]


@pytest.mark.parametrize("followed", ["managed"], indirect=True)
def test_a_server_that_restarts_is_followed_on(embedd: Embedd, followed: str, eventually: Callable[..., Any]) -> None:
    runs = _consumers(embedd)
    embedd.stack.stop_child("postgres")
    time.sleep(3)
    embedd.stack.start_child("postgres")
    eventually(lambda: embedd.api.get("/ready").status_code == 200)
    embedd.sql("UPDATE products SET title = 'after the restart', body = NULL WHERE id = 7")
    eventually(lambda: _finds(embedd, followed, 7, "title: after the restart"))

    def the_same_run_goes_on() -> bool:
        with suppress(httpx.HTTPStatusError):  # Dagster's webserver meets its own lost connections first
            return _consumers(embedd) == runs
        return False

    eventually(the_same_run_goes_on)


def test_what_cannot_be_followed_is_refused_with_what_to_do(embedd: Embedd) -> None:
    embedd.create_source(3)
    embedd.sql("CREATE VIEW shown AS SELECT * FROM products; ALTER TABLE products REPLICA IDENTITY NOTHING")
    for table, told in (("shown", "view"), ("products", "REPLICA IDENTITY")):
        body = {
            "name": f"refused-{table}",
            "connection_id": embedd.connection_ids["managed"],
            "embedding_provider_id": embedd.provider_id,
            "source_table": table,
            "primary_key_column": "id",
            "columns": [{"name": "title", "role": "embedding"}],
            "embedding_model": "text-embedding-3-small",
            "embedding_dimensions": 64,
            "sync_mode": "cdc",
        }
        error = embedd.post("/v1/vector-tables", body, expect=422)["error"]
        assert error["code"] == "validation_error"
        assert error["message"].startswith("sync_mode:")
        assert told in error["message"] + error["resolution"]
    assert embedd.get("/v1/vector-tables")["pagination"]["has_more"] in (True, False)
