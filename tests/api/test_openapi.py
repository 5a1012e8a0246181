"""The OpenAPI document says all of it."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def _operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(m, p, operation) for p, methods in document["paths"].items() for m, operation in methods.items()]


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, _, operation in _operations(document)]
    assert len(ids) == len(set(ids))
    for method, path, operation in _operations(document):
        assert operation["description"], (method, path)
        assert operation["tags"], (method, path)
        if not path.startswith("/v1"):
            continue
        assert operation["security"] == [{"ApiKey": []}], (method, path)
        assert {"401", "404", "422", "429", "500", "503"} <= set(operation["responses"]), (method, path)
        if method != "get" and not path.endswith("/query"):
            assert "403" in operation["responses"], (method, path)
        for status, response in operation["responses"].items():
            if not status.startswith("2"):
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}, (method, path, status)


def test_every_field_of_a_body_is_described(document: dict[str, Any]) -> None:
    create = document["components"]["schemas"]["VectorTableCreate"]
    assert create["additionalProperties"] is False
    assert set(create["required"]) == {
        "name", "connection_id", "source_table", "primary_key_column", "columns", "embedding_model", "embedding_dimensions",
    }  # fmt: skip
    assert all("description" in field for field in create["properties"].values())
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_pages_are_there(client: TestClient) -> None:
    assert client.get("/docs").status_code == 200
