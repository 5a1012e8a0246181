"""The guard over a stub: what it refuses, and that nothing refused reaches what stands behind it."""

import re
from urllib.parse import quote

import pytest
from pydantic import SecretStr, ValidationError
from starlette.applications import Starlette
from starlette.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from api.launch import Launcher
from embedd_dagster.errors import ConfigurationError
from embedd_dagster.settings import WebserverSettings
from embedd_dagster.stack import installation, readiness
from embedd_dagster.webserver.guard import Guard
from embedd_dagster.webserver.sessions import SESSION_SECONDS, Sessions
from tests.support.serving import serving

TOKEN = "a-token-of-a-test-0123456789"
ORIGIN = "http://127.0.0.1:3000"
MUTATION = {"query": "mutation { launchRun }"}
BEARER = {"Authorization": f"Bearer {TOKEN}"}


class Dagster:
    """Stands for the webserver: as trusting as that one, and tells what reached it."""

    def __init__(self):
        self.reached = []
        routes = [
            Route("/graphql", self.graphql, methods=["GET", "POST"]),
            Route("/report_asset_materialization/{key}", self.graphql, methods=["POST"]),
            Route("/asset.js", lambda _: FileResponse(__file__)),
            Route("/{path:path}", self.page),
            WebSocketRoute("/graphql", self.websocket),
        ]
        self.app = Starlette(routes=routes)

    def graphql(self, request):
        self.reached.append((request.method, request.url.path))
        return JSONResponse({"data": "launched"})

    def page(self, request):
        self.reached.append((request.method, request.url.path))
        return HTMLResponse("the UI", headers={"Content-Security-Policy": "default-src 'self'"})

    async def websocket(self, websocket):
        self.reached.append(("WEBSOCKET", websocket.url.path))
        await websocket.accept(subprotocol="graphql-ws")
        await websocket.send_text("hello")
        await websocket.close()


class Clock:
    now = 1_800_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def dagster():
    return Dagster()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def client(dagster, clock):
    guard = Guard(dagster.app, token=TOKEN, hosts=("dagster.example.com",), now=clock)
    with TestClient(guard, base_url=ORIGIN, follow_redirects=False) as client:
        yield client


@pytest.fixture
def signed_in(client):
    assert client.get(f"/login?token={TOKEN}").status_code == 200
    return client


def code(response):
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("path", ["/", "/runs/1", "/asset.js", "/server_info", "/logs/a/b.err", "/download_debug/1"])
def test_nothing_is_given_to_strangers(client, dagster, path):
    response = client.get(path)
    assert code(response) == (401, "not_signed_in")
    assert response.headers["www-authenticate"] == "Bearer"
    assert client.get(path, headers={"Accept": "text/html"}).status_code == 401
    assert client.post("/graphql", json=MUTATION).status_code == 401
    assert dagster.reached == []


