"""PostgreSQL servers that freeze in the middle of a connection: what is connected stays so, and no answer ever comes.

Their own timeouts are of no use then, and TCP finds nothing wrong; see `embedd_dagster/deadlines.py`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import psycopg
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import URL, make_url

from embedd_dagster.deadlines import current_deadline, deadline
from embedd_dagster.postgresql import BoundedConnection
from tests.api.tenants import Tenant, code_of, unique
from tests.api.test_query import Built
from tests.support.freezing_proxy import FreezingProxy, freezing_proxy
from tests.support.openai_server import RunningServer, running_openai_server

_PATIENCE = 1.0


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_openai_server() as running:
        yield running


@pytest.fixture
def proxy(source: URL) -> Iterator[FreezingProxy]:
    assert source.port
    with freezing_proxy(source.port) as running:
        yield running


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


def _unavailable(response: httpx.Response, code: str) -> None:
    assert (response.status_code, code_of(response)) == (503, code), response.text
    assert int(response.headers["retry-after"]) >= 1


@pytest.fixture
def impatient(tenant: Tenant, app_with: Callable[..., TestClient], qdrant_url: str) -> Tenant:
    tenant.client = app_with(qdrant_url=qdrant_url, request_timeout_seconds=_PATIENCE)
    return tenant


class TestSource:
    """Frozen by the statement that a request needs, after the login."""

    @pytest.fixture
    def behind(self, impatient: Tenant, proxy: FreezingProxy) -> Tenant:
        impatient.source = impatient.source.set(host="127.0.0.1", port=proxy.port)
        return impatient

    def test_introspection(self, behind: Tenant, proxy: FreezingProxy) -> None:
        connection_id = behind.connection()["id"]
        proxy.freeze_on = b"pg_class"
        with _within(4):
            _unavailable(behind.get(f"/v1/connections/{connection_id}/tables"), "source_unavailable")
        assert proxy.is_frozen
        proxy.thaw()
        assert behind.get(f"/v1/connections/{connection_id}/tables").status_code == 200

    def test_schema_estimate_and_backfill(self, behind: Tenant, proxy: FreezingProxy) -> None:
        path = f"/v1/vector-tables/{behind.table()['id']}"
        for what in ("schema", "estimate"):
            proxy.thaw()
            proxy.freeze_on = b"pg_attribute"
            with _within(4):
                response = behind.get(f"{path}/schema") if what == "schema" else behind.post(f"{path}/estimate")
                _unavailable(response, "source_unavailable")
            assert proxy.is_frozen
        # what only wants an estimate goes on without
        with _within(4):
            assert behind.post(f"{path}/backfill").status_code == 200

    def test_creation_of_a_vector_table(self, behind: Tenant, proxy: FreezingProxy) -> None:
        body = behind.table_body()
        proxy.freeze_on = b"pg_attribute"
        with _within(4):
            _unavailable(behind.post("/v1/vector-tables", body), "source_unavailable")
        assert proxy.is_frozen
        assert behind.get("/v1/vector-tables").json()["data"] == []

    def test_the_test_of_a_connection(self, behind: Tenant, proxy: FreezingProxy) -> None:
        """What it found is written to the catalog, for which there is time left."""
        made = behind.connection("platform")
        assert made["status"] == "connected"
        proxy.freeze_on = b"has_schema_privilege"
        with _within(5):
            tested = behind.post(f"/v1/connections/{made['id']}/test").json()
        assert proxy.is_frozen
        assert (tested["status"], tested["latency_ms"] < 4000) == ("failed", True)
        assert behind.get(f"/v1/connections/{made['id']}").json()["status"] == "failed"

    def test_threads_that_only_estimate_come_back(self, behind: Tenant, proxy: FreezingProxy) -> None:
        """There are four: more frozen sources than that must not use them up."""
        paths = [f"/v1/vector-tables/{behind.table()['id']}" for _ in range(5)]
        proxy.freeze_on = b"pg_attribute"
        for path in paths:
            assert behind.post(f"{path}/backfill").json()["total_rows"] == 0
            proxy.thaw()
            proxy.freeze_on = b"pg_attribute"
        time.sleep(_PATIENCE + 1.5)
        proxy.thaw()
        # an estimate is given only where it comes at once, which on a loaded machine not every one does
        begun = (behind.post(f"/v1/vector-tables/{behind.table()['id']}/backfill") for _ in range(50))
        assert any(response.json()["total_rows"] == 30 for response in begun)


class TestPlatformStore:
    @pytest.fixture
    def built(self, impatient: Tenant, server: RunningServer, proxy: FreezingProxy) -> Built:
        impatient.source = impatient.source.set(host="127.0.0.1", port=proxy.port)
        return Built(impatient, server, "platform")

    def test_queries(self, built: Built, proxy: FreezingProxy) -> None:
        assert built.query(query="x").status_code == 200
        proxy.freeze()
        for _ in range(2):
            with _within(7):
                _unavailable(built.query(query="x"), "vector_store_unavailable")
        proxy.thaw()
        with _within(7):
            assert built.query(query="x").status_code == 200

    def test_a_backend_that_is_stopped(self, built: Built, source: URL) -> None:
        """The server's own process, by a signal; a new connection of the same server answers."""
        assert built.query(query="x").status_code == 200
        with psycopg.connect(source.render_as_string(hide_password=False), autocommit=True) as connection:
            pids = [
                row[0]
                for row in connection.execute(
                    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'embedd'"
                )
            ]
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            with _within(7):
                assert built.query(query="x").status_code in (200, 503)
            with _within(7):
                assert built.query(query="x").status_code == 200
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


