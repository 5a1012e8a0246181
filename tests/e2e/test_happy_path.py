"""A vector table's whole life over the public API, in both modes, on the running stack."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from embedd_dagster.core.embedded_text import text_hash
from tests.support.e2e import COLUMNS, Embedd

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("mode", ["managed", "platform"])
def test_from_table_to_answer(embedd: Embedd, mode: str, eventually: Callable[..., Any]) -> None:
    embedd.create_source(500)
    vector_table_id = embedd.create_vector_table(mode)
    assert embedd.table(vector_table_id)["sync_status"] == "pending"
    embedd.post(f"/v1/vector-tables/{vector_table_id}/query", {"query": "x"}, expect=422)

    task = embedd.build(vector_table_id)

    assert task["progress"]["rows_processed"] == task["progress"]["total_rows"] == 500
    table = embedd.table(vector_table_id)
    assert (table["sync_status"], table["total_rows"], table["synced_rows"]) == ("synced", 500, 500)
    eventually(lambda: embedd.run_status(task["dagster_run_id"]) == "SUCCESS")
    # the loopback model gives equal texts equal vectors: the very text of row 42 finds row 42
    text = "title: product 42\nthe body of product 42"
    first, *_others = embedd.query(vector_table_id, text, limit=5)
    assert first["id"] == 42
    assert first["similarity_score"] == pytest.approx(1.0, abs=1e-4)
    assert first["embedded_text"] == text
    assert first["metadata"] == {"category": "red", "price": 4.2}
    filtered = embedd.query(
        vector_table_id, text, limit=100, filters={"category": "green", "price": {"gt": 10, "lte": 20}}
    )
    assert {result["id"] for result in filtered} == {n for n in range(101, 201) if n % 3 == 1}


def test_users_reach_a_platform_table_by_sql(embedd: Embedd) -> None:
    embedd.create_source(20)
    vector_table_id = embedd.create_vector_table("platform")
    embedd.build(vector_table_id)
    schema, _, name = embedd.table(vector_table_id)["platform_vector_ref"].partition(".")
    joined = embedd.sql(
        f'SELECT p.title FROM "{schema}"."{name}" v JOIN products p ON p.id = v.pk_value ORDER BY p.id LIMIT 1'
    )
    assert joined == [("product 1",)]


def test_users_reach_a_managed_table_by_its_alias(embedd: Embedd) -> None:
    embedd.create_source(20)
    vector_table_id = embedd.create_vector_table("managed")
    embedd.build(vector_table_id)
    alias = embedd.table(vector_table_id)["qdrant_collection"]
    assert alias.startswith(f"vt_{vector_table_id.removeprefix('vt_')[:8]}_")
    assert embedd.qdrant("POST", f"/collections/{alias}/points/count", {"exact": True})["count"] == 20


@pytest.mark.parametrize("mode", ["managed", "platform"])
def test_a_changed_configuration_is_swapped_in_without_a_failed_query(
    embedd: Embedd, mode: str, eventually: Callable[..., Any]
) -> None:
    embedd.create_source(400)
    vector_table_id = embedd.create_vector_table(mode)
    embedd.build(vector_table_id)
    problems: list[str] = []
    seen: set[str] = set()
    stop = threading.Event()

    def ask() -> None:
        """Every answer must be whole and of one configuration: all texts with the prefix, or none."""
        while not stop.is_set():
            response = embedd.api.post(
                f"/v1/vector-tables/{vector_table_id}/query",
                json={"query": "title: product 7\nthe body of product 7", "limit": 50},
            )
            if response.status_code != 200:
                problems.append(response.text)
                continue
            texts = [result["embedded_text"] for result in response.json()["results"]]
            kinds = {text.startswith("item: ") for text in texts}
            if len(texts) != 50 or len(kinds) != 1:
                problems.append(f"{len(texts)} results of {kinds}")
            seen.add("new" if True in kinds else "old")

    def write() -> None:
        """Somebody works with the table all the time."""
        while not stop.is_set():
            embedd.sql("UPDATE products SET price = price + 1 WHERE id = (random() * 399)::int + 1")
            embedd.sql("UPDATE products SET body = body || '.' WHERE id = (random() * 99)::int + 301")

    threads = [threading.Thread(target=ask), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    try:
        columns = [{**COLUMNS[0], "name_prefix": "item: "}, *COLUMNS[1:]]
        response = embedd.api.put(f"/v1/vector-tables/{vector_table_id}", json={"columns": columns})
        assert response.json()["sync_status"] == "pending_rebackfill"
        eventually(lambda: embedd.table(vector_table_id)["sync_status"] == "synced")
        eventually(lambda: "new" in seen)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []
    assert seen == {"old", "new"}
    newest = embedd.get(f"/v1/tasks?target_id={vector_table_id}")["data"][0]
    assert (newest["task_type"], newest["status"]) == ("rebackfill", "completed")
    task = embedd.wait_for_task(embedd.post(f"/v1/vector-tables/{vector_table_id}/sync")["task_id"])
    assert task["status"] == "completed"
    source = embedd.sql("SELECT id, 'item: ' || title || E'\\n' || body, price::float8 FROM products")
    assert _stored(embedd, vector_table_id, mode) == {key: (text, price) for key, text, price in source}


def _stored(embedd: Embedd, vector_table_id: str, mode: str) -> dict[int, tuple[str, float]]:
    """Text and price of every point, by id, read by the store's own interface."""
    table = embedd.table(vector_table_id)
    if mode == "platform":
        schema, _, name = table["platform_vector_ref"].partition(".")
        rows = embedd.sql(f"""SELECT pk_value, embedded_text, (metadata->>'price')::float8 FROM "{schema}"."{name}\"""")
        return {key: (text, price) for key, text, price in rows}
    path = f"/collections/{table['qdrant_collection']}/points/scroll"
    points = embedd.qdrant("POST", path, {"limit": 1000, "with_payload": True})["points"]
    payloads = [point["payload"] for point in points]
    return {payload["pk"]: (payload["embedded_text"], payload["metadata"]["price"]) for payload in payloads}


