"""The configuration of a vector table: its order of columns, its refusals, and its ids and names."""

from dataclasses import replace

import pytest

from embedd_dagster.connectors.registry import embedder_spec
from embedd_dagster.core.ids import new_id
from embedd_dagster.core.models import check_model
from embedd_dagster.core.vector_table import (
    Column,
    ColumnRole,
    FilterType,
    VectorConfiguration,
    check_columns,
    storage_name,
)
from embedd_dagster.errors import ValidationFailed

TITLE = Column("TITLE", ColumnRole.EMBEDDING, ordinal=1, name_prefix="title: ")
BODY = Column("BODY", ColumnRole.EMBEDDING, ordinal=2)
NOTE = Column("NOTE", ColumnRole.EMBEDDING)
PRICE = Column("PRICE", ColumnRole.METADATA, filter_type=FilterType.FLOAT)
CONFIGURATION = VectorConfiguration("products", "ID", (PRICE, NOTE, BODY, TITLE), "m", 384)


def test_embedding_columns_stand_by_ordinal_and_those_without_one_last() -> None:
    assert CONFIGURATION.embedding_columns == (TITLE, BODY, NOTE)
    assert CONFIGURATION.column_names == ("TITLE", "BODY", "NOTE", "PRICE")


def test_a_column_may_stand_in_both_roles_and_is_read_once() -> None:
    both = replace(CONFIGURATION, columns=(TITLE, Column("TITLE", ColumnRole.METADATA, filter_type=FilterType.KEYWORD)))
    check_columns(both.columns)
    assert both.column_names == ("TITLE",)


def test_the_meaning_is_in_the_texts_and_the_metadata() -> None:
    other = Column("BODY", ColumnRole.EMBEDDING, ordinal=2)
    one = replace(CONFIGURATION, columns=(TITLE, other, PRICE))
    same = [
        (PRICE, TITLE, other),
        (replace(TITLE, ordinal=7), replace(other, ordinal=9), PRICE),
        (TITLE, replace(other, name_prefix="", ordinal=None), PRICE),
    ]
    for columns in same:
        assert replace(one, columns=columns).meaning == one.meaning
    others = [
        (replace(other, ordinal=1), replace(TITLE, ordinal=2), PRICE),
        (replace(TITLE, name_prefix=None), other, PRICE),
        (TITLE, other, replace(PRICE, filter_type=FilterType.KEYWORD)),
        (TITLE, other),
    ]
    for columns in others:
        assert replace(one, columns=columns).meaning != one.meaning
    assert replace(one, embedding_dimensions=one.embedding_dimensions + 1).meaning != one.meaning


def test_a_configuration_survives_the_catalog() -> None:
    assert VectorConfiguration.from_json(CONFIGURATION.to_json()) == CONFIGURATION


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ([PRICE], "at least one column with role `embedding`"),
        ([], "at least one column with role `embedding`"),
        ([TITLE, TITLE], "'TITLE' is given twice"),
        ([TITLE, replace(PRICE, filter_type=None)], "columns[1].filter_type"),
        ([replace(TITLE, filter_type=FilterType.FLOAT)], "columns[0].filter_type"),
        ([TITLE, replace(PRICE, name_prefix="x")], "columns[1]"),
        ([TITLE, replace(PRICE, name="$or")], "columns[1].name"),
        ([replace(TITLE, name=f"c{number}") for number in range(201)], "at most 200 columns"),
    ],
)
def test_columns_that_make_no_vector_table_are_named(columns: list[Column], named: str) -> None:
    with pytest.raises(ValidationFailed) as refused:
        check_columns(columns)
    assert named in refused.value.message


def test_the_storage_name_is_the_seeds() -> None:
    assert storage_name("vt_abc12345xyz", "product-search") == "vt_abc12345_product-search"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ('"; drop table x; --', "drop-table-x"),
        ("🦄", "table"),
        ("a/b c", "a-b-c"),
        ("-", "table"),
        ("x" * 100, "x" * 44),
    ],
)
def test_a_hostile_name_makes_a_harmless_storage_name(name: str, slug: str) -> None:
    assert storage_name("vt_abc12345xyz", name, max_length=56) == f"vt_abc12345_{slug}"


def test_ids_sort_by_their_second_and_differ_within_it() -> None:
    first = [new_id("vt", 1_700_000_000) for _ in range(1000)]
    assert len(set(first)) == 1000
    assert max(first) < min(new_id("vt", 1_700_000_001) for _ in range(10))
    assert len({identifier[:11] for identifier in first}) > 1, "the first 8 characters of an id differ within a second"


@pytest.mark.parametrize(
    ("provider", "model", "dimensions", "own_server", "accepted"),
    [
        ("openai", "text-embedding-3-small", 1536, False, True),
        ("openai", "text-embedding-3-small", 512, False, True),
        ("openai", "text-embedding-3-small", 1537, False, False),
        ("openai", "text-embedding-ada-002", 512, False, False),
        ("openai", "nomic-embed", 768, False, False),
        ("openai", "nomic-embed", 768, True, True),
        ("local", "all-MiniLM-L6-v2", 384, False, True),
        ("local", "all-MiniLM-L6-v2", 128, False, False),
        ("voyage", "voyage-3.5", 2048, False, True),
        ("voyage", "voyage-3.5", 300, False, False),
    ],
)
def test_dimensions_that_a_model_gives(
    provider: str, model: str, dimensions: int, own_server: bool, accepted: bool
) -> None:
    if accepted:
        check_model(provider, embedder_spec(provider).models, model, dimensions, own_server=own_server)
    else:
        with pytest.raises(ValidationFailed, match="embedding_"):
            check_model(provider, embedder_spec(provider).models, model, dimensions, own_server=own_server)


@pytest.mark.parametrize(("name", "dimensions"), [("text-embedding-ada-002", 384), ("text-embedding-3-small", 4096)])
def test_a_known_model_name_on_a_server_of_its_own_is_not_held_to_the_providers_dimensions(
    name: str, dimensions: int
) -> None:
    check_model("openai", embedder_spec("openai").models, name, dimensions, own_server=True, own_models=True)
    with pytest.raises(ValidationFailed, match="gives"):
        check_model("openai", embedder_spec("openai").models, name, dimensions, own_server=True)
