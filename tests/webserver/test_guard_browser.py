"""A real browser that is signed in at the guard, and a hostile page that tries to use that.

The page comes from another port of the same address, whose requests carry even SameSite=Strict cookies, and from
another name. The same attacks against a webserver without the guard reach it: that is what is tested against.
"""

from urllib.parse import quote

import pytest
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute

from embedd_dagster.webserver.guard import Guard
from tests.support.chromium import open_chromium
from tests.support.serving import serving

TOKEN = "a-token-of-a-test-0123456789"
MUTATION = "mutation { launchRun }"

# What the real UI does: it asks by POST of JSON, and follows logs by WebSocket.
UI = """<!doctype html><title>loading</title><link rel="icon" href="data:,"><script>(async () => {
  const sent = await fetch('/graphql', {method: 'POST', headers: {'Content-Type': 'application/json'},
    body: JSON.stringify({query: 'mutation { launchRun }', from: 'the ui'})});
  const socket = new WebSocket(`ws://${location.host}/graphql`, 'graphql-ws');
  socket.onmessage = event => { document.title = `ui ${sent.status} ${event.data}` };
  socket.onerror = () => { document.title = `ui ${sent.status} no logs` };
  socket.onopen = () => socket.send('the ui');
})()</script>"""

ATTACKS = """<!doctype html><title>attacking</title><link rel="icon" href="data:,"><body><script>(async () => {
  const target = '%(target)s', mutation = '%(mutation)s', read = target + '/graphql?query=' + encodeURIComponent(mutation);
  const body = JSON.stringify({query: mutation}), url = target + '/graphql';
  const tries = [];
  const attempt = promise => tries.push(Promise.race([
    Promise.resolve(promise).catch(() => 0), new Promise(done => setTimeout(done, 3000))]));
  const loaded = (element, place) => attempt(new Promise(done => {
    element.onload = element.onerror = done; (place || document.body).append(element) }));
  const make = (tag, fields) => Object.assign(document.createElement(tag), fields);
  loaded(make('img', {src: read + '&by=img'}));
  loaded(make('script', {src: read + '&by=script'}));
  loaded(make('link', {rel: 'stylesheet', href: read + '&by=link'}));
  loaded(make('iframe', {src: read + '&by=iframe'}));
  loaded(make('iframe', {src: target + '/?by=framed-ui'}));
  for (const credentials of ['include', 'omit']) {
    attempt(fetch(read + '&by=fetch', {mode: 'no-cors', credentials}));
    attempt(fetch(read + '&by=cors', {mode: 'cors', credentials}));
    attempt(fetch(url + '?by=text', {method: 'POST', mode: 'no-cors', credentials, body}));
    attempt(fetch(read + '&by=empty', {method: 'POST', mode: 'no-cors', credentials}));
    attempt(fetch(url + '?by=json', {method: 'POST', credentials, body, headers: {'Content-Type': 'application/json'}}));
    attempt(fetch(target + '/report_asset_materialization/a', {method: 'POST', mode: 'no-cors', credentials, body}));
  }
  navigator.sendBeacon(read + '&by=beacon', body);
  for (const enctype of ['text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data']) {
    const frame = make('iframe', {name: 'frame-' + enctype}); document.body.append(frame);
    const form = make('form', {action: read + '&by=form', method: 'POST', enctype, target: frame.name});
    form.append(make('input', {name: '{"query": "' + mutation + '", "a": "', value: '"}'}));
    document.body.append(form); attempt(new Promise(done => { frame.onload = done; form.submit() }));
  }
  const opened = window.open(read + '&by=window');
  attempt(new Promise(done => {
    const socket = new WebSocket(target.replace('http', 'ws') + '/graphql', 'graphql-ws');
    socket.onopen = () => socket.send('an attack'); socket.onclose = socket.onerror = socket.onmessage = done;
  }));
  await Promise.all(tries); await new Promise(done => setTimeout(done, 500));
  if (opened) opened.close();
  document.title = 'attacked';
})()</script>"""

SUBMIT = """<!doctype html><form action="%(url)s" method="POST" enctype="text/plain">
<input name='{"query": "mutation { launchRun }", "a": "' value='"}'></form><script>document.forms[0].submit()</script>"""


class Dagster:
    """Stands for the webserver: answers everybody, and tells what reached it."""

    def __init__(self):
        self.reached = []
        routes = [
            Route("/graphql", self.graphql, methods=["GET", "POST"]),
            Route("/report_asset_materialization/a", self.graphql, methods=["POST"]),
            WebSocketRoute("/graphql", self.websocket),
            # the browser asks for it by itself, also for the guard's own refusals
            Route("/favicon.ico", lambda _: Response(status_code=404)),
            Route("/{path:path}", self.page),
        ]
        self.app = Starlette(routes=routes)

    async def graphql(self, request):
        self.reached.append((request.method, request.url.path, request.query_params.get("by")))
        return JSONResponse({"data": "launched"})

    async def page(self, request):
        self.reached.append((request.method, request.url.path, request.query_params.get("by")))
        return HTMLResponse(UI)

    async def websocket(self, websocket):
        await websocket.accept(subprotocol="graphql-ws")
        self.reached.append(("WEBSOCKET", websocket.url.path, await websocket.receive_text()))
        await websocket.send_text("logs")
        await websocket.close()


