"""The vector table resource."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import func, text, update

from embedd_dagster.catalog import tasks, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.tables import CdcStreamRow, Task
from tests.api.tenants import COLUMNS, Tenant, code_of, unique


def test_create_answers_exactly_the_seeds_fields(tenant: Tenant) -> None:
    body = tenant.table_body(name="product-search")
    response = tenant.post("/v1/vector-tables", body)
    assert response.status_code == 201, response.text
    table = response.json()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", table["created_at"])
    assert re.fullmatch(r"vt_[0-9a-z]{26}", table["id"])
    short = table["id"].removeprefix("vt_")[:8]
    assert table == {
        "id": table["id"],
        "org_id": tenant.org_id,
        "environment_id": tenant.environment_id,
        "connection_id": body["connection_id"],
        "embedding_provider_id": body["embedding_provider_id"],
        "name": "product-search",
        "source_table": "products",
        "primary_key_column": "id",
        "columns": COLUMNS,
        "embedding_model": "all-MiniLM-L6-v2",
        "embedding_dimensions": 384,
        "mode": "managed",
        "sync_mode": "batch",
        "sync_status": "pending",
        "qdrant_collection": f"vt_{short}_product-search",
        "platform_vector_ref": None,
        "total_rows": 0,
        "synced_rows": 0,
        "rows_skipped": 0,
        "rows_truncated": 0,
        "stage": None,
        "dagster_partition": f"vt_{short}_product-search",
        "sync_schedule": None,
        "sync_interval_seconds": None,
        "created_at": table["created_at"],
        "updated_at": table["updated_at"],
    }
    assert tenant.get(f"/v1/vector-tables/{table['id']}").json() == table
    assert tenant.get("/v1/vector-tables").json()["data"] == [table]


def test_a_platform_table_names_its_view(tenant: Tenant) -> None:
    table = tenant.table(mode="platform", name="Größe “x”")
    assert table["qdrant_collection"] is None
    assert re.fullmatch(r"public\.embedd_vt_[0-9a-z]{8}_[A-Za-z0-9_-]+", table["platform_vector_ref"])


def test_update_delete_and_schema(tenant: Tenant) -> None:
    table = tenant.table()
    path = f"/v1/vector-tables/{table['id']}"
    assert tenant.get(f"{path}/schema").json()["columns"][:2] == [
        {"name": "id", "type": "integer", "nullable": False},
        {"name": "title", "type": "text", "nullable": False},
    ]
    renamed = tenant.put(path, {"name": " renamed "}).json()
    assert (renamed["name"], renamed["qdrant_collection"]) == ("renamed", table["qdrant_collection"])
    assert renamed["dagster_partition"] == table["dagster_partition"] == table["qdrant_collection"]
    changed = tenant.put(path, {"columns": COLUMNS[:1], "sync_schedule": "*/5 * * * *"}).json()
    assert (changed["columns"], changed["sync_schedule"]) == (COLUMNS[:1], "*/5 * * * *")
    assert tenant.put(path, {"sync_schedule": None}).json()["sync_schedule"] is None
    assert tenant.delete(path).status_code == 204
    for response in (
        tenant.get(path),
        tenant.delete(path),
        tenant.put(path, {"name": "x"}),
        tenant.get(f"{path}/schema"),
    ):
        assert (response.status_code, code_of(response)) == (404, "vector_table_not_found")
    assert tenant.get("/v1/vector-tables").json()["data"] == []
    # its name is free again
    assert tenant.post("/v1/vector-tables", tenant.table_body(name="renamed")).status_code == 201


def test_backfill_is_queued_once_under_concurrent_calls(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(tenant.client.app, FastAPI)
    patient = replace(tenant.state, estimate_seconds=10.0)  # six at once, on a busy machine
    monkeypatch.setitem(tenant.client.app.state._state, "embedd", patient)
    table = tenant.table()
    path = f"/v1/vector-tables/{table['id']}/backfill"
    with ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(lambda _: tenant.post(path), range(6)))
    assert sorted(response.status_code for response in responses) == [200] + [409] * 5
    started = next(response.json() for response in responses if response.status_code == 200)
    assert started == {
        "vector_table_id": table["id"],
        "status": "backfilling",
        "total_rows": 30,
        "synced_rows": 0,
        "task_id": started["task_id"],
    }
    assert {code_of(response) for response in responses if response.status_code == 409} == {"backfill_in_progress"}
    assert tenant.get(f"/v1/vector-tables/{table['id']}").json()["sync_status"] == "backfilling"
    task = tenant.get(f"/v1/tasks/{started['task_id']}").json()
    assert (task["task_type"], task["status"], task["target_id"]) == ("backfill", "pending", table["id"])
    assert task["progress"]["total_rows"] == 30
    assert task["progress"]["stage"] == "queued"
    assert tenant.post(f"/v1/vector-tables/{table['id']}/sync").status_code == 409
    cancelled = tenant.post(f"/v1/tasks/{started['task_id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert tenant.get(f"/v1/vector-tables/{table['id']}").json()["sync_status"] == "pending"
    assert tenant.post(f"/v1/tasks/{started['task_id']}/cancel").json()["status"] == "cancelled"
    assert tenant.post(path).status_code == 200


def test_delete_cancels_what_is_queued(tenant: Tenant) -> None:
    table = tenant.table()
    task_id = tenant.post(f"/v1/vector-tables/{table['id']}/backfill").json()["task_id"]
    assert tenant.delete(f"/v1/vector-tables/{table['id']}").status_code == 204
    assert tenant.get(f"/v1/tasks/{task_id}").json()["status"] == "cancelled"


@pytest.mark.parametrize(
    ("method", "path", "expected"), [("DELETE", "", 204), ("POST", "/backfill", 409), ("POST", "/sync", 409)]
)
def test_no_request_is_in_a_deadlock_with_a_heartbeat(tenant: Tenant, method: str, path: str, expected: int) -> None:
    table_path = f"/v1/vector-tables/{tenant.table()['id']}"
    task_id = tenant.post(f"{table_path}/backfill").json()["task_id"]
    with tenant.catalog.transaction() as session:
        tasks.claim(session, task_id, "run")
    with ThreadPoolExecutor(1) as pool:
        with tenant.catalog.transaction() as session:  # a heartbeat takes the task, and then the vector table
            session.execute(update(Task).where(Task.id == task_id).values(heartbeat_at=func.now()))
            asked = pool.submit(tenant.send, method, f"{table_path}{path}")
            _wait_for(lambda: asked.done() or _someone_waits_for_a_lock(tenant))
            tasks.heartbeat(session, task_id, "run", tasks.EMPTY_PROGRESS)
        response = asked.result()
    assert response.status_code == expected, response.text


def _someone_waits_for_a_lock(tenant: Tenant) -> bool:
    with tenant.catalog.transaction() as session:
        waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return bool(session.execute(text(waiting)).all())


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_pause_does_not_set_back_until_when_a_followed_table_was_true(tenant: Tenant) -> None:
    made = tenant.table()
    path = f"/v1/vector-tables/{made['id']}/sync"
    with tenant.catalog.transaction() as session:
        row = vector_tables.find(session, made["id"], lock=True)
        assert row is not None
        row.sync_mode, row.cdc.subscribed_since = "cdc", now() - timedelta(hours=1)
        row.last_sync_at = now() - timedelta(hours=2)
        session.add(
            CdcStreamRow(
                connection_id=made["connection_id"], name="f", failures=0, created_at=now(), caught_up_at=now()
            )
        )
    before = tenant.get(f"{path}/status").json()["last_sync_at"]
    assert tenant.post(f"{path}/pause").json()["last_sync_at"] == before


def test_the_status_of_a_followed_table_says_what_holds_up_its_connection(tenant: Tenant) -> None:
    made = tenant.table()
    with tenant.catalog.transaction() as session:
        row = vector_tables.find(session, made["id"], lock=True)
        assert row is not None
        row.sync_mode = "cdc"
        feed = CdcStreamRow(connection_id=made["connection_id"], name="f", failures=0, created_at=now())
        feed.last_error, feed.last_error_at = "the commit waits for a synchronous standby", now()
        session.add(feed)
    path = f"/v1/vector-tables/{made['id']}/sync"
    status = tenant.get(f"{path}/status").json()
    assert status["last_error"] == "the commit waits for a synchronous standby"
    assert status["last_error_at"] is not None
    assert tenant.post(f"{path}/pause").json()["last_error"] is None, "a paused table is not followed"


def test_pause_and_resume(tenant: Tenant) -> None:
    path = f"/v1/vector-tables/{tenant.table()['id']}"
    assert code_of(tenant.post(f"{path}/sync/resume")) == "sync_not_paused"
    assert tenant.post(f"{path}/sync/pause").json()["sync_status"] == "paused"
    again = tenant.post(f"{path}/sync/pause")
    assert (again.status_code, code_of(again)) == (409, "sync_already_paused")
    assert tenant.post(f"{path}/sync/resume").json()["sync_status"] == "pending"
    status = tenant.get(f"{path}/sync/status").json()
    assert set(status) == {
        "vector_table_id", "sync_status", "last_sync_at", "rows_pending", "staleness_secs", "log_lag_bytes",
        "last_error", "last_error_at",
    }  # fmt: skip


def test_what_was_never_built_is_not_ready(tenant: Tenant) -> None:
    path = f"/v1/vector-tables/{tenant.table()['id']}"
    for response in (
        tenant.post(f"{path}/query", {"query": "x"}),
        tenant.post(f"{path}/sync"),
        tenant.post(f"{path}/sync", content=b"null", headers={"Content-Type": "application/json"}),
        tenant.post(f"{path}/sync", {}),
        tenant.post(f"{path}/failed-rows/retry"),
    ):
        assert (response.status_code, code_of(response)) == (422, "vector_table_not_ready")
    assert tenant.get(f"{path}/failed-rows").json()["data"] == []


BAD: list[tuple[dict[str, Any], int, str, str]] = [
    ({"source_table": "nothing_here"}, 404, "source_table_not_found", "nothing_here"),
    ({"primary_key_column": "no_id"}, 404, "source_table_not_found", "no_id"),
    ({"columns": [*COLUMNS, {"name": "nope", "role": "embedding"}, {"name": "nor", "role": "embedding"}]}, 404,
     "source_table_not_found", "nor"),
    ({"primary_key_column": "twice"}, 422, "validation_error", "primary_key_column"),
    ({"primary_key_column": "code"}, 422, "validation_error", "primary_key_column"),
    ({"primary_key_column": "tags"}, 422, "validation_error", "primary_key_column"),
    ({"columns": COLUMNS[2:]}, 422, "validation_error", "embedding"),
    ({"columns": []}, 422, "validation_error", "columns"),
    ({"columns": [COLUMNS[0], COLUMNS[0]]}, 422, "validation_error", "twice"),
    ({"columns": [COLUMNS[0], {**COLUMNS[0], "name": "TITLE"}]}, 422, "validation_error", "twice"),
    ({"columns": [COLUMNS[0], {"name": "price", "role": "metadata"}]}, 422, "validation_error", "filter_type"),
    ({"columns": [COLUMNS[0], {"name": "title", "role": "metadata", "filter_type": "integer"}]}, 422,
     "validation_error", "columns[1].filter_type"),
    ({"columns": [COLUMNS[0], {"name": "tags", "role": "metadata", "filter_type": "keyword"}]}, 422,
     "validation_error", "columns[1].filter_type"),
    ({"columns": [COLUMNS[0]] * 201}, 422, "validation_error", "columns"),
    ({"columns": [{**COLUMNS[0], "role": "both"}]}, 422, "validation_error", "columns[0].role"),
    ({"columns": [{**COLUMNS[0], "ordinal": "1"}]}, 422, "validation_error", "columns[0].ordinal"),
    ({"columns": [{**COLUMNS[0], "colour": 1}]}, 422, "validation_error", "colour"),
    ({"columns": "title"}, 422, "validation_error", "columns"),
    ({"embedding_dimensions": 385}, 422, "validation_error", "384"),
    ({"embedding_dimensions": "384"}, 422, "validation_error", "embedding_dimensions"),
    ({"embedding_dimensions": 384.5}, 422, "validation_error", "embedding_dimensions"),
    ({"embedding_dimensions": True}, 422, "validation_error", "embedding_dimensions"),
    ({"embedding_dimensions": 0}, 422, "validation_error", "embedding_dimensions"),
    ({"embedding_model": "gpt-9"}, 422, "validation_error", "all-MiniLM-L6-v2"),
    ({"embedding_provider_id": None}, 422, "validation_error", "embedding_provider_id"),
    ({"embedding_provider_id": "ep_x"}, 404, "embedding_provider_not_found", "ep_x"),
    ({"connection_id": "conn_" + "0" * 26}, 404, "connection_not_found", "conn_0"),
    ({"connection_id": "'; drop table connections"}, 404, "connection_not_found", "drop"),
    ({"name": "x" * 101}, 422, "validation_error", "name: at most 100"),
    ({"name": "   "}, 422, "validation_error", "name"),
    ({"name": "a\tb"}, 422, "validation_error", "name: control"),
    ({"name": "a\x00b"}, 422, "validation_error", "name: a text must not contain NUL"),
    ({"name": "a\ud800b"}, 422, "validation_error", "name"),
    ({"name": None}, 422, "validation_error", "name"),
    ({"mode": "both", "connection_id": "conn_" + "0" * 26}, 422, "validation_error", "mode: 'managed' or 'platform'"),
    ({"sync_mode": "never"}, 422, "validation_error", "sync_mode"),
    ({"sync_schedule": "every hour"}, 422, "validation_error", "sync_schedule"),
    ({"sync_schedule": "61 * * * *"}, 422, "validation_error", "sync_schedule"),
    ({"sync_schedule": "* * * * * *"}, 422, "validation_error", "sync_schedule"),
    ({"sync_interval_seconds": 5}, 422, "validation_error", "sync_interval_seconds"),
    ({"sync_mode": "cdc", "sync_interval_seconds": 3601}, 422, "validation_error", "sync_interval_seconds"),
    ({"sync_mode": "cdc", "sync_schedule": "* * * * *"}, 422, "validation_error", "sync_schedule"),
    ({"total_rows": 1}, 422, "validation_error", "total_rows"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "status", "code", "says"), BAD, ids=[ascii(case[0])[:40] for case in BAD])
def test_bad_input_is_refused_by_name_and_leaves_nothing(
    tenant: Tenant, changes: dict[str, Any], status: int, code: str, says: str
) -> None:
    body = tenant.table_body(**changes)
    # a lone surrogate can only be sent escaped
    escaped = {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}
    response = tenant.post("/v1/vector-tables", **escaped)
    assert (response.status_code, code_of(response)) == (status, code), response.text
    assert says in response.json()["error"]["message"], response.text
    assert tenant.get("/v1/vector-tables").json()["data"] == []


def test_every_missing_field_is_named(tenant: Tenant) -> None:
    message = tenant.post("/v1/vector-tables", {}).json()["error"]["message"]
    for field in ("name", "connection_id", "source_table", "primary_key_column", "columns"):
        assert f"{field}: required" in message


@pytest.mark.parametrize("name", ["🦄 emoji", '"; drop table vector_tables; --', "a/b?c=d", "x" * 100, "名前", "'"])
def test_any_name_for_people_is_kept(tenant: Tenant, name: str) -> None:
    table = tenant.table(name=name)
    assert tenant.get(f"/v1/vector-tables/{table['id']}").json()["name"] == name
    taken = tenant.post("/v1/vector-tables", tenant.table_body(name=name))
    assert (taken.status_code, code_of(taken)) == (409, "name_conflict")


def test_a_connection_must_be_of_the_same_mode(tenant: Tenant) -> None:
    connection = tenant.connection("platform")
    response = tenant.post("/v1/vector-tables", tenant.table_body(connection_id=connection["id"]))
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert "mode" in response.json()["error"]["message"]


def test_a_connection_must_have_passed_its_test(tenant: Tenant) -> None:
    credentials = {**tenant.credentials, "password": "wrong"}
    body = {"name": unique("conn"), "mode": "managed", "credentials": credentials}
    connection = tenant.made("/v1/providers/postgresql/connections", body)
    assert connection["status"] == "failed"
    response = tenant.post("/v1/vector-tables", tenant.table_body(connection_id=connection["id"]))
    assert (response.status_code, code_of(response)) == (422, "connection_not_ready")


def test_names_of_the_source_are_spelled_as_it_does(tenant: Tenant) -> None:
    columns = [{"name": "TITLE", "role": "embedding"}, {"name": "Price", "role": "metadata", "filter_type": "float"}]
    table = tenant.table(source_table="PRODUCTS", primary_key_column="ID", columns=columns)
    assert table["primary_key_column"] == "id"
    assert [column["name"] for column in table["columns"]] == ["title", "price"]
    odd = tenant.table(
        source_table='"Odd Schema"."Mixed ""Case"""',
        primary_key_column="Id",
        columns=[{"name": "Title", "role": "embedding"}],
    )
    assert odd["source_table"] == '"Odd Schema"."Mixed ""Case"""'
    assert tenant.table(source_table="product_view", columns=COLUMNS[:1])["sync_status"] == "pending"


