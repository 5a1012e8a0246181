"""Credentials at rest: sealed for their row, readable under any present key, rotated while the service runs."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy.orm import Session

from embedd_dagster.catalog import connections, embedding_providers, environments, idempotency
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.migrate import upgrade
from embedd_dagster.catalog.rotation import rotate_encryption
from embedd_dagster.catalog.secrets import SecretBox, new_encryption_key
from embedd_dagster.catalog.tables import Connection, EmbeddingProvider, IdempotencyKey
from embedd_dagster.errors import ConfigurationError, SecretUnreadable

OLD, NEW = new_encryption_key(), new_encryption_key()


def test_what_is_sealed_opens_again_and_shows_nothing() -> None:
    box = SecretBox([OLD])
    sealed = box.seal({"password": "s3cret @/:%"}, row_id="conn_1")
    assert b"s3cret" not in sealed
    assert box.open(sealed, row_id="conn_1") == {"password": "s3cret @/:%"}
    assert box.seal({"password": "x"}, row_id="conn_1") != box.seal({"password": "x"}, row_id="conn_1")


def test_a_sealed_value_opens_for_its_row_and_column_alone() -> None:
    box = SecretBox([OLD])
    sealed = box.seal({"a": 1}, row_id="conn_1")
    for other in ({"row_id": "conn_2"}, {"row_id": "conn_1", "column": "settings"}):
        with pytest.raises(SecretUnreadable):
            box.open(sealed, **other)
    with pytest.raises(SecretUnreadable):
        box.open(sealed[:-1] + bytes([sealed[-1] ^ 1]), row_id="conn_1")


def test_old_keys_decrypt_and_the_first_encrypts() -> None:
    sealed = SecretBox([OLD]).seal({"a": 1}, row_id="r")
    both = SecretBox([NEW, OLD])
    assert both.open(sealed, row_id="r") == {"a": 1}
    assert not both.is_current(sealed)
    assert SecretBox([NEW]).open(both.seal({"a": 1}, row_id="r"), row_id="r") == {"a": 1}
    with pytest.raises(SecretUnreadable, match="key that is not configured"):
        SecretBox([NEW]).open(sealed, row_id="r")


@pytest.mark.parametrize(
    "key", ["", "short", "AAAA", "not base64 !!", OLD[:-4]], ids=["empty", "short", "4", "no base64", "cut"]
)
def test_a_key_that_is_none_is_named_by_its_place(key: str) -> None:
    with pytest.raises(ConfigurationError, match="Key 2"):
        SecretBox([OLD, key])


@pytest.fixture
def catalog(database_url: str) -> Iterator[Catalog]:
    upgrade(database_url)
    opened = Catalog(database_url)
    old = SecretBox([OLD])
    with opened.transaction() as session:
        environment = environments.ensure_defaults(session)
        for number in range(250):
            connections.create(
                session,
                old,
                environment,
                name=f"c{number}",
                provider="postgresql",
                mode="managed",
                credentials={"host": "h", "password": SecretStr(f"p{number}")},
            )
        embedding_providers.create(
            session, old, environment, name="p", provider="openai", credentials={"api_key": "sk"}, limits={}
        )
    yield opened
    opened.close()


def test_rotation_reseals_everything_once(catalog: Catalog) -> None:
    both = SecretBox([NEW, OLD])
    assert rotate_encryption(catalog, both) == {"connections": 250, "embedding_providers": 1, "idempotency_keys": 0}
    assert rotate_encryption(catalog, both) == {"connections": 0, "embedding_providers": 0, "idempotency_keys": 0}
    new = SecretBox([NEW])
    with catalog.transaction() as session:
        opened = {connections.open_credentials(row, new)["password"] for row in session.query(Connection).all()}
        assert opened == {f"p{number}" for number in range(250)}
        provider = session.query(EmbeddingProvider).one()
        assert embedding_providers.open_credentials(provider, new) == {"api_key": "sk"}


def test_rotation_without_the_old_key_says_which_row_and_changes_nothing(catalog: Catalog) -> None:
    with pytest.raises(SecretUnreadable, match="conn_"):
        rotate_encryption(catalog, SecretBox([NEW]))
    assert rotate_encryption(catalog, SecretBox([NEW, OLD]))["connections"] == 250


def test_rotation_reseals_what_was_answered_and_forgets_what_no_key_opens(catalog: Catalog) -> None:
    lost, both = SecretBox([new_encryption_key()]), SecretBox([NEW, OLD])

    def claim(session: Session, box: SecretBox, key: str) -> idempotency.Claim | dict[str, Any]:
        return idempotency.claim(
            session,
            box,
            environment_id=environments.ensure_defaults(session).id,
            operation="POST /v1/environments",
            key=key,
            request_hash=b"x",
            lease=timedelta(minutes=1),
        )

    with catalog.transaction() as session:
        for box, key in ((SecretBox([OLD]), "kept"), (lost, "lost")):
            claimed = claim(session, box, key)
            assert isinstance(claimed, idempotency.Claim)
            idempotency.keep(session, box, claimed, {"body": key})
    assert rotate_encryption(catalog, both)["idempotency_keys"] == 1
    with catalog.transaction() as session:
        assert session.query(IdempotencyKey).count() == 1
        assert claim(session, SecretBox([NEW]), "kept") == {"body": "kept"}


def test_the_command_rotates(catalog: Catalog, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from embedd_dagster.cli import app

    for name, value in {"DATABASE_URL": database_url, "QDRANT_URL": "http://127.0.0.1:1"}.items():
        monkeypatch.setenv(f"EMBEDD_{name}", value)
    monkeypatch.setenv("EMBEDD_ENCRYPTION_KEYS", NEW)
    refused = CliRunner().invoke(app, ["keys", "rotate-encryption", "--state-dir", "/nonexistent"])
    assert refused.exit_code == 1
    assert "Traceback" not in refused.output
    monkeypatch.setenv("EMBEDD_ENCRYPTION_KEYS", f"{NEW},{OLD}")
    done = CliRunner().invoke(app, ["keys", "rotate-encryption", "--state-dir", "/nonexistent"])
    assert done.exit_code == 0, done.output
    assert "250 connections" in done.output


def test_credentials_that_no_model_made_are_refused_before_they_are_stored_in_clear() -> None:
    connection = Connection(id="conn_a")
    with pytest.raises(TypeError, match="stored in clear"):
        connections.set_credentials(
            connection, SecretBox([new_encryption_key()]), {"host": "db", "password": "in clear"}
        )
    assert not connection.settings
