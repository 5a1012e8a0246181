"""A real browser without a window, driven over the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--no-proxy-server", "--remote-debugging-port=0", "--window-size=1400,900",
    # the attacks of a page must not fail only because a browser may block what opens by itself
    "--disable-popup-blocking",
)  # fmt: skip


def find_chromium() -> str:
    """Its path. Skips the test where there is none, but fails it in CI."""
    for name in _NAMES:
        if path := shutil.which(name):
            return path
    message = f"needs a browser on PATH, one of {', '.join(_NAMES)}: apt-get install chromium"
    if os.environ.get("CI") == "true" or os.environ.get("EMBEDD_TEST_BROWSER") == "required":
        pytest.fail(message)
    pytest.skip(message)


class DevToolsError(Exception):
    """The browser refused a command."""


_SERVER_ERROR = -32000
"""Its code for, among other things, a page that was left while an expression was being evaluated in it."""


class Tab:
    """The browser's one tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        """What the browser told by itself, of the domains that were enabled, up to the last call."""
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a DevTools command."""
        number = next(self._ids)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=30))
            if "id" not in message:
                self.events.append(message)
            if message.get("id") == number:
                if "error" in message:
                    raise DevToolsError(message["error"]["code"], message["error"]["message"])
                result: dict[str, Any] = message["result"]
                return result

    def open(self, url: str) -> None:
        """As typed into the address bar; returns before it is loaded."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def wait_for(self, expression: str, *, within: float = 60.0) -> Any:
        """The expression's value once it is true, of the page that is shown then."""
        deadline = time.monotonic() + within
        while not (value := self._evaluate_unless_left(expression)):
            assert time.monotonic() < deadline, (
                f"{expression} is not true of:\n{self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.05)
        return value

    def _evaluate_unless_left(self, expression: str) -> Any:
        try:
            return self.evaluate(expression)
        except DevToolsError as error:
            if error.args[0] != _SERVER_ERROR:
                raise
            return None

    def screenshot(self, path: Path) -> None:
        """What one would see, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def open_chromium(profile: Path, *options: str) -> Iterator[Tab]:
    """The tab of a browser with a profile of its own; ended with the block."""
    active_port = profile / "DevToolsActivePort"
    active_port.unlink(missing_ok=True)  # of an earlier browser with this profile
    process = subprocess.Popen(
        [find_chromium(), *_OPTIONS, f"--user-data-dir={profile}", *options, "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = _wait_for_port(process, active_port)
        targets = httpx.get(f"http://127.0.0.1:{port}/json", trust_env=False).json()
        page = next(target for target in targets if target["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
            yield Tab(connection)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_port(process: subprocess.Popen[bytes], path: Path) -> int:
    deadline = time.monotonic() + 120
    while True:
        if path.exists() and (lines := path.read_text().splitlines()):
            return int(lines[0])
        assert process.poll() is None, "the browser ended at once"
        assert time.monotonic() < deadline, "the browser does not start"
        time.sleep(0.05)
