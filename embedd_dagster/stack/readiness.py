"""Whether a service works, checked cheaply enough to ask every 0.1 seconds while it starts."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

import psycopg

from embedd_dagster.stack.ports import LOOPBACK

_TIMEOUT_SECONDS = 2.0
_LOCATIONS_QUERY = """{ workspaceOrError { ... on Workspace { locationEntries {
    loadStatus locationOrLoadError { __typename } } } } }"""


def answers(port: int, path: str) -> int | None:
    """The HTTP status of a GET; none where nobody answers."""
    return _request(port, "GET", path)[0]


def accepts(socket_path: Path) -> bool:
    """Whether a server listens on the unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_TIMEOUT_SECONDS)
        try:
            probe.connect(str(socket_path))
        except OSError:
            return False
    return True


def code_locations_loaded(webserver_port: int, token: str) -> bool:
    """Whether Dagster's webserver serves, and has loaded every code location: until then it shows nothing."""
    status, body = _request(webserver_port, "POST", "/graphql", {"query": _LOCATIONS_QUERY}, token=token)
    if status != 200:
        return False
    workspace = (body.get("data") or {}).get("workspaceOrError") or {}
    entries = workspace.get("locationEntries") or []
    return bool(entries) and all(
        entry["loadStatus"] == "LOADED"
        and (entry["locationOrLoadError"] or {}).get("__typename") == "RepositoryLocation"
        for entry in entries
    )


class DaemonHeartbeat:
    """Whether a daemon that was started after `reset` runs its sensors.

    Asked of the database and not of the webserver, which may be down; told by the daemon's id, which is new with each
    process, and not by the heartbeat's age, which looks healthy for half an hour after a daemon's death.
    """

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        self._earlier_ids: set[str] = set()

    def reset(self) -> None:
        """What has beaten so far does not count."""
        self._earlier_ids = self._daemon_ids()

    def beats(self) -> bool:
        """Whether one has begun since."""
        return bool(self._daemon_ids() - self._earlier_ids)

    def _daemon_ids(self) -> set[str]:
        try:
            with psycopg.connect(self._database_url, connect_timeout=5) as connection:
                # The table comes with the first start; to ask for it before would fill the database's log with errors.
                if connection.execute("SELECT to_regclass('daemon_heartbeats')").fetchone() == (None,):
                    return set()
                rows = connection.execute("SELECT daemon_id FROM daemon_heartbeats WHERE daemon_type = 'SENSOR'")
                return {daemon_id for (daemon_id,) in rows}
        except psycopg.Error:
            return set()


def _request(
    port: int, method: str, path: str, body: dict[str, Any] | None = None, *, token: str | None = None
) -> tuple[int | None, dict[str, Any]]:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_TIMEOUT_SECONDS)
    try:
        content = json.dumps(body) if body is not None else None
        headers = {"Content-Type": "application/json"} if content else {}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        raw = response.read()
        if content is None or response.status != 200:
            return response.status, {}
        answer = json.loads(raw)
        return response.status, answer if isinstance(answer, dict) else {}
    except (OSError, http.client.HTTPException, json.JSONDecodeError):
        return None, {}
    finally:
        connection.close()
