"""The estimate over the API, where there are vectors already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.tenants import COLUMNS, Tenant
from tests.api.test_query import Built
from tests.support.openai_server import RunningServer, running_openai_server


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_openai_server() as running:
        yield running


@pytest.mark.parametrize("mode", ["managed", "platform"])
def test_what_would_be_reused(
    mode: str, tenant: Tenant, app_with: Callable[..., TestClient], server: RunningServer, qdrant_url: str
) -> None:
    tenant.client = app_with(qdrant_url=qdrant_url)
    built = Built(tenant, server, mode)
    embedded = server.stats()["requests"]

    def estimate(**changes: Any) -> tuple[int, int, int]:
        assert tenant.put(built.path, changes).status_code == 200
        found = tenant.post(f"{built.path}/estimate").json()
        assert (found["tokens"] > 0) == (found["rows_to_embed"] > 0)
        return found["rows"], found["rows_reused"], found["rows_to_embed"]

    # other metadata: every text has its vector
    assert estimate(columns=COLUMNS[:3]) == (30, 30, 0)
    # another text in every row
    assert estimate(columns=[{**COLUMNS[0], "name_prefix": "item: "}, *COLUMNS[1:]]) == (30, 0, 30)
    # other dimensions: no vector is of use
    assert estimate(columns=COLUMNS, embedding_dimensions=8) == (30, 0, 30)
    assert server.stats()["requests"] == embedded, "nothing is embedded for an estimate"
