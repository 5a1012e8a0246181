"""Bodies and parameters that are not what they should be: a 4xx with an envelope, never a 500."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.strict_json import MAX_DEPTH
from tests.api.tenants import Tenant, code_of

JSON = {"Content-Type": "application/json"}
NESTED = b'{"name": ' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}"

MALFORMED: list[tuple[bytes, str]] = [
    (b"", "body: required"),
    (b"{", "malformed JSON at line 1"),
    (b"[]", "an object is expected"),
    (b'[{"name": "x"}]', "an object is expected"),
    (b"null", "an object is expected"),
    (b"true", "an object is expected"),
    (b'"name"', "an object is expected"),
    (b'{"name": "x",}', "malformed"),
    (b"{'name': 'x'}", "malformed"),
    (b'{"name": "x"} {}', "malformed"),
    (b'{"name": "\xff"}', "UTF-8"),
    (b'\xef\xbb\xbf{"name": "x"}', "malformed"),
    ('{"name": "x"}'.encode("utf-16"), "UTF-8"),
    (b'{"name": NaN}', "NaN"),
    (b'{"name": "x", "query": {"a": 1, "b": 2, "a": 3}}', "'a' is given twice"),
    (b'{"name": -Infinity}', "-Infinity"),
    (b'{"name": 1e999}', "name"),
    (b'{"name": ' + b"9" * 5000 + b"}", "too long"),
    (NESTED, f"deeper than {MAX_DEPTH}"),
    (b"[" * 200_000, "deeper"),
    (b'{"a":' * 100_000, "deeper"),
    (b'{"name": "a\\u0000b"}', "name"),
    (b'{"name": "a\\ud800b"}', "name"),
    (b'{"\\u0000": 1}', "NUL"),
    (b'{"name": "x", "colour": "red"}', "'colour' is not known; accepted: name"),
    (b'{"name": 1}', "name: a text is expected"),
    (b'{"name": ["x"]}', "name: a text is expected"),
]


@pytest.mark.parametrize(("content", "says"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_bodies(tenant: Tenant, content: bytes, says: str) -> None:
    response = tenant.post("/v1/environments", content=content, headers=JSON)
    assert (response.status_code, code_of(response)) == (422, "validation_error"), response.text
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_another_content_type(tenant: Tenant, kind: str) -> None:
    response = tenant.post("/v1/environments", content=b'{"name": "x"}', headers={"Content-Type": kind})
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert "Content-Type" in response.json()["error"]["message"]


def test_a_charset_is_fine(tenant: Tenant) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    response = tenant.post("/v1/environments", content=b'{"name": "b"}', headers=headers)
    assert (response.status_code, response.json()["name"]) == (201, "b")


def test_large_bodies_are_refused_by_announced_and_by_true_size(tenant: Tenant) -> None:
    large = b"x" * (2 * 2**20 + 1)
    response = tenant.post("/v1/environments", content=large, headers=JSON)
    assert (response.status_code, code_of(response)) == (413, "payload_too_large")

    def chunks() -> Any:
        for _ in range(50):
            yield b"x" * 2**20

    response = tenant.post("/v1/environments", content=chunks(), headers=JSON)
    assert (response.status_code, code_of(response)) == (413, "payload_too_large")
    exact = json.dumps({"name": "y"}).encode()
    exact += b" " * (2 * 2**20 - len(exact))
    assert tenant.post("/v1/environments", content=exact, headers=JSON).status_code == 201


@pytest.mark.timeout(30)
def test_many_values_under_a_long_name_are_read_at_once(tenant: Tenant) -> None:
    """To write down the place of each of them took 250 GB of copies."""
    response = tenant.post("/v1/environments", {"n" * 500_000: [0] * 480_000 + ["NUL: \0"]})
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert f"{'n' * 64}[480000]: a text must not contain NUL" in response.text


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=", "limit=1.5", "limit=-1", "limit=NaN"])
def test_limits_outside_of_1_to_100(tenant: Tenant, query: str) -> None:
    response = tenant.get(f"/v1/vector-tables?{query}")
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert "limit" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "cursor",
    ["", "x", "!!!", "%00", "a" * 3000, "MTIzOmFiYw==", "MTIz", "OmFiYw", "LTE6YWJj", "w6k", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OmE",
     "MDE6YQ", "MTphAA", "../../etc", "MTph\n"],
)  # fmt: skip
def test_malformed_cursors(tenant: Tenant, cursor: str) -> None:
    for path in ("vector-tables", "tasks", "environments", "api-keys", "connections", "embedding-providers"):
        response = tenant.get(f"/v1/{path}", params={"cursor": cursor})
        assert (response.status_code, code_of(response)) == (422, "validation_error"), (path, response.text)
        assert "cursor" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "path",
    ["/v1/vector-tables/vt_%00", "/v1/vector-tables/'%20or%201=1", "/v1/vector-tables/conn_" + "0" * 26,
     "/v1/vector-tables/" + "x" * 5000, "/v1/vector-tables/%ff%fe", "/v1/vector-tables/VT_" + "0" * 26],
)  # fmt: skip
def test_malformed_ids_are_not_found(tenant: Tenant, path: str) -> None:
    response = tenant.get(path)
    assert (response.status_code, code_of(response)) == (404, "vector_table_not_found")
    assert len(response.json()["error"]["message"]) < 200


@pytest.mark.parametrize("query", ["status=done", "target_id=%00", "target_id=" + "x" * 200])
def test_task_filters(tenant: Tenant, query: str) -> None:
    response = tenant.get(f"/v1/tasks?{query}")
    assert (response.status_code, code_of(response)) == (422, "validation_error")


@pytest.mark.parametrize("path", ["/v1", "/v1/vector-tables/", "/v2/vector-tables", "/v1/vector_tables", "/nothing"])
def test_unknown_paths(client: TestClient, path: str) -> None:
    response = client.get(path, follow_redirects=False)
    assert (response.status_code, code_of(response)) == (404, "not_found")


def test_unknown_methods_name_those_that_are_known(tenant: Tenant) -> None:
    response = tenant.send("PATCH", f"/v1/vector-tables/vt_{'0' * 26}")
    assert (response.status_code, code_of(response)) == (405, "method_not_allowed")
    assert response.headers["allow"] == "DELETE, GET, PUT"
    assert tenant.delete("/v1/tasks").headers["allow"] == "GET"


def test_a_message_never_repeats_a_secret(tenant: Tenant) -> None:
    secret = "canary-secret"
    body = {"name": 5, "mode": "x", "credentials": {**tenant.credentials, "password": [secret], "port": secret}}
    response = tenant.post("/v1/providers/postgresql/connections", body)
    assert response.status_code == 422
    assert secret not in response.text
    assert "credentials.password: a text is expected" in response.json()["error"]["message"]


def test_a_number_without_a_fraction_is_whole_however_it_is_written(tenant: Tenant) -> None:
    body = json.dumps(tenant.table_body()).replace('"embedding_dimensions": 384', '"embedding_dimensions": 3.84e2')
    response = tenant.post("/v1/vector-tables", content=body.encode(), headers=JSON)
    assert (response.status_code, response.json()["embedding_dimensions"]) == (201, 384)


@pytest.mark.parametrize("name", ["a\nb", "\x85", "a\x00", "  ", "", "x" * 101, "x" + " " * 100])
def test_names_that_are_refused(tenant: Tenant, name: str) -> None:
    response = tenant.post("/v1/api-keys", {"name": name})
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert "name" in response.json()["error"]["message"]
