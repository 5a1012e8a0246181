"""Embedding providers: made, tested, never showing a key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.tenants import Tenant, code_of
from tests.support.openai_server import RunningServer, running_openai_server

PATH = "/v1/embedding-providers"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_openai_server(api_key="sk-right") as running:
        yield running


def test_life(tenant: Tenant, server: RunningServer) -> None:
    body = {
        "name": "loopback",
        "provider": "openai",
        "credentials": {"api_key": "sk-wrong", "base_url": server.base_url},
        "limits": {"concurrency": 2},
    }
    made = tenant.made(PATH, body)
    assert set(made) == {
        "id", "org_id", "environment_id", "name", "provider", "base_url", "limits", "status", "last_error", "tested_at",
        "created_at", "updated_at",
    }  # fmt: skip
    assert (made["base_url"], made["limits"]) == (server.base_url, {"concurrency": 2})
    path = f"{PATH}/{made['id']}"
    failed = tenant.post(f"{path}/test", {"embedding_model": "text-embedding-3-small"})
    assert (failed.status_code, failed.json()["status"]) == (200, "failed")
    assert "sk-" not in failed.text
    changed = {"credentials": {"api_key": "sk-right", "base_url": server.base_url}, "limits": {}, "name": "other"}
    assert tenant.put(path, changed).json()["limits"] == {}
    assert tenant.post(f"{path}/test").json()["status"] == "ok"
    assert tenant.post(f"{path}/test", {"embedding_model": "mine"}).status_code == 422
    assert tenant.post(f"{path}/test", {"embedding_model": "mine", "embedding_dimensions": 8}).json()["status"] in (
        "ok",
        "failed",
    )
    assert "sk-right" not in tenant.get(path).text + tenant.get(PATH).text
    assert tenant.delete(path).status_code == 204
    assert code_of(tenant.get(path)) == "embedding_provider_not_found"


def test_the_local_model_is_there(tenant: Tenant) -> None:
    assert tenant.post(f"{PATH}/{tenant.provider()['id']}/test").json()["status"] == "ok"


def test_a_model_of_ones_own_server_is_taken_at_its_word(tenant: Tenant, server: RunningServer) -> None:
    body = {"name": "own", "provider": "openai", "credentials": {"base_url": server.base_url}}
    provider = tenant.made(PATH, body)
    changes = {"embedding_provider_id": provider["id"], "embedding_model": "mine", "embedding_dimensions": 64}
    assert tenant.table(**changes)["embedding_dimensions"] == 64


BAD: list[tuple[dict[str, Any], str]] = [
    ({"provider": "cohere"}, "provider"),
    ({"provider": "openai"}, "credentials.api_key"),
    ({"provider": "openai", "credentials": {"api_key": ""}}, "credentials.api_key"),
    ({"provider": "openai", "credentials": {"api_key": "a b"}}, "credentials.api_key"),
    ({"provider": "openai", "credentials": {"api_key": None}}, "credentials.api_key"),
    ({"provider": "openai", "credentials": {"api_key": "k", "base_url": "ftp://x"}}, "credentials.base_url"),
    ({"provider": "openai", "credentials": {"api_key": "k", "base_url": "http://"}}, "credentials.base_url"),
    ({"provider": "openai", "credentials": {"api_key": "k", "base_url": "http://u:p@x/v1"}}, "credentials.base_url"),
    ({"provider": "openai", "credentials": {"api_key": "k", "base_url": "http://[::1"}}, "credentials.base_url"),
    ({"provider": "openai", "credentials": {"base_url": "http://x/v1%0a"}}, "credentials.base_url"),
    ({"provider": "gemini", "credentials": {"base_url": "http://x/v1%0D%0A"}}, "credentials.base_url"),
    ({"provider": "voyage", "credentials": {"base_url": "http://x/%zz"}}, "credentials.base_url"),
    ({"provider": "openai", "credentials": {"base_url": "http://x:65536/v1"}}, "credentials.base_url"),
    ({"provider": "openai", "credentials": {"base_url": "http://169.254.169.254/latest"}}, "metadata"),
    ({"provider": "openai", "credentials": {"base_url": "http://[fd00:ec2::254]/"}}, "metadata"),
    ({"provider": "local", "credentials": {"api_key": "k"}}, "credentials.api_key"),
    ({"provider": "local", "limits": {"concurrency": 0}}, "limits.concurrency"),
    ({"provider": "local", "limits": {"concurrency": "2"}}, "limits.concurrency"),
    ({"provider": "local", "limits": {"per_day": 1}}, "per_day"),
]


@pytest.mark.parametrize(("body", "says"), BAD, ids=range(len(BAD)))
def test_bad_providers_are_refused(tenant: Tenant, body: dict[str, Any], says: str) -> None:
    response = tenant.post(PATH, {"name": "bad", **body})
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert says in response.json()["error"]["message"]
    assert tenant.get(PATH).json()["data"] == []


def test_the_catalog_of_models(tenant: Tenant) -> None:
    listed = tenant.get("/v1/embedding-models").json()
    models = {model["model"]: model for model in listed["data"]}
    assert models["text-embedding-3-small"]["accepted_dimensions"] == "1 to 1536"
    assert listed["pagination"]["has_more"] is False


BATCHING = {"max_batch_items": 32, "max_batch_tokens": 8192, "request_timeout_seconds": 120, "max_input_tokens": 512}


def test_limits_of_an_own_server_are_kept(tenant: Tenant) -> None:
    body = {
        "name": "own",
        "provider": "openai",
        "credentials": {"base_url": "http://127.0.0.1:9/v1"},
        "limits": BATCHING,
    }
    made = tenant.made("/v1/embedding-providers", body)
    assert tenant.get(f"/v1/embedding-providers/{made['id']}").json()["limits"] == BATCHING


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_batch_items", 0), ("max_batch_items", 2049), ("max_batch_tokens", 15), ("request_timeout_seconds", 0),
        ("request_timeout_seconds", 3601), ("max_input_tokens", 15), ("max_input_tokens", 1_000_001),
    ],
)  # fmt: skip
def test_a_limit_out_of_its_range_is_named(tenant: Tenant, name: str, value: int) -> None:
    body = {
        "name": "own",
        "provider": "openai",
        "credentials": {"base_url": "http://127.0.0.1:9/v1"},
        "limits": {name: value},
    }
    response = tenant.post("/v1/embedding-providers", body)
    assert response.status_code == 422
    assert name in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["request_timeout_seconds", "max_input_tokens"])
def test_the_local_provider_takes_no_limit_that_it_cannot_keep(tenant: Tenant, name: str) -> None:
    response = tenant.post("/v1/embedding-providers", {"name": "l", "provider": "local", "limits": {name: 100}})
    assert response.status_code == 422
    assert f"limits.{name}" in response.json()["error"]["message"]
