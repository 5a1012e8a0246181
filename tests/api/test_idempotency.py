"""`Idempotency-Key`: a request sent twice takes effect once, also if another process gets it or one dies in between."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import URL, Engine, event

from embedd_dagster.catalog import environments, idempotency
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.migrate import upgrade
from embedd_dagster.catalog.rotation import rotate_encryption
from embedd_dagster.catalog.secrets import SecretBox, new_encryption_key
from embedd_dagster.catalog.tables import Environment
from embedd_dagster.engine import validation
from embedd_dagster.errors import NotReady, SourceUnavailable
from embedd_dagster.settings import Settings
from tests.api.tenants import Tenant, code_of, unique
from tests.api.test_deadlines import Hung, hung
from tests.api.test_query import Built
from tests.support.openai_server import RunningServer, running_openai_server
from tests.support.request_and_die import POINTS

__all__ = ["hung"]

TAKES_A_KEY = {
    "create_environment", "create_api_key", "create_postgresql_connection", "create_embedding_provider",
    "create_vector_table", "start_backfill", "start_sync", "retry_failed_rows",
}  # fmt: skip


def _key(value: str | None = None) -> dict[str, Any]:
    return {"headers": {"Idempotency-Key": value or uuid4().hex}}


def _replayed(response: httpx.Response) -> bool:
    return response.headers.get("idempotency-replayed") == "true"


@pytest.fixture
def box(settings: Settings) -> SecretBox:
    return SecretBox([key.get_secret_value() for key in settings.encryption_keys])


@pytest.fixture
def rows(catalog_url: str, tenant: Tenant) -> Callable[..., list[tuple[Any, ...]]]:
    """What the catalog remembers of this tenant, after a statement about it."""

    def run(then: str = "") -> list[tuple[Any, ...]]:
        own = "environment_id IN (SELECT id FROM environments WHERE org_id = %s)"
        with psycopg.connect(catalog_url, autocommit=True) as connection:
            if then:
                assert connection.execute(f"UPDATE idempotency_keys SET {then} WHERE {own}", [tenant.org_id]).rowcount
            return connection.execute(f"SELECT * FROM idempotency_keys WHERE {own}", [tenant.org_id]).fetchall()

    return run


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_openai_server() as running:
        yield running


def test_the_openapi_says_where_it_is_taken(client: TestClient) -> None:
    assert isinstance(client.app, FastAPI)
    found = set()
    for path, methods in client.app.openapi()["paths"].items():
        for method, operation in methods.items():
            headers = {p["name"].lower(): p for p in operation.get("parameters", []) if p["in"] == "header"}
            if "idempotency-key" not in headers:
                continue
            found.add(operation["operationId"])
            assert headers["idempotency-key"]["required"] is False
            assert "24 hours" in headers["idempotency-key"]["description"]
            assert "idempotency_key_in_use" in operation["responses"]["409"]["description"], (method, path)
            good = next(answer for status, answer in operation["responses"].items() if status.startswith("2"))
            assert "Idempotency-Replayed" in good["headers"]
            assert good["content"], "the answer's schema is still there"
    assert found == TAKES_A_KEY


@pytest.mark.parametrize("what", ["environments", "api-keys", "connections", "embedding-providers", "vector-tables"])
def test_what_is_created_is_created_once(tenant: Tenant, what: str) -> None:
    path = "/v1/providers/postgresql/connections" if what == "connections" else f"/v1/{what}"
    body = {
        "environments": lambda: {"name": unique("env")},
        "api-keys": lambda: {"name": unique("key")},
        "connections": lambda: {"name": unique("conn"), "mode": "managed", "credentials": tenant.credentials},
        "embedding-providers": lambda: {"name": unique("ep"), "provider": "local"},
        "vector-tables": tenant.table_body,
    }[what]()
    key = _key()
    first = tenant.post(path, body, **key)
    assert (first.status_code, _replayed(first)) == (201, False), first.text
    again = tenant.post(path, body, **key)
    assert (again.status_code, _replayed(again)) == (201, True), again.text
    assert again.content == first.content
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    listed = [row["name"] for row in tenant.get(f"/v1/{what}").json()["data"]]
    assert Counter(listed)[body["name"]] == 1
    # without the key it is another request
    other = tenant.post(path, body)
    assert other.status_code == (201 if what == "api-keys" else 409)


def test_what_is_started_is_started_once(
    tenant: Tenant, app_with: Callable[..., TestClient], server: RunningServer, qdrant_url: str
) -> None:
    tenant.client = app_with(qdrant_url=qdrant_url)
    built = Built(tenant, server)
    for what in ("backfill", "sync", "failed-rows/retry"):
        key = _key()
        first = tenant.post(f"{built.path}/{what}", **key)
        assert (first.status_code, _replayed(first)) == (200, False), first.text
        # while it is queued and after it has ended
        for _ in range(2):
            again = tenant.post(f"{built.path}/{what}", **key)
            assert (again.status_code, again.content, _replayed(again)) == (200, first.content, True)
            if (tenant.get(f"/v1/tasks/{first.json()['task_id']}").json())["status"] == "pending":
                built.run(first.json()["task_id"])
    assert len(tenant.get("/v1/tasks").json()["data"]) == 4


def test_another_body_is_refused_and_the_first_answer_stays(tenant: Tenant) -> None:
    key, body = _key(), {"name": unique("env")}
    first = tenant.post("/v1/environments", body, **key)
    for other in ({"name": unique("env")}, {"name": body["name"] + " "}):
        response = tenant.post("/v1/environments", other, **key)
        assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert "another body" in tenant.post("/v1/environments", {"name": unique("env")}, **key).json()["error"]["message"]
    # what is compared is bytes
    spaced = tenant.post("/v1/environments", content=f'{{"name":  "{body["name"]}"}}', headers={
        **key["headers"], "Content-Type": "application/json"})  # fmt: skip
    assert code_of(spaced) == "validation_error"
    assert tenant.post("/v1/environments", body, **key).content == first.content


def test_a_key_is_of_one_environment_and_one_path(tenant: Tenant, other: Tenant) -> None:
    key, body, provider = _key(), {"name": "same"}, {"name": "same", "provider": "local"}
    staging = tenant.made("/v1/environments", {"name": "staging"})["id"]
    answers = [
        tenant.post("/v1/embedding-providers", provider, **key),
        tenant.post("/v1/embedding-providers", provider, environment=staging, **key),
        other.post("/v1/embedding-providers", provider, **key),
        tenant.post("/v1/environments", body, **key),
    ]
    assert [(answer.status_code, _replayed(answer)) for answer in answers] == [(201, False)] * 4
    assert len({answer.content for answer in answers}) == 4
    # any key with permission `full` of the same environment gets the same answer
    again = tenant.post("/v1/embedding-providers", provider, key=tenant.new_key(), **key)
    assert (again.content, _replayed(again)) == (answers[0].content, True)


def test_a_new_api_key_is_only_told_again_to_the_key_that_asked_for_it(tenant: Tenant) -> None:
    key, body = _key(), {"name": "secret"}
    first = tenant.post("/v1/api-keys", body, **key)
    foreign = tenant.post("/v1/api-keys", body, key=tenant.new_key(), **key)
    assert (foreign.status_code, _replayed(foreign)) == (201, False)
    assert foreign.json()["key"] != first.json()["key"]
    again = tenant.post("/v1/api-keys", body, **key)
    assert (again.content, _replayed(again)) == (first.content, True)


def test_it_goes_with_its_environment(tenant: Tenant, rows: Callable[..., list[Any]]) -> None:
    staging = tenant.made("/v1/environments", {"name": "staging"})["id"]
    assert tenant.post("/v1/api-keys", {"name": "k"}, environment=staging, **_key()).status_code == 201
    assert len(rows()) == 1
    assert tenant.delete(f"/v1/environments/{staging}").status_code == 204
    assert rows() == []


@pytest.mark.parametrize("value", ["", " ", "x" * 256, "ü", "a\tb", "a\x7fb"])
def test_what_is_no_key(tenant: Tenant, rows: Callable[..., list[Any]], value: str) -> None:
    raw = {"Idempotency-Key": value.encode()}
    response = tenant.post("/v1/environments", {"name": unique("env")}, headers=raw)
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert "dempotency-" in response.json()["error"]["message"]
    assert rows() == []


@pytest.mark.parametrize("value", ["x", "x" * 255, "!~", 'a "quoted" one; with=everything, {}', "' OR 1=1 --"])
def test_what_is_a_key(tenant: Tenant, value: str) -> None:
    body = {"name": unique("env")}
    assert tenant.post("/v1/environments", body, **_key(value)).status_code == 201
    assert _replayed(tenant.post("/v1/environments", body, **_key(value)))


def test_elsewhere_the_header_means_nothing(tenant: Tenant, rows: Callable[..., list[Any]]) -> None:
    provider = tenant.provider()["id"]
    for value in ("fine", "ü".encode(), "x" * 1000):
        headers = {"headers": {"Idempotency-Key": value}}
        for _ in range(2):
            assert tenant.get("/v1/environments", **headers).status_code == 200
            assert tenant.post(f"/v1/embedding-providers/{provider}/test", **headers).status_code == 200
            response = tenant.put(f"/v1/embedding-providers/{provider}", {"name": unique("ep")}, **headers)
            assert response.status_code == 200
    assert rows() == []


class TestWhatIsRemembered:
    """What the operation decided; what was refused before it began, and what failed on the way, is not."""

    def test_refusals_of_the_operation(self, tenant: Tenant, rows: Callable[..., list[Any]]) -> None:
        name = unique("env")
        made = tenant.made("/v1/environments", {"name": name})
        key = _key()
        first = tenant.post("/v1/environments", {"name": name}, **key)
        assert (first.status_code, code_of(first)) == (409, "name_conflict")
        tenant.delete(f"/v1/environments/{made['id']}")
        again = tenant.post("/v1/environments", {"name": name}, **key)
        assert (again.status_code, code_of(again), _replayed(again)) == (409, "name_conflict", True)
        for part in ("message", "resolution", "docs_url"):
            assert again.json()["error"][part] == first.json()["error"][part]
        assert tenant.post("/v1/environments", {"name": name}, **_key()).status_code == 201
        key = _key()
        for replayed in (False, True):
            response = tenant.post(f"/v1/vector-tables/vt_{'0' * 26}/backfill", **key)
            assert (code_of(response), _replayed(response)) == ("vector_table_not_found", replayed)
        assert len(rows()) == 3

    def test_what_depends_on_the_state_of_things(self, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise NotReady("not tested", code="connection_not_ready")

        key, body = _key(), tenant.table_body()
        with monkeypatch.context() as patched:
            patched.setattr(validation, "validate_vector_table", refuse)
            assert code_of(tenant.post("/v1/vector-tables", body, **key)) == "connection_not_ready"
        again = tenant.post("/v1/vector-tables", body, **key)
        assert (again.status_code, code_of(again), _replayed(again)) == (422, "connection_not_ready", True)
        assert tenant.post("/v1/vector-tables", body, **_key()).status_code == 201

    def test_a_body_that_is_not_accepted_may_be_corrected(self, tenant: Tenant, rows: Callable[..., list[Any]]) -> None:
        key = _key()
        for body in ({}, {"name": "Not Accepted"}, {"name": "x", "more": 1}):
            assert code_of(tenant.post("/v1/environments", body, **key)) == "validation_error"
        headers = {**key["headers"], "Content-Type": "application/json"}
        malformed = tenant.post("/v1/environments", content=b"{", headers=headers)
        assert code_of(malformed) == "validation_error"
        large = tenant.post("/v1/environments", content=b" " * (2 * 2**20 + 1), headers=headers)
        assert code_of(large) == "payload_too_large"
        chunked = tenant.post("/v1/environments", content=iter([b" " * 2**20] * 3), headers=headers)
        assert code_of(chunked) == "payload_too_large"
        assert rows() == []
        body = b'{"name": "chunked"}'
        streamed = tenant.post("/v1/environments", content=iter([body[:5], body[5:]]), headers=headers)
        assert (streamed.status_code, _replayed(streamed)) == (201, False)
        assert _replayed(tenant.post("/v1/environments", content=body, headers=headers))

    def test_nothing_for_who_may_not(
        self, tenant: Tenant, rows: Callable[..., list[Any]], app_with: Callable[..., TestClient]
    ) -> None:
        key, body = _key(), {"name": unique("key")}
        for caller in (tenant.new_key("read_only"), "sk_" + "A" * 43):
            assert tenant.post("/v1/api-keys", body, key=caller, **key).status_code in (401, 403)
        restricted = tenant.new_key(environment_id=tenant.environment_id)
        assert code_of(tenant.post("/v1/environments", body, key=restricted, **key)) == "permission_denied"
        tenant.client = app_with(rate_limit_per_minute=1)
        busy = tenant.new_key()
        tenant.get("/v1/tasks", key=busy)
        assert tenant.post("/v1/api-keys", body, key=busy, **key).status_code == 429
        assert rows() == []

    def test_a_read_only_key_gets_no_answer_of_a_full_one(self, tenant: Tenant) -> None:
        key, body = _key(), {"name": unique("key")}
        assert tenant.post("/v1/api-keys", body, **key).status_code == 201
        response = tenant.post("/v1/api-keys", body, key=tenant.new_key("read_only"), **key)
        assert (response.status_code, code_of(response)) == (403, "permission_denied")

    def test_a_failure_may_be_tried_again(
        self, tenant: Tenant, rows: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise SourceUnavailable("down")

        def break_down(*_: Any, **__: Any) -> None:
            raise RuntimeError("a fault")

        key, body = _key(), tenant.table_body()
        for fault, status in ((fail, 503), (break_down, 500)):
            with monkeypatch.context() as patched:
                patched.setattr(validation, "validate_vector_table", fault)
                assert tenant.post("/v1/vector-tables", body, **key).status_code == status
            assert rows() == []
        response = tenant.post("/v1/vector-tables", body, **key)
        assert (response.status_code, _replayed(response)) == (201, False)


class TestAtOnce:
    def test_one_of_many_does_it(self, tenant: Tenant, app_with: Callable[..., TestClient]) -> None:
        """Over two applications, as the catalog is the arbiter: nothing is shared but that."""
        clients = [tenant.client, app_with()]
        key, body = _key(), {"name": unique("key")}
        headers = {"Authorization": f"Bearer {tenant.key}", **key["headers"]}
        gate = threading.Barrier(12)
        found: list[httpx.Response] = []

        def send(number: int) -> None:
            gate.wait()
            found.append(clients[number % 2].post("/v1/api-keys", json=body, headers=headers))

        threads = [threading.Thread(target=send, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        good = [response for response in found if response.status_code == 201]
        assert sum(not _replayed(response) for response in good) == 1
        assert len({response.content for response in good}) == 1
        for response in found:
            if response.status_code != 201:
                assert (response.status_code, code_of(response)) == (409, "idempotency_key_in_use")
                assert response.headers["retry-after"] == "1"
        listed = [row["name"] for row in tenant.get("/v1/api-keys?limit=100").json()["data"]]
        assert Counter(listed)[body["name"]] == 1
        assert tenant.post("/v1/api-keys", body, **key).content == good[0].content

    def test_while_the_first_is_at_work_the_others_are_told_to_wait(
        self, tenant: Tenant, app_with: Callable[..., TestClient], hung: Hung, rows: Callable[..., list[Any]]
    ) -> None:
        tenant.client = app_with(request_timeout_seconds=1.5)
        credentials = {**tenant.credentials, "port": hung.port}
        body = {"name": unique("conn"), "mode": "managed", "credentials": credentials}
        key = _key()
        first: list[httpx.Response] = []
        path = "/v1/providers/postgresql/connections"
        thread = threading.Thread(target=lambda: first.append(tenant.post(path, body, **key)))
        thread.start()
        while not rows():
            assert thread.is_alive()
        seen = set()
        while thread.is_alive():
            # the connection is there already, and its test is not over
            response = tenant.post(path, body, **key)
            seen.add((response.status_code, None if response.is_success else code_of(response)))
            time.sleep(0.05)
        thread.join()
        assert (409, "idempotency_key_in_use") in seen
        assert seen <= {(409, "idempotency_key_in_use"), (201, None)}
        again = tenant.post(path, body, **key)
        assert (again.content, _replayed(again)) == (first[0].content, True)
        assert again.json()["status"] == "failed"


class TestDeath:
    """A process that dies leaves either the work and its answer, or neither."""

    @staticmethod
    def _claim(tenant: Tenant, catalog: Catalog, box: SecretBox, key: str, body: bytes, seconds: float) -> Any:
        with catalog.transaction() as session:
            return idempotency.claim(
                session, box, environment_id=tenant.environment_id, operation="POST /v1/environments", key=key,
                request_hash=hashlib.sha256(body).digest(), lease=timedelta(seconds=seconds),
            )  # fmt: skip

    def test_a_claim_holds_no_longer_than_its_lease(self, tenant: Tenant, catalog: Catalog, box: SecretBox) -> None:
        headers = {"Idempotency-Key": "k", "Content-Type": "application/json"}
        body = b'{"name": "after-a-death"}'
        assert isinstance(self._claim(tenant, catalog, box, "k", body, 1.0), idempotency.Claim)
        response = tenant.post("/v1/environments", content=body, headers=headers)
        assert (response.status_code, code_of(response)) == (409, "idempotency_key_in_use")
        time.sleep(1.1)
        response = tenant.post("/v1/environments", content=body, headers=headers)
        assert (response.status_code, _replayed(response)) == (201, False)

    @pytest.mark.parametrize("point", POINTS)
    def test_a_process_that_is_killed_leaves_the_work_with_its_answer_or_neither(
        self, point: str, tenant: Tenant, settings: Settings
    ) -> None:
        environment = {
            **os.environ,
            "EMBEDD_DATABASE_URL": settings.database_url.get_secret_value(),
            "EMBEDD_ENCRYPTION_KEYS": settings.encryption_keys[0].get_secret_value(),
            "EMBEDD_QDRANT_URL": settings.qdrant_url,
            "EMBEDD_REQUEST_TIMEOUT_SECONDS": "0.5",
        }
        name, key = unique("key"), uuid4().hex
        program = [sys.executable, "-m", "tests.support.request_and_die", point, tenant.key, key, name]
        ended = subprocess.run(program, env=environment, capture_output=True, timeout=60, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        deadline = time.monotonic() + 3  # the lease is three times the timeout
        while (response := tenant.post("/v1/api-keys", {"name": name}, **_key(key))).status_code == 409:
            assert code_of(response) == "idempotency_key_in_use"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (response.status_code, _replayed(response)) == (201, point == "before:exit")
        listed = [row["id"] for row in tenant.get("/v1/api-keys").json()["data"] if row["name"] == name]
        assert listed == [response.json()["api_key"]["id"]]
        assert tenant.get("/v1/tasks", key=response.json()["key"]).status_code == 200

    def test_who_lost_its_lease_undoes_its_work(self, tenant: Tenant, catalog: Catalog, box: SecretBox) -> None:
        slow = self._claim(tenant, catalog, box, "k", b"", 0.0)
        fast = self._claim(tenant, catalog, box, "k", b"", 30.0)
        assert isinstance(fast, idempotency.Claim)

        def create(claimed: idempotency.Claim, name: str) -> None:
            with catalog.transaction() as session:
                environments.create(session, tenant.org_id, name)
                idempotency.keep(session, box, claimed, {"status": 201, "body": name})

        with pytest.raises(idempotency.KeyInUse):
            create(slow, "of-the-slow")
        with catalog.transaction() as session:
            idempotency.keep_error(session, box, slow, {"code": "x", "message": "x", "resolution": "x"})
            idempotency.release(session, slow)
        create(fast, "of-the-fast")
        assert self._claim(tenant, catalog, box, "k", b"", 30.0) == {"status": 201, "body": "of-the-fast"}
        names = {row["name"] for row in tenant.get("/v1/environments").json()["data"]}
        assert names == {"prod", "of-the-fast"}

    def test_after_the_creation_and_before_its_test(
        self, tenant: Tenant, monkeypatch: pytest.MonkeyPatch, rows: Callable[..., list[Any]]
    ) -> None:
        def die(*_: Any, **__: Any) -> None:
            raise RuntimeError("the process is gone")

        key = _key()
        body = {"name": unique("conn"), "mode": "managed", "credentials": tenant.credentials}
        with monkeypatch.context() as patched:
            patched.setattr(validation, "check_connection", die)
            assert tenant.post("/v1/providers/postgresql/connections", body, **key).status_code == 500
        again = tenant.post("/v1/providers/postgresql/connections", body, **key)
        assert (again.status_code, _replayed(again), again.json()["status"]) == (201, True, "pending")
        assert tenant.get(f"/v1/connections/{again.json()['id']}").status_code == 200
        # as a death leaves it: the lease runs on, and the answer counts when it is over
        rows("locked_until = now() + interval '1 minute'")
        assert tenant.post("/v1/providers/postgresql/connections", body, **key).status_code == 409
        rows("locked_until = now()")
        assert tenant.post("/v1/providers/postgresql/connections", body, **key).content == again.content

    def test_the_work_is_undone_where_the_answer_cannot_be_kept(
        self, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("the process is gone")

        key, body = _key(), {"name": unique("key")}
        with monkeypatch.context() as patched:
            patched.setattr(idempotency, "keep", fail)
            assert tenant.post("/v1/api-keys", body, **key).status_code == 500
        assert body["name"] not in {row["name"] for row in tenant.get("/v1/api-keys").json()["data"]}
        assert tenant.post("/v1/api-keys", body, **key).status_code == 201


def test_after_a_day_it_is_forgotten(tenant: Tenant, rows: Callable[..., list[Any]], catalog_url: str) -> None:
    bodies = [({"name": unique("key")}, _key()) for _ in range(3)]
    for body, key in bodies:
        assert tenant.post("/v1/api-keys", body, **key).status_code == 201
    with psycopg.connect(catalog_url) as connection:
        left = connection.execute(
            "SELECT min(expires_at - now()), max(expires_at - now()) FROM idempotency_keys WHERE environment_id = %s",
            [tenant.environment_id],
        ).fetchone()
    assert left is not None
    assert timedelta(hours=23, minutes=58) < left[0] <= left[1] <= timedelta(hours=24)
    rows("expires_at = now()")
    # the same key with another body: another request now; the old rows go with it
    body, key = {"name": unique("key")}, bodies[0][1]
    response = tenant.post("/v1/api-keys", body, **key)
    assert (response.status_code, _replayed(response)) == (201, False)
    assert len(rows()) == 1


def test_old_rows_are_found_by_an_index(catalog_url: str) -> None:
    with psycopg.connect(catalog_url) as connection:
        connection.execute("SET LOCAL enable_seqscan = off")
        plan = connection.execute(
            "EXPLAIN SELECT id FROM idempotency_keys WHERE expires_at <= clock_timestamp() ORDER BY expires_at LIMIT 20"
        ).fetchall()
    assert "ix_idempotency_keys_expires_at" in str(plan)


def test_no_answer_and_no_body_is_in_the_catalog_in_clear(
    tenant: Tenant, rows: Callable[..., list[tuple[Any, ...]]]
) -> None:
    raw = tenant.post("/v1/api-keys", {"name": "k"}, **_key("of-the-caller")).json()["key"]
    credentials = {**tenant.credentials, "password": "short"}
    body = {"name": unique("conn"), "mode": "managed", "credentials": credentials}
    connection = tenant.post("/v1/providers/postgresql/connections", body, **_key())
    assert len(rows()) == 2
    stored = b"".join(value if isinstance(value, bytes) else str(value).encode() for row in rows() for value in row)
    for secret in (raw, raw[3:], "of-the-caller", connection.json()["name"]):
        assert secret.encode() not in stored
        assert hashlib.sha256(secret.encode()).hexdigest().encode() not in stored
    # not even as a hash, from which a short password could be guessed
    sent = connection.request.content
    assert hashlib.sha256(sent).digest() not in stored
    assert hashlib.sha256(sent).hexdigest().encode() not in stored


def test_an_answer_opens_in_its_own_row_alone(tenant: Tenant, rows: Callable[..., list[tuple[Any, ...]]]) -> None:
    body = {"name": "k"}
    for key in ("a", "b"):
        tenant.post("/v1/api-keys", body, **_key(key))
    rows("answer = (SELECT answer FROM idempotency_keys i WHERE i.id <> idempotency_keys.id"
         " AND i.environment_id = idempotency_keys.environment_id)")  # fmt: skip
    response = tenant.post("/v1/api-keys", body, **_key("a"))
    assert (response.status_code, _replayed(response)) == (201, False)


class TestRotation:
    def test_answers_survive_it(self, database_url: str, source: URL, app_with: Callable[..., TestClient]) -> None:
        old, new = new_encryption_key(), new_encryption_key()
        upgrade(database_url)
        catalog = Catalog(database_url)
        own = {"database_url": SecretStr(database_url)}
        tenant = Tenant.create(app_with(**own, encryption_keys=(SecretStr(old),)), catalog, source)
        key, body = _key(), {"name": unique("key")}
        first = tenant.post("/v1/api-keys", body, **key)
        assert rotate_encryption(catalog, SecretBox([new, old]))["idempotency_keys"] == 1
        catalog.close()
        tenant.client = app_with(**own, encryption_keys=(SecretStr(new),))
        again = tenant.post("/v1/api-keys", body, **key)
        assert (again.content, _replayed(again)) == (first.content, True)

    def test_what_no_key_opens_is_forgotten(self, tenant: Tenant, catalog: Catalog) -> None:
        with catalog.transaction() as session:
            environment = session.get_one(Environment, tenant.environment_id)
            idempotency.claim(
                session, SecretBox([new_encryption_key()]), environment_id=environment.id,
                operation="POST /v1/api-keys", key="lost", request_hash=b"x", lease=timedelta(minutes=5),
            )  # fmt: skip
        response = tenant.post("/v1/api-keys", {"name": "k"}, **_key("lost"))
        assert (response.status_code, _replayed(response)) == (201, False)


def test_without_the_header_the_catalog_is_asked_nothing_more(tenant: Tenant) -> None:
    asked: list[str] = []

    def listen(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", listen)
    try:
        assert tenant.post("/v1/api-keys", {"name": "k"}).status_code == 201
        plain = len(asked)
        assert not any("idempotency_keys" in statement for statement in asked)
        assert tenant.post("/v1/api-keys", {"name": "k"}, **_key()).status_code == 201
        assert len(asked) == plain * 2 + 3, "claimed, purged, kept"
    finally:
        event.remove(Engine, "before_cursor_execute", listen)
