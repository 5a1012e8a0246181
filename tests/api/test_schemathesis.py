"""Hypothesis-made requests by the OpenAPI document, with all of schemathesis' checks: no 500, no answer beside the schema.

A short run each time; `make fuzz` makes a long one (FUZZ_EXAMPLES a mode and operation) and records it. Valid requests are
made of the ids of real objects half of the time, so that they get further than to a 404.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.failures import Failure, FailureGroup
from sqlalchemy import URL

from embedd_dagster.catalog.database import Catalog
from tests.api.tenants import COLUMNS, Tenant
from tests.support.openai_server import running_openai_server

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "5"))
RESULT = os.environ.get("FUZZ_RESULT")

# What may be refused though the schema allows it, and why the schema cannot say so.
EXPLAINED = {
    "cursor: ": "only what this API gave is a cursor, which no pattern can say",
    "base_url: ": "what urllib takes for a URL is more than a pattern can say",
    "the local provider takes no credentials": "depends on `provider`",
    "credentials.api_key: required": "depends on `provider` and `base_url`",
    "provider: ": "not every known provider is in every version",
    "embedding_dimensions: ": "depends on the model",
    "embedding_model: ": "depends on the provider",
    "embedding_provider_id: ": "depends on the mode and the connection's provider",
    "columns": "at least one column to embed, none twice in a role, filter_type by role and by the source's type",
    "sync_schedule: ": "what croniter takes for a cron is more than a pattern can say; by sync_mode",
    "sync_interval_seconds: ": "by sync_mode",
    "mode: ": "as the connection's",
    "primary_key_column: ": "as the source's column is",
    "filters": "by the live set's columns",
    "name or address": "what a host may be",
    "a text must not contain": "lone surrogates and NUL inside of `filters`",
    "is not known": "unknown names in `filters`",
}  # fmt: skip
CODES = {"connection_not_ready", "vector_table_not_ready", "source_table_not_found"}


class World:
    """A tenant with one object of each kind, made again where a request has deleted it."""

    def __init__(self, tenant: Tenant, provider_url: str) -> None:
        self.tenant = tenant
        self.connection = tenant.connection()["id"]
        credentials = {"base_url": provider_url}
        body = {"name": uuid4().hex, "provider": "openai", "credentials": credentials}
        self.provider = tenant.made("/v1/embedding-providers", body)["id"]
        self.ids: dict[str, str] = {}

    def id_of(self, parameter: str) -> str:
        """Of an object that is there now."""
        path, make = {
            "environment_id": ("environments", lambda: self.tenant.made("/v1/environments", {"name": uuid4().hex})),
            "api_key_id": ("api-keys", lambda: self.tenant.made("/v1/api-keys", {"name": "k"})["api_key"]),
            "connection_id": ("connections", self.tenant.connection),
            "embedding_provider_id": ("embedding-providers", self.tenant.provider),
            "vector_table_id": ("vector-tables", self._table),
            "task_id": ("tasks", self._task),
        }[parameter]
        known = self.ids.get(parameter)
        if known is None or (path != "api-keys" and self.tenant.get(f"/v1/{path}/{known}").status_code == 404):
            self.ids[parameter] = make()["id"]
        return self.ids[parameter]

    def _table(self) -> dict[str, Any]:
        return self.tenant.table(
            connection_id=self.connection, embedding_provider_id=self.provider, embedding_model="mine",
            embedding_dimensions=16,
        )  # fmt: skip

    def _task(self) -> dict[str, Any]:
        table_id = self._table()["id"]
        return {"id": self.tenant.made(f"/v1/vector-tables/{table_id}/backfill", None)["task_id"]}

    def settle(self, case: Any, choice: random.Random) -> None:
        """Leads a valid request to real objects, sometimes."""
        for parameter in case.path_parameters or {}:
            if choice.random() < 0.6:
                case.path_parameters[parameter] = self.id_of(parameter)
        if isinstance(case.body, dict) and "connection_id" in case.body and choice.random() < 0.8:
            case.body["connection_id"], case.body["embedding_provider_id"] = self.connection, self.provider
            if choice.random() < 0.7:
                case.body.update(source_table="products", primary_key_column="id")
            if choice.random() < 0.7:
                case.body["columns"] = COLUMNS


@pytest.fixture(scope="module")
def world(settings: Any, catalog: Catalog, source: URL, qdrant_url: str) -> Iterator[World]:
    from api.app import create_app

    with running_openai_server() as server:
        app = create_app(settings.model_copy(update={"qdrant_url": qdrant_url, "rate_limit_per_minute": 0}))
        with TestClient(app) as client:
            yield World(Tenant.create(client, catalog, source), server.base_url)


def _at_home(case: Any) -> None:
    """No request makes the service look for a host elsewhere than on loopback."""
    credentials = case.body.get("credentials") if isinstance(case.body, dict) else None
    if isinstance(credentials, dict):
        if isinstance(credentials.get("host"), str):
            credentials["host"] = "127.0.0.1"
        if isinstance(credentials.get("base_url"), str) and credentials["base_url"].startswith("http"):
            credentials["base_url"] = "http://127.0.0.1:1/v1"


def _explained(failure: Failure, response: httpx.Response) -> str | None:
    kind = type(failure).__name__
    if kind == "RejectedPositiveData":
        error = response.json()["error"]
        if error["code"] in CODES:
            return f"code {error['code']}: by the state of things"
        for part, reason in EXPLAINED.items():
            if error["code"] == "validation_error" and part in error["message"]:
                return f"`{part.strip()}`: {reason}"
    if kind == "AcceptedNegativeData":
        parts = [line.strip() for line in failure.message.splitlines() if line.strip().startswith("- ")]
        if parts and all(part.startswith(("- query: violates `additionalProperties`", "- header: ")) for part in parts):
            return "unknown query parameters and headers are ignored, as HTTP has it; the key is always sent"
    return None


def test_every_operation_by_its_schema(world: World) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", world.tenant.client.app)
    headers = {"Authorization": f"Bearer {world.tenant.key}"}
    statuses: Counter[int] = Counter()
    explained: Counter[str] = Counter()
    faults: dict[str, str] = {}
    operations = 0
    choice = random.Random(7)
    begun = time.monotonic()

    def send(case: Any) -> None:
        _at_home(case)
        response = case.call(headers=headers)
        statuses[response.status_code] += 1
        try:
            case.validate_response(response)
        except (Failure, FailureGroup) as error:
            for failure in getattr(error, "exceptions", (error,)):
                reason = _explained(failure, response)
                if reason is None:
                    request = f"{case.method} {case.formatted_path} query={case.query} body={case.body!r}"
                    faults.setdefault(
                        f"{case.operation.label}: {type(failure).__name__}", f"{failure}\n{request}"[:1500]
                    )
                else:
                    explained[reason] += 1

    limits = hypothesis_settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=RESULT is None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    for result in schema.get_all_operations():
        operation = result.ok()
        operations += 1

        @limits
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE))
        def valid(case: Any) -> None:
            world.settle(case, choice)
            send(case)

        @limits
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
        def invalid(case: Any) -> None:
            send(case)

        valid()
        try:
            invalid()
        except Unsatisfiable:  # nothing can be wrong with a request that has no parameters
            continue
    seconds = time.monotonic() - begun
    if RESULT:
        _record(Path(RESULT), operations, statuses, explained, faults, seconds)
    assert not [status for status in statuses if status == 500]
    assert faults == {}, json.dumps(faults, indent=2)
    assert operations > 30


def _record(
    path: Path,
    operations: int,
    statuses: Counter[int],
    explained: Counter[str],
    faults: dict[str, str],
    seconds: float,
) -> None:
    lines = [
        "# schemathesis over the whole OpenAPI", "",
        (f"`make fuzz`, schemathesis {schemathesis.__version__}: {sum(statuses.values()):,} requests over {operations} "
        f"operations in {seconds:.0f} s, valid and invalid ones, all checks on; {len(faults)} faults."), "",
        "| answer | requests |", "|---|---|", *(f"| {status} | {n:,} |" for status, n in sorted(statuses.items())), "",
        "Refused though the schema allows it, or taken though it does not, with the reason:", "",
        "| why | requests |", "|---|---|", *(f"| {reason} | {n:,} |" for reason, n in explained.most_common()), "",
        *(f"- **{name}**: {what}" for name, what in faults.items()),
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")