def test_a_change_of_metadata_alone_embeds_nothing(embedd: Embedd, eventually: Callable[..., Any]) -> None:
    embedd.create_source(100)
    vector_table_id = embedd.create_vector_table()
    embedd.build(vector_table_id)
    before = embedd.provider_server.stats()["texts"]
    embedd.api.put(f"/v1/vector-tables/{vector_table_id}", json={"columns": COLUMNS[:3]})
    eventually(lambda: embedd.table(vector_table_id)["sync_status"] == "synced")
    assert embedd.provider_server.stats()["texts"] == before
    assert embedd.query(vector_table_id, "product 1", limit=1)[0]["metadata"].keys() == {"category"}


def test_a_change_that_changes_nothing_does_not_rebuild(embedd: Embedd) -> None:
    embedd.create_source(5)
    vector_table_id = embedd.create_vector_table()
    embedd.build(vector_table_id)
    same = {"columns": COLUMNS, "embedding_dimensions": 64}
    assert embedd.api.put(f"/v1/vector-tables/{vector_table_id}", json=same).json()["sync_status"] == "synced"
    renamed = embedd.api.put(f"/v1/vector-tables/{vector_table_id}", json={"name": f"renamed {vector_table_id}"})
    assert renamed.json()["sync_status"] == "synced"


def test_a_sync_brings_what_changed_and_embeds_only_new_texts(embedd: Embedd) -> None:
    embedd.create_source(200)
    vector_table_id = embedd.create_vector_table()
    embedd.build(vector_table_id)
    embedd.sql(
        """UPDATE products SET body = 'rewritten' WHERE id = 1;
        UPDATE products SET price = 999 WHERE id = 2;
        DELETE FROM products WHERE id = 3;
        INSERT INTO products VALUES (1000, 'new', 'row', 'red', 1)"""
    )
    before = embedd.provider_server.stats()["texts"]
    task = embedd.wait_for_task(embedd.post(f"/v1/vector-tables/{vector_table_id}/sync")["task_id"])
    assert task["status"] == "completed"
    assert embedd.provider_server.stats()["texts"] - before == 2
    table = embedd.table(vector_table_id)
    assert (table["total_rows"], table["synced_rows"]) == (200, 200)
    found = {row["id"]: row for row in embedd.query(vector_table_id, "x", limit=100, filters={"price": {"gte": 999}})}
    assert found.keys() == {2}
    texts = embedd.query(vector_table_id, "title: product 1\nrewritten", limit=1)
    assert (texts[0]["id"], texts[0]["embedded_text"]) == (1, "title: product 1\nrewritten")
    assert text_hash(texts[0]["embedded_text"])


@pytest.mark.parametrize("mode", ["managed", "platform"])
def test_a_deleted_vector_table_leaves_nothing(embedd: Embedd, mode: str, eventually: Callable[..., Any]) -> None:
    embedd.create_source(10)
    vector_table_id = embedd.create_vector_table(mode)
    embedd.build(vector_table_id)
    partition = embedd.table(vector_table_id)["dagster_partition"]
    assert partition in _partitions(embedd)
    assert embedd.api.delete(f"/v1/vector-tables/{vector_table_id}").status_code == 204
    assert embedd.api.get(f"/v1/vector-tables/{vector_table_id}").status_code == 404
    # two sensors see to it, in either order: one removes the partition, the other what is in the store
    eventually(lambda: partition not in _partitions(embedd))
    eventually(lambda: _left_over(embedd, mode, vector_table_id) == [])


def _left_over(embedd: Embedd, mode: str, vector_table_id: str) -> list[str]:
    """What is left of this vector table in its store, by name."""
    if mode == "managed":
        names = [entry["name"] for entry in embedd.qdrant("GET", "/collections")["collections"]]
        return [name for name in names if vector_table_id in name]
    return [name for (name,) in embedd.sql("SELECT relname FROM pg_class WHERE relname LIKE 'embedd_%'")]


def _partitions(embedd: Embedd) -> list[str]:
    query = """query { assetNodeOrError(assetKey: {path: ["vector_table"]}) {
        ... on AssetNode { partitionKeys } } }"""
    keys: list[str] = embedd.graphql(query)["assetNodeOrError"]["partitionKeys"]
    return keys