def test_a_program_has_the_token(client, dagster):
    assert client.post("/graphql", json=MUTATION, headers=BEARER).json() == {"data": "launched"}
    assert client.get("/server_info", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    assert dagster.reached == [("POST", "/graphql"), ("GET", "/server_info")]


@pytest.mark.parametrize("value", ["Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer ÿ", ""])
def test_a_wrong_token_is_refused_even_beside_a_good_cookie(signed_in, dagster, value):
    response = signed_in.post("/graphql", json=MUTATION, headers={"Authorization": value.encode("latin-1")})
    assert code(response) == (401, "wrong_token")
    assert dagster.reached == []


def test_the_link_signs_a_browser_in(client, dagster):
    response = client.get(f"/login?token={TOKEN}&next=/runs")
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert f"Max-Age={SESSION_SECONDS}" in cookie
    assert "Secure" not in cookie
    assert 'content="0; url=/runs"' in response.text
    assert TOKEN not in response.text + cookie
    assert client.get("/runs").text == "the UI"
    sent = client.post("/graphql", json=MUTATION, headers={"Origin": ORIGIN, "Sec-Fetch-Site": "same-origin"})
    assert sent.json() == {"data": "launched"}


def test_behind_tls_the_cookie_stays_there(client):
    response = client.get(f"/login?token={TOKEN}", headers={"X-Forwarded-Proto": "https"})
    assert "Secure" in response.headers["set-cookie"]


def test_the_page_signs_a_browser_in(client):
    page = client.get("/runs?a=b&c=<d>", headers={"Accept": "text/html"})
    assert page.status_code == 401
    assert 'name="next" value="/runs?a=b&amp;c=%3Cd%3E"' in page.text
    assert page.headers["referrer-policy"] == "same-origin"
    form = {"token": TOKEN, "next": "/runs?a=b"}
    response = client.post("/login", data=form, headers={"Origin": ORIGIN})
    assert (response.status_code, response.headers["location"]) == (303, "/runs?a=b")
    assert client.get("/runs").text == "the UI"


def test_a_wrong_token_signs_nobody_in(client):
    for response in (client.get("/login?token=wrong"), client.post("/login", data={"token": "wrong"})):
        assert response.status_code == 401
        assert "set-cookie" not in response.headers
        assert "not this installation’s token" in response.text


@pytest.mark.parametrize(
    "path",
    [
        "//evil.test",
        "https://evil.test",
        "/\\evil.test",
        "javascript:alert(1)",
        "evil",
        "/\n/evil.test",
        "/\t/evil",
        "",
    ],
)
def test_signing_in_leads_nowhere_else(client, path):
    response = client.post("/login", data={"token": TOKEN, "next": path}, headers={"Origin": ORIGIN})
    assert response.headers["location"] == "/"
    assert 'url=/"' in client.get(f"/login?token={TOKEN}&next={quote(path, safe='')}").text


def test_the_login_form_is_ours(client):
    assert code(client.post("/login", data={"token": TOKEN}, headers={"Origin": "http://evil.test"}))[0] == 403
    assert code(client.post("/login", json={"token": TOKEN})) == (415, "not_a_form")
    assert code(client.post("/login", data={"token": "x" * 5000})) == (413, "too_large")
    assert code(client.put("/login", data={"token": TOKEN})) == (405, "method_not_allowed")


def forged_cookies():
    later = 1_800_000_000 + 100
    good = Sessions(TOKEN).issue(1_800_000_000)
    expires_at, signature = good.split(".")
    return {
        "empty": "",
        "no signature": str(later),
        "empty signature": f"{later}.",
        "other token": Sessions("another-token-of-a-test").issue(1_800_000_000),
        "later expiry": f"{int(expires_at) + 1}.{signature}",
        "zero before": f"0{expires_at}.{signature}",
        "cut": good[:-1],
        "longer": f"{good}0",
        "upper case": f"{expires_at}.{signature.upper()}",
        "name's signature": f"cookie name.{Sessions(TOKEN)._sign(b'cookie name')}"[:-1],
        "the token": TOKEN,
    }


@pytest.mark.parametrize("kind", forged_cookies())
def test_a_forged_cookie_is_none(client, dagster, kind):
    cookie = f"{Sessions(TOKEN).cookie_name}={forged_cookies()[kind]}"
    assert code(client.get("/", headers={"Cookie": cookie})) == (401, "not_signed_in")
    assert dagster.reached == []


def test_a_session_ends(signed_in, clock):
    clock.now += SESSION_SECONDS - 1
    assert signed_in.get("/").status_code == 200
    clock.now += 1
    assert code(signed_in.get("/")) == (401, "not_signed_in")


@pytest.mark.parametrize(
    "host",
    ["evil.test", "evil.test:3000", "127.0.0.1.evil.test", "localhost.", "127.0.0.1@evil.test", "127.0.0.1:x", "", "0"],
)
@pytest.mark.parametrize("headers", [{}, BEARER], ids=["cookie", "bearer"])
def test_a_rebound_name_is_refused(signed_in, dagster, host, headers):
    for path in ("/", "/login", "/_guard/health", "/graphql"):
        response = signed_in.get(path, headers={"Host": host, **headers})
        assert code(response) == (403, "host_not_allowed")
    sent = signed_in.post("/graphql", json=MUTATION, headers={"Host": host, "Origin": f"http://{host}", **headers})
    assert code(sent) == (403, "host_not_allowed")
    assert dagster.reached == []


@pytest.mark.parametrize("host", ["127.0.0.1:3000", "localhost:8080", "LOCALHOST", "[::1]:3000", "Dagster.Example.com"])
def test_own_names_are_good(client, host):
    sent = client.post("/graphql", json=MUTATION, headers={**BEARER, "Host": host, "Origin": f"http://{host.lower()}"})
    assert sent.status_code == 200


@pytest.mark.parametrize("accept", ["image/*", "text/html", "application/json"])
@pytest.mark.parametrize("path", ["/graphql", "/graphql/", "//graphql", "/%67raphql", "/GraphQL"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_graphql_is_never_read_by_get(signed_in, dagster, method, path, accept):
    headers = {"Accept": accept, "Sec-Fetch-Site": "same-origin"}
    for identity in ({}, BEARER):
        response = signed_in.request(method, f"{ORIGIN}{path}", params=MUTATION, headers={**headers, **identity})
        assert response.status_code == 405
    assert dagster.reached == []


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/graphql",
                     "multipart/form-data; boundary=application/json", "text/plain; application/json", "application/jsonx"]
)  # fmt: skip
@pytest.mark.parametrize("path", ["/graphql", "/report_asset_materialization/vector_table"])
def test_only_json_changes_anything(signed_in, dagster, content_type, path):
    headers = {"Origin": ORIGIN, **({"Content-Type": content_type} if content_type is not None else {})}
    response = signed_in.post(path, params=MUTATION, content=b'{"query": "mutation { launchRun }"}', headers=headers)
    assert code(response) == (415, "not_json")
    assert dagster.reached == []


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "UNKNOWN"])
def test_other_methods_are_none(signed_in, dagster, method):
    response = signed_in.request(method, "/graphql", json=MUTATION, headers={"Origin": ORIGIN})
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert dagster.reached == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.test"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:3001"},  # same-site: the cookie goes along
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://127.0.0.1:3000@evil.test"},
        {"Origin": "file://127.0.0.1:3000"},
        {"Origin": "http://[evil"},
        {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"},
        {"Origin": ORIGIN, "Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "something new"},
        {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    ],
    ids=str,
)
@pytest.mark.parametrize("identity", [{}, BEARER], ids=["cookie", "bearer"])
def test_another_origin_sends_nothing(signed_in, dagster, headers, identity):
    response = signed_in.post("/graphql", json=MUTATION, headers={**headers, **identity})
    assert code(response) == (403, "cross_origin")
    assert dagster.reached == []


def test_a_session_names_its_origin(signed_in, dagster):
    assert code(signed_in.post("/graphql", json=MUTATION)) == (403, "origin_missing")
    assert dagster.reached == []


def test_headers_that_come_twice_are_refused(signed_in, dagster):
    for name, value in (
        ("Origin", "http://evil.test"),
        ("Content-Type", "text/plain"),
        ("Sec-Fetch-Site", "same-site"),
    ):
        headers = [("Origin", ORIGIN), ("Content-Type", "application/json"), ("Sec-Fetch-Site", "same-origin")]
        response = signed_in.post("/graphql", content=b"{}", headers=[*headers, (name, value)])
        assert code(response) == (400, "ambiguous_headers")
    assert dagster.reached == []


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_site_may_link_but_not_embed(client, dagster, site):
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Accept": "text/html"}
    page = client.get("/runs/1?a=b&c=d", headers=link)
    assert 'content="0; url=/runs/1?a=b&amp;c=d"' in page.text  # our own page comes back with the cookie
    client.get(f"/login?token={TOKEN}")
    assert client.get("/runs/1", headers=link).text == "the UI"
    for changed in ({"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Dest": "image", "Sec-Fetch-Mode": "no-cors"}):
        assert code(client.get("/runs/1", headers={**link, **changed})) == (403, "cross_origin")
    assert client.get("/graphql", params=MUTATION, headers=link).status_code == 405
    assert dagster.reached == [("GET", "/runs/1")]


def test_the_answers_are_not_framed_sniffed_or_told(signed_in):
    for path in ("/", "/asset.js", "/login", "/_guard/health", "/graphql"):
        headers = signed_in.get(path).headers
        assert "frame-ancestors 'none'" in headers.get_list("content-security-policy")
        assert headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] in ("no-referrer", "same-origin")
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert re.search("no-store|private", headers["cache-control"])
    assert "default-src 'self'" in signed_in.get("/").headers.get_list("content-security-policy")


