"""Tables with rows that a provider cannot embed, from the source to the store, in both stores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embedd_dagster.catalog import embedding_providers, vector_tables
from embedd_dagster.core.status import TaskType
from embedd_dagster.errors import EmbeddingRejected
from embedd_dagster.protocols.store import SearchRequest
from tests.engine.conftest import Product
from tests.support.flask_provider import FlaskProvider, running_flask_provider

ROWS = 40
GUILTY = 17


@pytest.fixture(scope="module")
def flask_provider() -> Iterator[FlaskProvider]:
    with running_flask_provider() as running:
        yield running


@pytest.fixture
def provider(flask_provider: FlaskProvider) -> FlaskProvider:
    flask_provider.forget()
    return flask_provider


def use(product: Product, provider: FlaskProvider, server: str = "plain", **limits: int) -> None:
    """The table has few rows, and this server embeds them."""
    product.sql("DELETE FROM products WHERE id > %s", ROWS)
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.get(session, product.environment_id, product.vector_table_id, lock=True)
        assert table.embedding_provider_id is not None
        row = embedding_providers.get(session, product.environment_id, table.embedding_provider_id, lock=True)
        embedding_providers.set_credentials(row, product.runtime.box, {"base_url": provider.base_url(server)})
        embedding_providers.set_limits(row, limits)


def set_title(product: Product, title: str, key: int = GUILTY) -> None:
    product.sql("UPDATE products SET title = %s WHERE id = %s", title, key)


@pytest.mark.parametrize("word", ["ERROR500", "NAN"])
def test_one_row_without_a_usable_answer_is_one_failed_row(
    product: Product, provider: FlaskProvider, word: str
) -> None:
    use(product, provider)
    product.runtime.settings.__dict__.update(max_failed_rows_percent=5.0)
    set_title(product, word)
    report = product.run()
    assert (report.rows_embedded, report.rows_failed) == (ROWS - 1, 1)
    assert product.failed_keys() == [GUILTY]
    product.assert_true_to_source(without=[GUILTY])
    assert len(product.search("product", min_similarity_score=-1)) == 10

    # a sync of this one row has nothing else in flight
    set_title(product, f"{word} once more")
    assert product.run(TaskType.SYNC).rows_failed == 1
    set_title(product, "harmless")
    assert product.run(TaskType.SYNC).rows_failed == 0
    assert product.failed_keys() == []
    product.assert_true_to_source()


def test_vectors_of_any_size_are_all_found(product: Product, provider: FlaskProvider) -> None:
    use(product, provider)
    product.sql("UPDATE products SET title = title || ' HUGE'")
    assert product.run().rows_failed == 0
    keys = {hit.key for hit in product.search("product HUGE", min_similarity_score=-1)}
    assert len(keys) == 10
    with product.open_store() as store:
        vectors = store.vectors(product.live_set(), list(range(1, ROWS + 1)))
        found = store.search(product.live_set(), SearchRequest(vectors[1][1], limit=ROWS))
    assert len(found) == ROWS
    assert found[0].key == 1
    assert found[0].similarity_score == pytest.approx(1, abs=1e-5)


def test_huge_vectors_fit_an_index_of_half_floats(product: Product, provider: FlaskProvider) -> None:
    use(product, provider, "wide")
    product.reconfigure(model="text-embedding-3-large", dimensions=3072)
    product.sql("UPDATE products SET title = title || ' HUGE'")
    set_title(product, "ZEROS")
    product.runtime.settings.__dict__.update(max_failed_rows_percent=5.0)
    assert product.run().rows_failed == 1
    assert product.failed_keys() == [GUILTY]
    with product.open_store() as store:
        vectors = store.vectors(product.live_set(), [1])
        assert len(store.search(product.live_set(), SearchRequest(vectors[1][1], limit=ROWS))) == ROWS - 1


def test_a_model_that_gives_only_zeros_fails_the_run(product: Product, provider: FlaskProvider) -> None:
    use(product, provider, "zeros")
    with pytest.raises(EmbeddingRejected, match="direction"):
        product.run()
    assert product.latest_task().status == "failed"
    assert len(provider.seen()) <= 6


def test_rows_above_the_stated_limit_are_cut_and_counted_as_truncated(
    product: Product, provider: FlaskProvider
) -> None:
    use(product, provider, "vllm")
    set_title(product, "long " * 200)
    report = product.run()
    assert (report.rows_failed, report.rows_truncated) == (0, 1)
    product.assert_true_to_source()
    again = product.run()
    assert again.rows_embedded <= 1, "the others' vectors are reused"
