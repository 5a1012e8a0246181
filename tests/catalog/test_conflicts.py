"""What two creations at once make of each other: a name is taken once, a storage name is nobody's concern."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy.orm import Session

from embedd_dagster.catalog import connections, environments, vector_tables
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.migrate import upgrade
from embedd_dagster.catalog.secrets import SecretBox, new_encryption_key
from embedd_dagster.catalog.tables import Environment, VectorTable
from embedd_dagster.catalog.vector_tables import NewVectorTable
from embedd_dagster.core.vector_table import Column, ColumnRole, Mode, SyncMode, VectorConfiguration
from embedd_dagster.errors import Conflict

SAME, OTHER = "vt_same1234", "vt_other567"


@pytest.fixture
def catalog(database_url: str) -> Iterator[Catalog]:
    upgrade(database_url)
    opened = Catalog(database_url)
    yield opened
    opened.close()


@pytest.fixture
def homes(catalog: Catalog) -> list[tuple[str, str]]:
    """Two environments, each with a connection."""
    box, found = SecretBox([new_encryption_key()]), []
    with catalog.transaction() as session:
        first = environments.ensure_defaults(session)
        for environment in (first, environments.create(session, first.org_id, "staging")):
            connection = connections.create(
                session, box, environment, name="c", provider="postgresql", mode="managed", credentials={}
            )
            found.append((environment.id, connection.id))
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The beginnings of the ids that are drawn; the first two are the same."""
    ids: list[str] = []

    def draw(_prefix: str) -> str:
        ids.append(SAME if len(ids) < 2 else OTHER)
        return f"{ids[-1]}{len(ids):018}"

    monkeypatch.setattr(vector_tables, "new_id", draw)
    return ids


def _create(session: Session, home: tuple[str, str], name: str = "products") -> VectorTable:
    configuration = VectorConfiguration(
        source_table="products",
        primary_key_column="id",
        columns=(Column("title", ColumnRole.EMBEDDING),),
        embedding_model="m",
        embedding_dimensions=8,
        embedding_provider_id=None,
    )
    new = NewVectorTable(name, home[1], configuration, Mode.MANAGED, SyncMode.BATCH)
    return vector_tables.create(session, session.get_one(Environment, home[0]), new)


def test_an_id_whose_storage_name_is_taken_is_not_used(
    catalog: Catalog, homes: list[tuple[str, str]], drawn: list[str]
) -> None:
    with catalog.transaction() as session:
        names = [_create(session, home).storage_name for home in homes]
    assert names == ["vt_same1234_products", "vt_other567_products"]
    assert drawn == [SAME, SAME, OTHER]


def test_a_name_that_another_transaction_takes_at_the_same_moment_is_a_conflict(
    catalog: Catalog, homes: list[tuple[str, str]], drawn: list[str]
) -> None:
    created, go_on = threading.Event(), threading.Event()

    def first() -> None:
        with catalog.transaction() as session:
            _create(session, homes[0])
            created.set()
            go_on.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    assert created.wait(10)
    threading.Timer(0.3, go_on.set).start()
    with catalog.transaction() as session:
        second = _create(session, homes[1])  # waits for the first
    thread.join()
    assert (second.storage_name, drawn) == ("vt_other567_products", [SAME, SAME, OTHER])
    with catalog.transaction() as session:
        assert session.query(VectorTable).count() == 2


def test_two_names_of_one_slug_in_one_environment(
    catalog: Catalog, homes: list[tuple[str, str]], drawn: list[str]
) -> None:
    with catalog.transaction() as session:
        names = [_create(session, homes[0], name).storage_name for name in ("my table", "my/table")]
    assert names == ["vt_same1234_my-table", "vt_other567_my-table"]


@pytest.mark.usefixtures("drawn")
def test_a_name_is_taken_once(catalog: Catalog, homes: list[tuple[str, str]]) -> None:
    with catalog.transaction() as session:
        _create(session, homes[0])
        with pytest.raises(Conflict, match="taken by another vector table") as caught:
            _create(session, homes[0])
        assert caught.value.code == "name_conflict"
        _create(session, homes[1])
