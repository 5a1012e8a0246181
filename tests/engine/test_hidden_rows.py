"""A table of which row-level security shows the connection's role nothing is not built as an empty one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import pytest

from embedd_dagster.catalog import connections
from embedd_dagster.connectors.postgresql.credentials_model import PostgresqlCredentials
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.engine import validation
from embedd_dagster.errors import SourceAccessDenied
from tests.engine.conftest import COLUMNS, Product


@pytest.fixture
def role(product: Product) -> Iterator[str]:
    """The role of the product's connection, which may read the table and not more."""
    name = f"reader_{uuid4().hex[:8]}"
    product.sql(f"CREATE ROLE {name} LOGIN PASSWORD 'word'; GRANT SELECT ON products TO {name}")
    with product.runtime.catalog.transaction() as session:
        connection = connections.get(session, product.environment_id, product.connection().id, lock=True)
        credentials = connections.open_credentials(connection, product.runtime.box)
        other = PostgresqlCredentials(**{**credentials, "user": name, "password": "word"})
        connections.set_credentials(connection, product.runtime.box, other.model_dump())
        connections.record_test(connection, None)
    yield name
    product.sql(f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.mark.parametrize("product", [Mode.MANAGED], indirect=True, ids=["qdrant"])
def test_a_table_that_policies_hide_is_refused_at_admission_and_at_the_run(product: Product, role: str) -> None:
    product.sql("ALTER TABLE products ENABLE ROW LEVEL SECURITY")
    configuration = product.table().configuration
    with pytest.raises(SourceAccessDenied, match="Row-level security hides all"):
        validation.admit_change(
            product.runtime, product.connection(), None, replace(configuration, columns=COLUMNS[:1]), configuration
        )
    with pytest.raises(SourceAccessDenied):
        product.run()
    table = product.table()
    assert (table.sync_status, table.live_version) == (SyncStatus.ERROR, None)
    assert f'FOR SELECT TO "{role}" USING (true);' in (table.last_error or "")
    product.sql(f"CREATE POLICY p ON products TO {role} USING (id <= 10)")
    assert product.run().point_count == 10
    product.sql("DROP POLICY p ON products")
    with pytest.raises(SourceAccessDenied):
        product.run(TaskType.SYNC, confirm_mass_delete=True)
    assert len(product.points()) == 10, "what is live stays live"