def test_the_catalog(tenant: Tenant, app_with: Callable[..., TestClient], catalog_url: str) -> None:
    address = make_url(catalog_url)
    assert address.port
    with freezing_proxy(address.port) as proxy:
        behind = address.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        client = app_with(database_url=SecretStr(behind), request_timeout_seconds=_PATIENCE)
        headers = {"Authorization": f"Bearer {tenant.key}"}
        assert client.get("/v1/tasks", headers=headers).status_code == 200
        proxy.freeze()
        query = f"/v1/vector-tables/vt_{'0' * 26}/query"
        for send in (
            lambda: client.get("/v1/tasks", headers=headers),
            lambda: client.post("/v1/environments", headers=headers, json={"name": unique("env")}),
            lambda: client.post(query, headers=headers, json={"query": "x"}),
        ):
            with _within(9):  # what it was connected by, and a new connection
                _unavailable(send(), "catalog_unavailable")
        proxy.thaw()
        assert client.get("/v1/tasks", headers=headers).status_code == 200


class TestPatience:
    """Apart from the API."""

    @pytest.fixture
    def opened(self, source: URL, proxy: FreezingProxy) -> Iterator[BoundedConnection]:
        url = source.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        connection = BoundedConnection.connect(url, autocommit=True)
        connection.current_deadline = current_deadline
        yield connection
        connection.close()

    def test_one_operation_and_the_connection_is_closed(self, opened: BoundedConnection, proxy: FreezingProxy) -> None:
        with deadline(0.5):
            assert opened.execute("SELECT 1").fetchone() == (1,)
            proxy.freeze()
            with _within(1.5), pytest.raises(psycopg.OperationalError, match="has not answered in time"):
                opened.execute("SELECT 1")
        assert opened.closed

    def test_all_operations_together(self, opened: BoundedConnection) -> None:
        def sleep_and_sleep() -> None:
            for _ in range(10):
                opened.execute("SELECT pg_sleep(0.3)")

        with deadline(1.0), _within(2.0), pytest.raises(psycopg.OperationalError):
            sleep_and_sleep()

    def test_what_takes_no_waiting_is_done_even_when_nothing_is_left(self, opened: BoundedConnection) -> None:
        with deadline(0.0):
            for _ in range(50):
                assert opened.execute("SELECT generate_series(1, 1000)").fetchall()[-1] == (1000,)

    def test_in_a_transaction(self, opened: BoundedConnection, proxy: FreezingProxy) -> None:
        def transact() -> None:
            with opened.transaction():
                opened.execute("SELECT 1")
                proxy.freeze()
                opened.execute("SELECT 1")

        with deadline(0.5), _within(2), pytest.raises(psycopg.OperationalError):
            transact()
        assert opened.closed

    def test_in_the_middle_of_a_copy(self, opened: BoundedConnection, proxy: FreezingProxy) -> None:
        def copy_out() -> None:
            with opened.cursor() as cursor, cursor.copy("COPY (SELECT generate_series(1, 1000000)) TO STDOUT") as copy:
                for number, _ in enumerate(copy.rows()):
                    if number == 1000:
                        proxy.freeze()

        with deadline(0.5), _within(3), pytest.raises(psycopg.OperationalError):
            copy_out()
        assert opened.closed

    def test_without_it_nothing_is_bounded(self, opened: BoundedConnection) -> None:
        opened.execute("SELECT pg_sleep(1.2)")
        with deadline(0.1):
            pass
        opened.execute("SELECT pg_sleep(0.5)")