def test_its_health_is_no_secret(client, dagster):
    assert client.get("/_guard/health").json() == {"status": "ok"}
    assert dagster.reached == []


def session_cookie(clock):
    # The test client's WebSockets go to a host of their own, without the cookies of ours.
    return {"Cookie": f"{Sessions(TOKEN).cookie_name}={Sessions(TOKEN).issue(clock())}", "Host": "127.0.0.1:3000"}


def test_the_logs_come_by_websocket(client, dagster, clock):
    cookie = session_cookie(clock)
    for headers in (
        {"Origin": ORIGIN, **cookie},
        {"Origin": ORIGIN, "Sec-Fetch-Site": "same-origin", **cookie},
        {"Host": "127.0.0.1:3000", **BEARER},
    ):
        with client.websocket_connect("/graphql", headers=headers) as websocket:
            assert websocket.receive_text() == "hello"
    assert len(dagster.reached) == 3


@pytest.mark.parametrize(
    ("is_signed_in", "headers"),
    [
        (False, {"Origin": ORIGIN}),
        (False, {}),
        (True, {}),
        (True, {"Origin": "http://evil.test"}),
        (True, {"Origin": "http://127.0.0.1:3001"}),
        (True, {"Origin": "null"}),
        (True, {"Origin": ORIGIN, "Sec-Fetch-Site": "same-site"}),
        (True, {"Origin": "http://evil.test:3000", "Host": "evil.test:3000"}),
        (False, {"Authorization": "Bearer wrong", "Origin": ORIGIN}),
        (False, {**BEARER, "Origin": "http://evil.test"}),
    ],
    ids=str,
)
def test_a_websocket_from_elsewhere_is_refused(client, dagster, clock, is_signed_in, headers):
    headers = {"Host": "127.0.0.1:3000", **(session_cookie(clock) if is_signed_in else {}), **headers}
    with pytest.raises(WebSocketDisconnect) as caught:
        with client.websocket_connect("/graphql", headers=headers):
            pass
    assert caught.value.code == 1008
    assert (caught.value.reason == "not_signed_in") == (not is_signed_in and "Authorization" not in headers)
    assert dagster.reached == []