def test_a_table_that_the_user_may_not_read_is_a_403_with_the_grant(tenant: Tenant) -> None:
    credentials = {**tenant.credentials, "user": "reader", "password": "p@ss/w:o%rd"}
    body = {"name": unique("conn"), "mode": "managed", "credentials": credentials}
    connection = tenant.made("/v1/providers/postgresql/connections", body)
    assert connection["status"] == "connected", connection
    request = tenant.table_body(connection_id=connection["id"])
    assert tenant.post("/v1/vector-tables", request).status_code == 201
    response = tenant.post(
        "/v1/vector-tables", {**request, "name": "s", "source_table": "secret", "columns": COLUMNS[:1]}
    )
    assert (response.status_code, code_of(response)) == (403, "source_table_access_denied")
    assert "GRANT SELECT" in response.json()["error"]["resolution"]


def test_cdc_is_accepted(tenant: Tenant) -> None:
    table = tenant.table(sync_mode="cdc", sync_interval_seconds=7)
    assert (table["sync_mode"], table["sync_interval_seconds"]) == ("cdc", 7)


@pytest.mark.parametrize("field", ["connection_id", "mode", "id", "sync_status", "colour"])
def test_update_refuses_what_cannot_be_changed(tenant: Tenant, field: str) -> None:
    path = f"/v1/vector-tables/{tenant.table()['id']}"
    response = tenant.put(path, {"name": "other", field: "x"})
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert field in response.json()["error"]["message"]
    assert tenant.get(path).json()["name"] != "other"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"embedding_dimensions": 100}, "validation_error"),
        ({"embedding_model": "text-embedding-3-small"}, "validation_error"),
        ({"columns": COLUMNS[2:]}, "validation_error"),
        ({"columns": [{"name": "nope", "role": "embedding"}]}, "source_table_not_found"),
        ({"columns": None}, "validation_error"),
        ({"name": ""}, "validation_error"),
        ({"sync_interval_seconds": 5}, "validation_error"),
    ],
)
def test_update_checks_as_create_does(tenant: Tenant, body: dict[str, Any], code: str) -> None:
    table = tenant.table()
    path = f"/v1/vector-tables/{table['id']}"
    assert code_of(tenant.put(path, body)) == code
    assert tenant.get(path).json() == table


def test_names_are_unique_also_by_update(tenant: Tenant) -> None:
    first, second = tenant.table(), tenant.table()
    response = tenant.put(f"/v1/vector-tables/{second['id']}", {"name": first["name"]})
    assert (response.status_code, code_of(response)) == (409, "name_conflict")


def test_an_estimate_counts_rows_tokens_and_money_and_starts_nothing(tenant: Tenant) -> None:
    table = tenant.table()
    found = tenant.post(f"/v1/vector-tables/{table['id']}/estimate").json()
    assert found["rows"] == found["sampled_rows"] == found["rows_to_embed"] + found["rows_skipped"]
    assert found["tokens"] > 0
    assert found["rows_reused"] == 0
    assert tenant.get(f"/v1/tasks?target_id={table['id']}").json()["data"] == []
    assert tenant.get(f"/v1/vector-tables/{table['id']}").json()["sync_status"] == "pending"
    unknown = tenant.post("/v1/vector-tables/vt_unknown/estimate")
    assert (unknown.status_code, code_of(unknown)) == (404, "vector_table_not_found")
