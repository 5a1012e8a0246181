"""By which ways a server may let us in, and that nothing of the service's own opens a user's connection."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from embedd_dagster.connectors.registry import open_platform_store, open_source
from embedd_dagster.errors import ConfigurationError, EmbeddError, SourceAccessDenied
from tests.support.cdc_source import credentials_of
from tests.support.pgbouncer import needs_pgbouncer, pgbouncer

PASSWORD = "s3cret-word"


def check(kind: str, credentials: dict[str, Any], **options: Any) -> None:
    """A first statement as a source or as a platform store."""
    opened: Any = open_source if kind == "source" else open_platform_store
    with opened("postgresql", credentials, **options) as target:
        target.check()


def refusal(kind: str, credentials: dict[str, Any], **options: Any) -> EmbeddError:
    with pytest.raises(EmbeddError) as caught:
        check(kind, credentials, **options)
    return caught.value


class Greeter:
    """A server that asks for a way to log in, and keeps what it is told."""

    def __init__(self, listener: socket.socket, request: bytes) -> None:
        self.heard: list[bytes] = []
        self._listener, self._request = listener, request
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                while data := client.recv(4096):
                    self.heard.append(data)
                    if data[4:8] == struct.pack(">i", 80877103):  # asks for TLS
                        client.sendall(b"N")
                    elif data[4:8] == struct.pack(">i", 196608):  # the startup message
                        client.sendall(self._request)


@contextmanager
def greeter(request: bytes, *, path: Path | None = None) -> Iterator[tuple[Greeter, dict[str, Any]]]:
    family = socket.AF_UNIX if path else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind(str(path / ".s.PGSQL.5432") if path else ("127.0.0.1", 0))
        listener.listen()
        host, port = (str(path), 5432) if path else listener.getsockname()
        credentials = {"host": host, "port": port, "database": "d", "user": "u", "password": PASSWORD}
        yield Greeter(listener, request), credentials


def authentication(code: int) -> bytes:
    return b"R" + struct.pack(">ii", 8, code)


CLEARTEXT, GSS, DONE = authentication(3), authentication(7), authentication(0)
KINDS = pytest.mark.parametrize("kind", ["source", "store"])


@KINDS
def test_a_password_is_not_sent_in_clear_to_an_unverified_server(kind: str) -> None:
    with greeter(CLEARTEXT) as (server, credentials):
        error = refusal(kind, credentials)
        assert not any(PASSWORD.encode() in data for data in server.heard)
    assert isinstance(error, SourceAccessDenied)
    assert "in clear" in error.message
    assert "verify-full" in error.resolution


@KINDS
@pytest.mark.parametrize(("request_", "words"), [(GSS, "other than a password"), (DONE, "without asking")])
def test_a_server_that_does_not_ask_for_the_password_is_refused(kind: str, request_: bytes, words: str) -> None:
    with greeter(request_) as (_, credentials):
        error = refusal(kind, credentials)
    assert isinstance(error, SourceAccessDenied)
    assert words in error.message
    assert "scram-sha-256" in error.resolution


@KINDS
def test_a_missing_password_is_named(kind: str, database_url: str) -> None:
    error = refusal(kind, credentials_of(database_url, password=""))
    assert isinstance(error, SourceAccessDenied)
    assert "the connection has none" in error.message


@KINDS
def test_sockets_are_connected_to_only_by_a_setting_and_with_a_password(kind: str, tmp_path: Path) -> None:
    with greeter(CLEARTEXT, path=tmp_path) as (server, credentials):
        error = refusal(kind, credentials)
        assert "EMBEDD_ALLOW_UNIX_SOCKETS" in error.resolution
        error = refusal(kind, {**credentials, "password": ""}, allow_unix_sockets=True)
        assert "a password is required" in error.message
        assert not server.heard
        refusal(kind, credentials, allow_unix_sockets=True)
        assert server.heard
        server.heard.clear()
        for host in (f"@{tmp_path}", str(tmp_path) + "/", "%2F" + str(tmp_path)[1:].replace("/", "%2F")):
            refusal(kind, {**credentials, "host": host})
        with pytest.raises(ConfigurationError):
            check(kind, {**credentials, "host": f"127.0.0.1,{tmp_path}"})
        with pytest.raises(ConfigurationError):
            check(kind, {**credentials, "host": ""})
        refusal(kind, {**credentials, "host": "no-such-host.invalid", "database": f"host={tmp_path} dbname=d"})
        assert not server.heard


@KINDS
def test_the_service_s_own_environment_does_not_log_a_user_in(
    kind: str, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_url(database_url)
    passwords, services = tmp_path / "passwords", tmp_path / "services"
    passwords.write_text(f"*:*:*:*:{url.password}\n")
    passwords.chmod(0o600)
    services.write_text(f"[own]\npassword={url.password}\nhost=/nonexistent\nrequire_auth=none\nsslmode=disable\n")
    for name, value in {
        "PGPASSFILE": str(passwords), "PGPASSWORD": str(url.password), "PGSERVICEFILE": str(services),
        "PGSERVICE": "own", "PGREQUIREAUTH": "none", "PGHOST": "/nonexistent", "PGTARGETSESSIONATTRS": "standby",
        "PGOPTIONS": "-c no_such_setting=1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert isinstance(refusal(kind, credentials_of(database_url, password="")), SourceAccessDenied)
    check(kind, credentials_of(database_url))


@needs_pgbouncer
def test_a_server_that_asks_by_md5_is_accepted(database_url: str) -> None:
    with pgbouncer(make_url(database_url), "transaction", auth_type="md5") as url:
        check("source", credentials_of(url.render_as_string(hide_password=False)))
