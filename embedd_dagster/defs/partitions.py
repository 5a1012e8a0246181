"""The partitions: one a vector table, kept equal to the catalog by `reconcile_sensor`."""

from __future__ import annotations

import dagster as dg

vector_tables = dg.DynamicPartitionsDefinition(name="vector_tables")
"""The key is the vector table's id. Ids are never reused, as a deleted partition's history comes back with its key."""
