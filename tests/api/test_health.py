"""Liveness, readiness, and what the process is made of."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from embedd_dagster.stack.qdrant.collections import QdrantCatalog
from embedd_dagster.stack.qdrant.server import create_app
from tests.api.tenants import code_of
from tests.support.serving import serving


@pytest.fixture
def guarded_qdrant(tmp_path: Path) -> Iterator[str]:
    """A Qdrant engine that asks for a key."""
    catalog = QdrantCatalog(tmp_path)
    catalog.open()
    with serving(create_app(catalog, "the-key"), lifespan="on") as port:
        yield f"http://127.0.0.1:{port}"


def test_health_needs_no_key(client: TestClient) -> None:
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_ready_names_each_part(client: TestClient, app_with: Callable[..., TestClient], qdrant_url: str) -> None:
    response = client.get("/ready")
    assert (response.status_code, code_of(response)) == (503, "vector_store_unavailable")
    body = response.json()
    assert body["status"] == "not_ready"
    assert {name: part["status"] for name, part in body["checks"].items()} == {
        "catalog": "ok",
        "dagster": "not_configured",
        "qdrant": "down",
    }
    good = app_with(qdrant_url=qdrant_url).get("/ready")
    assert (good.status_code, good.json()["status"]) == (200, "ready")
    down = app_with(qdrant_url=qdrant_url, dagster_url="http://127.0.0.1:1").get("/ready")
    assert (down.status_code, code_of(down)) == (503, "orchestrator_unavailable")


def test_a_wrong_qdrant_key_is_not_ready(app_with: Callable[..., TestClient], guarded_qdrant: str) -> None:
    for key, status in (("the-key", "ready"), ("another", "not_ready"), (None, "not_ready")):
        secret = SecretStr(key) if key else None
        body = app_with(qdrant_url=guarded_qdrant, qdrant_api_key=secret).get("/ready").json()
        assert body["status"] == status, key
        if status != "ready":
            assert "key" in body["checks"]["qdrant"]["error"]


def test_the_process_imports_no_dagster_and_no_sdk() -> None:
    script = """
import sys
from api.app import create_app
from pydantic import SecretStr
from embedd_dagster.settings import Settings
from embedd_dagster.catalog.secrets import new_encryption_key
app = create_app(Settings(database_url='postgresql://x', encryption_keys=new_encryption_key(), qdrant_url='http://x'))
from fastapi.testclient import TestClient
with TestClient(app) as client:
    assert client.get('/openapi.json').status_code == 200
heavy = {'dagster', 'qdrant_client', 'openai', 'onnxruntime', 'tokenizers', 'snowflake'} & set(sys.modules)
print(heavy or '')
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "", (done.stdout, done.stderr)
    assert done.returncode == 0
