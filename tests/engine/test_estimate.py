"""The estimate: right about what a backfill then does, and without a call to the provider."""

from __future__ import annotations

from dataclasses import replace

import pytest

from embedd_dagster.core.status import TaskType
from embedd_dagster.engine.estimate import estimate
from embedd_dagster.errors import NotFound
from tests.engine.conftest import COLUMNS, Product


def test_an_estimate_before_anything_is_built(product: Product) -> None:
    product.sql("UPDATE products SET title = '', body = NULL WHERE id % 10 = 0")
    found = estimate(product.runtime, product.environment_id, product.vector_table_id)
    assert (found.rows, found.rows_reused) == (500, 0)
    assert found.rows_to_embed + found.rows_skipped == 500
    assert found.rows_to_embed == pytest.approx(450, abs=15)
    assert found.tokens > 0
    assert found.cost_usd > 0
    assert product.provider.stats()["requests"] == 0


def test_an_estimate_says_what_would_be_reused(product: Product) -> None:
    product.run()
    product.reconfigure(columns=COLUMNS[:3])
    found = estimate(product.runtime, product.environment_id, product.vector_table_id)
    assert (found.rows_to_embed, found.rows_reused, found.cost_usd) == (0, 500, 0.0)
    assert product.run(TaskType.REBACKFILL).rows_embedded == 0
    product.reconfigure(columns=(replace(COLUMNS[0], name_prefix="item: "), *COLUMNS[1:]))
    found = estimate(product.runtime, product.environment_id, product.vector_table_id)
    assert (found.rows_to_embed, found.rows_reused) == (500, 0)


def test_an_estimate_of_another_environments_table_is_a_404(product: Product) -> None:
    with pytest.raises(NotFound):
        estimate(product.runtime, "env_other", product.vector_table_id)
