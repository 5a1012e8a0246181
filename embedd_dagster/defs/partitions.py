"""The partitions: one a vector table, kept equal to the catalog by `reconcile_sensor`."""

from __future__ import annotations

import dagster as dg

vector_tables = dg.DynamicPartitionsDefinition(name="vector_tables")
"""The key is `vt_<first 8 of the id>_<name at creation>`, kept in the catalog as `partition_key`.

It is never used again, as a deleted partition's history comes back with its key: the id's first 8 begin with the second.
"""