def hostile_app(targets):
    def attack(request):
        return HTMLResponse(ATTACKS % {"target": targets[request.path_params["target"]], "mutation": MUTATION})

    def leave(request):
        url = quote(request.query_params["to"], safe=":/?=&%")
        return HTMLResponse(f"<!doctype html><script>location.href = {url!r}</script>")

    def submit(request):
        return HTMLResponse(SUBMIT % {"url": request.query_params["to"]})

    return Starlette(routes=[Route("/attack/{target}", attack), Route("/leave", leave), Route("/submit", submit)])


@pytest.fixture(scope="module")
def dagster():
    return Dagster()


@pytest.fixture(scope="module")
def ports(dagster):
    """Of the guard, of the webserver without one, of the hostile page."""
    targets = {}
    with (
        serving(Guard(dagster.app, token=TOKEN)) as guarded,
        serving(dagster.app) as bare,
        serving(hostile_app(targets)) as hostile,
    ):
        targets.update(guarded=f"http://127.0.0.1:{guarded}", bare=f"http://127.0.0.1:{bare}")
        yield {"guarded": guarded, "bare": bare, "hostile": hostile}


@pytest.fixture(scope="module")
def tab(ports, tmp_path_factory):
    """Signed in at the guard, as a user is who works with the UI."""
    profile = tmp_path_factory.mktemp("profile")
    with open_chromium(profile, "--host-resolver-rules=MAP *.test 127.0.0.1") as tab:
        tab.open(f"http://127.0.0.1:{ports['guarded']}/login?token={TOKEN}")
        tab.wait_for("document.title == 'ui 200 logs'")
        yield tab


# same-site and cross-site to the guard, which is at 127.0.0.1
hostile_names = pytest.mark.parametrize("hostile_name", ["127.0.0.1", "localhost", "evil.test"])


@hostile_names
def test_without_the_guard_the_attacks_arrive(tab, dagster, ports, hostile_name):
    dagster.reached.clear()
    tab.open(f"http://{hostile_name}:{ports['hostile']}/attack/bare")
    tab.wait_for("document.title == 'attacked'")
    arrived = {(method, by) for method, path, by in dagster.reached}
    assert {("GET", "img"), ("GET", "fetch"), ("POST", "text"), ("POST", "beacon"), ("POST", "form")} <= arrived
    assert {("WEBSOCKET", "an attack"), ("GET", "iframe"), ("GET", "framed-ui"), ("GET", "window")} <= arrived


@hostile_names
def test_no_page_of_another_origin_reaches_dagster(tab, dagster, ports, hostile_name):
    dagster.reached.clear()
    tab.open(f"http://{hostile_name}:{ports['hostile']}/attack/guarded")
    tab.wait_for("document.title == 'attacked'")
    assert dagster.reached == []


@hostile_names
def test_a_page_cannot_act_by_leaving_its_own_page(tab, dagster, ports, hostile_name):
    graphql = f"http://127.0.0.1:{ports['guarded']}/graphql"
    dagster.reached.clear()
    for path, url in (("leave", f"{graphql}?query={quote(MUTATION)}"), ("submit", graphql)):
        tab.open(f"http://{hostile_name}:{ports['hostile']}/{path}?to={quote(url, safe='')}")
        tab.wait_for(f"location.port == '{ports['guarded']}' && document.body.innerText.includes('error')")
    assert dagster.reached == []


def test_a_page_cannot_act_under_a_name_that_was_rebound_to_us(tab, dagster, ports):
    dagster.reached.clear()
    for path in ("/", f"/graphql?query={quote(MUTATION)}", f"/login?token={TOKEN}"):
        tab.open(f"http://rebound.test:{ports['guarded']}{path}")
        tab.wait_for("location.host.startsWith('rebound') && document.body.innerText.includes('host_not_allowed')")
    assert dagster.reached == []


@hostile_names
def test_a_link_from_elsewhere_opens_the_ui_with_the_session(tab, dagster, ports, hostile_name):
    dagster.reached.clear()
    page = f"http://127.0.0.1:{ports['guarded']}/runs/1?tab=logs"
    tab.open(f"http://{hostile_name}:{ports['hostile']}/leave?to={quote(page, safe='')}")
    tab.wait_for("document.title == 'ui 200 logs'")
    assert tab.evaluate("location.pathname + location.search") == "/runs/1?tab=logs"
    # an attack of an earlier test may still be arriving; those say what they are
    assert [call for call in dagster.reached if call[2] in (None, "the ui")] == [
        ("GET", "/runs/1", None),
        ("POST", "/graphql", None),
        ("WEBSOCKET", "/graphql", "the ui"),
    ]
    assert tab.evaluate("document.cookie") == ""


def test_a_stranger_signs_in_by_the_form(dagster, ports, tmp_path):
    with open_chromium(tmp_path) as tab:
        tab.open(f"http://localhost:{ports['guarded']}/runs/1?tab=logs")
        tab.wait_for("document.title == 'Sign in'")
        tab.evaluate("document.querySelector('[name=token]').value = 'wrong'; document.forms[0].submit()")
        tab.wait_for("document.readyState == 'complete' && document.body.innerText.includes('not this installation')")
        tab.evaluate(f"document.querySelector('[name=token]').value = '{TOKEN}'; document.forms[0].submit()")
        tab.wait_for("document.title == 'ui 200 logs'")
        assert tab.evaluate("location.pathname + location.search") == "/runs/1?tab=logs"