def test_the_token_is_made_once_for_its_owner_alone_and_yours_wins(tmp_path, monkeypatch):
    def find():
        return installation.find_dagster_token(tmp_path, installation.External.of_environment())

    monkeypatch.delenv("EMBEDD_DAGSTER_TOKEN", raising=False)
    made = find()
    assert len(made) >= 40
    assert find() == made
    assert (tmp_path / "dagster_token").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("EMBEDD_DAGSTER_TOKEN", TOKEN)
    assert find() == TOKEN
    monkeypatch.setenv("EMBEDD_DAGSTER_TOKEN", "easy to guess")
    with pytest.raises(ConfigurationError, match=r"EMBEDD_DAGSTER_TOKEN: .*at least 16 ASCII characters") as caught:
        find()
    assert "easy" not in str(caught.value)


def test_two_installations_on_one_host_do_not_end_each_others_sessions():
    assert Sessions("one-token-of-a-test").cookie_name != Sessions("another-token-of-a-test").cookie_name


@pytest.mark.parametrize(
    "token", ["", "short", "with spaces in the middle", "línea-de-caracteres-raros", "line\nbreak" * 3]
)
def test_a_token_that_can_be_guessed_or_not_be_sent_is_refused(token):
    with pytest.raises(ValidationError) as caught:
        WebserverSettings(dagster_token=token)
    assert not token or token not in str(caught.value)


def test_hosts_are_names(monkeypatch):
    monkeypatch.setenv("EMBEDD_DAGSTER_TOKEN", TOKEN)
    monkeypatch.setenv("EMBEDD_DAGSTER_HOSTS", "Dagster.example.com, dagster-webserver,,[fd00::1]")
    assert WebserverSettings().dagster_hosts == ("dagster.example.com", "dagster-webserver", "[fd00::1]")
    for wrong in ("https://dagster.example.com", "dagster.example.com:443"):
        monkeypatch.setenv("EMBEDD_DAGSTER_HOSTS", wrong)
        with pytest.raises(ValidationError):
            WebserverSettings()


def test_the_api_has_the_token(dagster):
    def terminate(url, token):
        launcher = Launcher(None, url, token)
        launcher.terminate("a-run")
        launcher._workers.shutdown(wait=True)
        launcher.close()

    with serving(Guard(dagster.app, token=TOKEN)) as port:
        for token in (None, SecretStr("a-wrong-token-of-a-test")):
            terminate(f"http://127.0.0.1:{port}", token)
        assert dagster.reached == []
        terminate(f"http://127.0.0.1:{port}", SecretStr(TOKEN))
        assert dagster.reached == [("POST", "/graphql")]
        assert readiness.answers(port, "/_guard/health") == 200
        assert readiness.answers(port, "/server_info") == 401
