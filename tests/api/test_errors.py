"""One table of codes; every exception becomes an envelope."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import api
from api.error_codes import ERROR_CODES
from api.routers import tasks as tasks_router
from embedd_dagster import errors
from embedd_dagster.errors import EmbeddError
from tests.api.tenants import Tenant, code_of

SPEC_CODES = {
    "unauthorized": 401, "key_revoked": 401, "permission_denied": 403, "source_table_access_denied": 403,
    "environment_not_found": 404, "connection_not_found": 404, "embedding_provider_not_found": 404,
    "vector_table_not_found": 404, "task_not_found": 404, "api_key_not_found": 404, "source_table_not_found": 404,
    "environment_conflict": 409, "connection_conflict": 409, "embedding_provider_conflict": 409, "name_conflict": 409,
    "backfill_in_progress": 409, "sync_already_paused": 409, "sync_not_paused": 409, "validation_error": 422,
    "connection_not_ready": 422, "vector_table_not_ready": 422, "rate_limit_exceeded": 429, "internal_error": 500,
    "embedding_failed": 502, "vector_store_unavailable": 503, "source_unavailable": 503, "orchestrator_unavailable": 503,
}  # fmt: skip
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EmbeddError)]


def test_this_is_our_api() -> None:
    assert api.__file__ is not None
    assert Path(api.__file__) == Path(__file__).parents[2] / "api" / "__init__.py"


def test_every_code_of_the_contract_has_its_status() -> None:
    assert {code: ERROR_CODES[code].status for code in SPEC_CODES} == SPEC_CODES


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_code_with_a_status(kind: type[EmbeddError]) -> None:
    if kind is not errors.NotFound:
        assert kind.default_code in ERROR_CODES


def test_every_code_in_the_sources_is_in_the_table() -> None:
    root = Path(__file__).parents[2]
    used = set()
    for path in [
        *root.glob("api/**/*.py"),
        *root.glob("embedd_dagster/catalog/*.py"),
        *root.glob("embedd_dagster/engine/*.py"),
    ]:
        used |= set(re.findall(r'\bcode="(\w+)"', path.read_text()))
    assert used <= set(ERROR_CODES)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_leaves_as_an_envelope(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch, kind: type[EmbeddError]
) -> None:
    error = kind("vector_table", "vt_1") if kind is errors.NotFound else kind("It failed.", resolution="Do this.")

    def fail(*_arguments: object, **_more: object) -> None:
        raise error

    monkeypatch.setattr(tasks_router.tasks, "page", fail)
    response = tenant.get("/v1/tasks")
    assert response.status_code == ERROR_CODES[error.code].status
    assert code_of(response) == error.code
    if isinstance(error, errors.TransientError):
        assert int(response.headers["retry-after"]) >= 1


def test_a_fault_of_ours_tells_nothing_of_itself(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: object, **_more: object) -> None:
        raise RuntimeError("canary: the content of a row")

    monkeypatch.setattr(tasks_router.tasks, "page", fail)
    response = tenant.get("/v1/tasks")
    assert (response.status_code, code_of(response)) == (500, "internal_error")
    logged = "".join(capsys.readouterr())
    assert response.headers["x-request-id"] in logged
    assert "RuntimeError" in logged
    for text in (response.text, logged):
        assert "canary" not in text
        assert "Traceback" not in text


def test_a_catalog_that_is_down_is_a_503(tenant: Tenant, app_with: Callable[..., TestClient]) -> None:
    from pydantic import SecretStr

    tenant.client = app_with(database_url=SecretStr("postgresql://nobody@127.0.0.1:1/x"))
    response = tenant.get("/v1/tasks")
    assert (response.status_code, code_of(response)) == (503, "catalog_unavailable")
    assert "retry-after" in response.headers


def test_the_page_of_codes(client: TestClient) -> None:
    page = client.get("/docs/errors")
    assert page.status_code == 200
    assert all(f'id="{code}"' in page.text for code in ERROR_CODES)
