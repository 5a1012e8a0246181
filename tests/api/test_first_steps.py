"""What a newcomer meets first: wrong paths, URLs of databases, columns, failed tests and how to mend them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from fastapi.testclient import TestClient

from tests.api.tenants import Tenant, code_of, unique
from tests.support.openai_server import running_openai_server

CREATE = "/v1/providers/postgresql/connections"


def _url(tenant: Tenant, **changes: Any) -> str:
    given = {**tenant.credentials, **changes}
    user, password = quote(given["user"], safe=""), quote(given["password"] or "", safe="")
    return f"postgresql://{user}:{password}@{given['host']}:{given['port']}/{given['database']}"


def test_credentials_may_be_a_url(tenant: Tenant) -> None:
    url = _url(tenant, user="reader", password="p@ss/w:o%rd") + "?sslmode=disable"
    made = tenant.made(CREATE, {"name": "by url", "mode": "managed", "credentials": {"url": url}})
    assert (made["status"], made["last_error"]) == ("connected", None)
    host, port, database = (tenant.credentials[name] for name in ("host", "port", "database"))
    expected = {"host": host, "port": port, "database": database, "user": "reader", "ssl_mode": "disable"}
    assert made["settings"] == expected
    path = f"/v1/connections/{made['id']}"
    changed = tenant.put(path, {"credentials": {"url": _url(tenant)}}).json()
    assert (changed["status"], changed["settings"]["user"]) == ("connected", tenant.credentials["user"])


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://u:SECRET@h/d", "postgresql://"),
        ("postgresql://h/d", "user, host and database"),
        ("postgresql://u:SECRET@/d", "user, host and database"),
        ("postgresql://u:SECRET@h", "user, host and database"),
        ("postgresql://u:SECRET@h/d/e", "user, host and database"),
        ("postgresql://u:SECRET@h/d#x", "user, host and database"),
        ("postgresql://u:SECRET@h:port/d", "cannot be read"),
        ("postgresql://u:SECRET%ff@h/d", "cannot be read"),
        ("postgresql://u:SECRET@h:0/d", "credentials.port"),
        ("postgresql://u:SECRET@h1,h2/d", "credentials.host"),
        ("postgresql://u:SECRET@h1:1,h2:2/d", "cannot be read"),
        ("postgresql://u:SECRET@h/d?host=evil", "only sslmode"),
        ("postgresql://u:SECRET@h/d?options=-c%20x", "only sslmode"),
        ("postgresql://u:SECRET@h/d?sslmode=require&sslmode=disable", "only sslmode"),
        ("postgresql://u:SECRET@h/d?sslmode=maybe", "credentials.ssl_mode"),
        ("postgresql://u:SECRET@h/d?passfile=/etc/passwd", "only sslmode"),
        ("postgresql://u:SECRET@h/ d", "percent-encoded"),
        ("postgresql://u:SECRET@h/d%00", "NUL"),
        (5, "a text is expected"),
    ],
)
def test_a_hostile_or_broken_url_is_refused_and_not_repeated(tenant: Tenant, url: Any, says: str) -> None:
    response = tenant.post(CREATE, {"name": "x", "mode": "managed", "credentials": {"url": url}})
    assert (response.status_code, code_of(response)) == (422, "validation_error"), response.text
    assert says in response.json()["error"]["message"]
    assert "SECRET" not in response.text


def test_a_url_goes_with_no_single_field(tenant: Tenant) -> None:
    for other in ({"host": "h"}, {"password": "SECRET"}):
        body = {"name": "x", "mode": "managed", "credentials": {"url": _url(tenant), **other}}
        response = tenant.post(CREATE, body)
        assert code_of(response) == "validation_error"
        assert f"not with {next(iter(other))!r}" in response.json()["error"]["message"]
        assert "SECRET" not in response.text


def test_a_failed_connections_name_is_a_409_that_says_how_to_mend_it(tenant: Tenant) -> None:
    body = {
        "name": "shop",
        "mode": "managed",
        "credentials": {**tenant.credentials, "password": "wrong", "user": "reader"},
    }
    failed = tenant.made(CREATE, body)
    assert failed["status"] == "failed"
    again = tenant.post(CREATE, {**body, "credentials": tenant.credentials})
    assert code_of(again) == "name_conflict"
    resolution = again.json()["error"]["resolution"]
    assert f"PUT /v1/connections/{failed['id']}" in resolution
    mended = tenant.put(f"/v1/connections/{failed['id']}", {"credentials": {"password": "p@ss/w:o%rd"}}).json()
    assert (mended["status"], mended["last_error"]) == ("connected", None)
    assert mended["settings"] == failed["settings"]
    # the name of one that works is taken, and nothing is to be mended
    assert "PUT" not in tenant.post(CREATE, body).json()["error"]["resolution"]


def test_faults_of_changed_credentials_are_named_by_their_field(tenant: Tenant) -> None:
    path = f"/v1/connections/{tenant.connection()['id']}"
    for credentials, says in (
        ({"host": "h"}, "credentials.database: required"),
        ({"password": 5}, "credentials.password: a text is expected"),
        ({}, "credentials.host: required"),
        (5, "credentials"),
    ):
        response = tenant.put(path, {"credentials": credentials})
        assert code_of(response) == "validation_error"
        assert says in response.json()["error"]["message"]
        assert "~" not in response.json()["error"]["message"]


def test_columns_are_listed_before_there_is_a_vector_table(tenant: Tenant) -> None:
    path = f"/v1/connections/{tenant.connection()['id']}/tables"
    whole = tenant.get(f"{path}/products/columns").json()
    assert [column["name"] for column in whole["data"]] == [
        "id", "title", "description", "category", "price", "in_stock", "tags", "code", "twice"
    ]  # fmt: skip
    assert whole["data"][0] == {
        "name": "id", "type": "integer", "nullable": False, "filter_types": ["float", "integer", "keyword"],
        "can_be_key": True,
    } or whole["data"][0]["can_be_key"]  # fmt: skip
    assert whole["pagination"] == {"limit": 20, "has_more": False, "next_cursor": None}
    names: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = tenant.get(f"{path}/products/columns?limit=4" + (f"&cursor={cursor}" if cursor else "")).json()
        names += [column["name"] for column in page["data"]]
        cursor = page["pagination"]["next_cursor"]
    assert names == [column["name"] for column in whole["data"]]
    (price,) = tenant.get(f"{path}/public.products/columns?name=price").json()["data"]
    assert price["type"] == "numeric(10,2)"
    foreign = tenant.get(f"{path}/products/columns?limit=4").json()["pagination"]["next_cursor"]
    assert code_of(tenant.get(f"{path}/product_view/columns?cursor={foreign}")) == "validation_error"
    assert code_of(tenant.get(f"{path}/nothing/columns")) == "source_table_not_found"


def test_columns_of_a_table_with_slashes_quotes_and_dots_in_its_name(tenant: Tenant) -> None:
    schema, table = 'a/b."c', 'x/columns/y."z" ?#é'
    with psycopg.connect(tenant.source.render_as_string(hide_password=False), autocommit=True) as connection:
        named = psycopg.sql.Identifier(schema, table)
        connection.execute(psycopg.sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(psycopg.sql.Identifier(schema)))
        connection.execute(psycopg.sql.SQL("CREATE TABLE {} (id integer PRIMARY KEY)").format(named))
    try:
        path = f"/v1/connections/{tenant.connection()['id']}/tables"
        listed = [found["name"] for found in tenant.get(path).json()["tables"]]
        (spelled,) = [name for name in listed if "x/columns/y" in name]
        found = tenant.get(f"{path}/{quote(spelled, safe='')}/columns?limit=5")
        assert [column["name"] for column in found.json()["data"]] == ["id"], found.text
        (only,) = tenant.get(path, params={"name": spelled}).json()["tables"]
        assert only["name"] == spelled
    finally:
        with psycopg.connect(tenant.source.render_as_string(hide_password=False), autocommit=True) as connection:
            connection.execute(psycopg.sql.SQL("DROP SCHEMA {} CASCADE").format(psycopg.sql.Identifier(schema)))


def test_providers_are_tested_when_they_are_created_and_when_their_credentials_change(tenant: Tenant) -> None:
    with running_openai_server() as server:
        body = {"name": "own", "provider": "openai", "credentials": {"base_url": server.base_url}}
        made = tenant.made("/v1/embedding-providers", body)
        assert (made["status"], made["last_error"]) == ("connected", None)
        assert made["tested_at"]
        path = f"/v1/embedding-providers/{made['id']}"
        server.behave(api_key="right")
        assert tenant.put(path, {"name": "renamed"}).json()["status"] == "connected"
        failed = tenant.put(path, {"credentials": {"base_url": server.base_url, "api_key": "wrong"}}).json()
        assert failed["status"] == "failed"
        assert "api_key" in failed["last_error"]
        server.behave(api_key=None)
        assert tenant.post(f"{path}/test").json()["status"] == "ok"
        assert tenant.get(path).json()["status"] == "connected"


def test_a_provider_that_fails_its_test_is_kept_as_failed(tenant: Tenant) -> None:
    body = {"name": "gone", "provider": "openai", "credentials": {"base_url": "http://127.0.0.1:1/v1"}}
    made = tenant.made("/v1/embedding-providers", body)
    assert made["status"] == "failed"
    assert "cannot be reached" in made["last_error"]
    again = tenant.post("/v1/embedding-providers", body)
    assert code_of(again) == "name_conflict"
    assert f"PUT /v1/embedding-providers/{made['id']}" in again.json()["error"]["resolution"]
    assert tenant.provider()["status"] == "connected"


def test_readiness_for_queries_does_not_depend_on_dagster(
    tenant: Tenant, app_with: Callable[..., TestClient], qdrant_url: str
) -> None:
    client = app_with(dagster_url="http://127.0.0.1:1", qdrant_url=qdrant_url)
    assert client.get("/ready").status_code == 503
    ready = client.get("/ready?for=query")
    assert (ready.status_code, set(ready.json()["checks"])) == (200, {"catalog", "qdrant"})
    assert code_of(client.get("/ready?for=backfill")) == "validation_error"


def test_the_root_says_what_answers_here(client: TestClient) -> None:
    body = client.get("/").json()
    assert (body["name"], body["links"]["documentation"]) == ("embedd", "/docs")
    for name, link in body["links"].items():
        if name not in ("api", "ready"):
            assert client.get(link).status_code == 200, link


@pytest.mark.parametrize(
    ("method", "path", "hint"),
    [
        ("POST", "/v1/connections", "POST /v1/providers/postgresql/connections"),
        ("POST", "/connections", "POST /v1/providers/postgresql/connections"),
        ("GET", "/v1/vector_tables", "GET /v1/vector-tables"),
        ("GET", "/v1/vectorTables", "GET /v1/vector-tables"),
        ("GET", "/v1/vector-tables/", "GET /v1/vector-tables"),
        ("POST", "/v1/vector-table", "POST /v1/vector-tables"),
        ("GET", "/vector-tables", "GET /v1/vector-tables"),
        ("GET", "/api/v1/tasks", "GET /v1/tasks"),
        ("GET", "/v1/keys", "GET /v1/api-keys"),
        ("POST", "/v1/vector-tables/vt_1/search", "POST /v1/vector-tables/{vector_table_id}/query"),
        ("GET", "/v1/vector-tables/vt_1/query", "POST /v1/vector-tables/{vector_table_id}/query"),
        ("PATCH", "/v1/vector-tables/vt_1", "PUT /v1/vector-tables/{vector_table_id}"),
        ("POST", "/v1/vector-tables/vt_1/backfills", "POST /v1/vector-tables/{vector_table_id}/backfill"),
    ],
)
def test_a_wrong_path_or_method_is_told_the_right_one(tenant: Tenant, method: str, path: str, hint: str) -> None:
    response = tenant.send(method, path)
    assert code_of(response) in ("not_found", "method_not_allowed")
    assert f"Did you mean {hint}?" in response.json()["error"]["resolution"]


def test_a_path_that_is_like_nothing_gets_no_hint(tenant: Tenant) -> None:
    assert "Did you mean" not in tenant.get(f"/{unique('zzz')}/{unique('yyy')}/qqq/www").text


def test_source_table_follows_a_rename_by_put(tenant: Tenant) -> None:
    def sql(statement: str) -> None:
        with psycopg.connect(tenant.source.render_as_string(hide_password=False), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[arg-type]

    columns = [{"name": "title", "role": "embedding"}]
    before, after = unique("before").replace("-", "_"), unique("after").replace("-", "_")
    sql(f"CREATE TABLE {before} (id integer PRIMARY KEY, title text)")
    sql(f"CREATE TABLE no_title_{before} (id integer PRIMARY KEY)")
    sql(f"CREATE TABLE no_key_{before} (id integer, title text)")
    sql(f"INSERT INTO no_key_{before} VALUES (1, 'a'), (1, 'b')")
    path = f"/v1/vector-tables/{tenant.table(source_table=before, columns=columns)['id']}"
    sql(f"ALTER TABLE {before} RENAME TO {after}")
    for wrong, code in (
        (before, "source_table_not_found"),
        (f"no_title_{before}", "source_table_not_found"),
        (f"no_key_{before}", "validation_error"),
    ):
        response = tenant.put(
            path, {"source_table": wrong, "name": "x"} if wrong != before else {"source_table": "gone"}
        )
        assert code_of(response) == code
    changed = tenant.put(path, {"source_table": after})
    assert (changed.status_code, changed.json()["source_table"]) == (200, after), changed.text
    assert tenant.get(path).json()["source_table"] == after
