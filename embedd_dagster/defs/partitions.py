"""The partitions: one for each vector table, kept equal to the catalog by `reconcile_sensor`."""

from __future__ import annotations

import dagster as dg

from embedd_dagster.core.run_names import PARTITION_SET

vector_tables = dg.DynamicPartitionsDefinition(name=PARTITION_SET)
"""The key is `vt_<first 8 of the id>_<name at creation>`, kept in the catalog as `partition_key`.

No two vector tables ever share one (the id begins with the time): a new partition would show the history of the old one.
"""
