"""Callers of the API: an organization with its keys, and what it needs before its first vector table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import URL

from api.state import ApiState
from embedd_dagster.catalog import api_keys, environments
from embedd_dagster.catalog.api_keys import Permission
from embedd_dagster.catalog.database import Catalog

COLUMNS = [
    {"name": "title", "role": "embedding", "ordinal": 1, "name_prefix": "title: "},
    {"name": "description", "role": "embedding", "ordinal": 2},
    {"name": "category", "role": "metadata", "filter_type": "keyword"},
    {"name": "price", "role": "metadata", "filter_type": "float"},
    {"name": "in_stock", "role": "metadata", "filter_type": "boolean"},
]


def unique(stem: str) -> str:
    """A name that nothing else has."""
    return f"{stem}-{uuid4().hex[:8]}"


def code_of(response: httpx.Response) -> str:
    """The error code of an answer, which must be a complete envelope."""
    body = response.json()
    error = body["error"]
    assert set(error) == {"code", "message", "resolution", "docs_url", "request_id"}, body
    assert all(isinstance(value, str) and value for value in error.values()), body
    assert error["request_id"] == response.headers["x-request-id"]
    assert error["docs_url"].endswith(f"#{error['code']}")
    code: str = error["code"]
    return code


@dataclass
class Tenant:
    """One organization with a key for all of it."""

    client: TestClient
    catalog: Catalog
    source: URL
    org_id: str
    environment_id: str
    key: str

    @classmethod
    def create(cls, client: TestClient, catalog: Catalog, source: URL) -> Tenant:
        with catalog.transaction() as session:
            organization = environments.create_organization(session, unique("org"))
            prod = environments.find_by_name(session, organization.id, "prod")
            assert prod is not None
            key = api_keys.create(session, organization.id, None, "test", Permission.FULL)
        return cls(client, catalog, source, organization.id, prod.id, key.raw)

    @property
    def state(self) -> ApiState:
        """The state of the application that the client talks to."""
        assert isinstance(self.client.app, FastAPI)
        found: ApiState = self.client.app.state.embedd
        return found

    def new_key(self, permission: str = "full", environment_id: str | None = None) -> str:
        with self.catalog.transaction() as session:
            return api_keys.create(session, self.org_id, environment_id, "test", Permission(permission)).raw

    def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = None,
        environment: str | None = None,
        **more: Any,
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key or self.key}", **more.pop("headers", {})}
        if environment is not None:
            headers["X-Environment-Id"] = environment
        if body is not None:
            more["json"] = body
        return self.client.request(method, path, headers=headers, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.send("GET", path, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.send("POST", path, body, **more)

    def put(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.send("PUT", path, body, **more)

    def delete(self, path: str, **more: Any) -> httpx.Response:
        return self.send("DELETE", path, **more)

    def made(self, path: str, body: Any, **more: Any) -> dict[str, Any]:
        """What a POST has created."""
        response = self.post(path, body, **more)
        assert response.status_code in (200, 201), response.text
        found: dict[str, Any] = response.json()
        return found

    @property
    def credentials(self) -> dict[str, Any]:
        return {
            "host": self.source.host,
            "port": self.source.port,
            "database": self.source.database,
            "user": self.source.username,
            "password": self.source.password,
        }

    def connection(self, mode: str = "managed", **more: Any) -> dict[str, Any]:
        body = {"name": unique("conn"), "mode": mode, "credentials": self.credentials}
        return self.made("/v1/providers/postgresql/connections", body, **more)

    def provider(self, **more: Any) -> dict[str, Any]:
        return self.made("/v1/embedding-providers", {"name": unique("ep"), "provider": "local"}, **more)

    def table_body(self, **changes: Any) -> dict[str, Any]:
        """A complete request for a vector table, with a connection and a provider of its own unless given."""
        mode = changes.get("mode", "managed")
        body = {
            "name": unique("table"),
            "source_table": "products",
            "primary_key_column": "id",
            "columns": COLUMNS,
            "embedding_model": "all-MiniLM-L6-v2",
            "embedding_dimensions": 384,
            **changes,
        }
        if "connection_id" not in changes:
            body["connection_id"] = self.connection(mode)["id"]
        if "embedding_provider_id" not in changes:
            body["embedding_provider_id"] = self.provider()["id"]
        return body

    def table(self, **changes: Any) -> dict[str, Any]:
        return self.made("/v1/vector-tables", self.table_body(**changes))
