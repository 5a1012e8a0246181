"""The pages for people work without a network: in a real browser that can reach nothing but this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api.error_codes import ERROR_CODES
from tests.api.tenants import code_of
from tests.support.chromium import Tab, open_chromium
from tests.support.serving import serving

NO_INLINE_SCRIPT = re.compile(r"<script(?![^>]*\bsrc=)|\son\w+=|javascript:", re.IGNORECASE)


@pytest.fixture(scope="module")
def address(client: TestClient) -> Iterator[str]:
    assert isinstance(client.app, FastAPI)
    with serving(client.app) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with open_chromium(
        tmp_path_factory.mktemp("profile"), "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    ) as tab:
        tab.call("Network.enable")
        tab.call("Log.enable")
        yield tab


def _asked(tab: Tab) -> list[str]:
    return [event["params"]["request"]["url"] for event in tab.events if event["method"] == "Network.requestWillBeSent"]


def _faults(tab: Tab) -> list[str]:
    """What the browser complains of: what the policy blocked, what could not be loaded, exceptions."""
    return [event["params"]["entry"]["text"] for event in tab.events if event["method"] == "Log.entryAdded"]


def test_every_operation_is_shown_and_nothing_is_asked_of_anybody_else(
    client: TestClient, address: str, tab: Tab
) -> None:
    assert isinstance(client.app, FastAPI)
    tab.open(f"{address}/docs")
    shown = tab.wait_for("document.querySelectorAll('.opblock').length")
    document = client.app.openapi()
    assert shown == sum(len(methods) for methods in document["paths"].values())
    assert tab.evaluate("document.querySelector('.title').innerText").startswith("embedd")
    # one of them is tried: the page may ask the API, and shows the answer
    tab.evaluate("document.querySelector('#operations-Health-get_health button').click()")
    tab.wait_for("!!document.querySelector('.try-out__btn')")
    tab.evaluate("document.querySelector('.try-out__btn').click()")
    tab.wait_for("!!document.querySelector('.execute')")
    tab.evaluate("document.querySelector('.execute').click()")
    answer = tab.wait_for("document.querySelector('.live-responses-table .highlight-code')?.innerText")
    assert '"status"' in answer
    asked = _asked(tab)
    assert {urlsplit(url).path for url in asked} >= {"/docs", "/openapi.json", "/docs/assets/start.js", "/health"}
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert _faults(tab) == []


def test_the_list_of_codes(address: str, tab: Tab) -> None:
    tab.open(f"{address}/docs/errors#name_conflict")
    tab.wait_for("document.readyState == 'complete' && !!document.querySelector('tr:target')")
    assert tab.evaluate("document.querySelectorAll('tr[id]').length") == len(ERROR_CODES)
    # the style is let through
    assert tab.evaluate("getComputedStyle(document.querySelector('tr:target')).backgroundColor") == "rgb(255, 239, 192)"
    assert [url for url in _asked(tab) if not url.startswith((address, "data:"))] == []


def test_the_policy_is_strict(client: TestClient) -> None:
    for path in ("/docs", "/docs/errors"):
        response = client.get(path)
        assert response.status_code == 200
        policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
        assert (policy["default-src"], policy["frame-ancestors"], policy["base-uri"]) == ("'none'",) * 3
        assert policy.get("script-src", "'self'") == "'self'"
        assert not NO_INLINE_SCRIPT.search(response.text)
        assert "//" not in response.text.replace("<!doctype", ""), "an address of another host"


def test_only_the_pages_own_files_are_served(client: TestClient) -> None:
    for name in ("start.js", "swagger-ui-bundle.js", "swagger-ui.css"):
        assert client.get(f"/docs/assets/{name}").status_code == 200
    for name in ("redoc.standalone.js", "core.py", "..%2fcore.py", "%2e%2e", "x"):
        response = client.get(f"/docs/assets/{name}")
        assert (response.status_code, code_of(response)) == (404, "not_found")
