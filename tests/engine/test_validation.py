"""What validation decides by itself; what it asks of a real source is tested through the API."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from embedd_dagster.catalog.tables import Connection, EmbeddingProvider
from embedd_dagster.connectors.spec import StoreCapabilities
from embedd_dagster.core.vector_table import Column, ColumnRole, FilterType, SyncMode, VectorConfiguration
from embedd_dagster.engine import validation
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import NotReady, ValidationFailed

CONFIGURATION = VectorConfiguration(
    source_table="t",
    primary_key_column="id",
    columns=(Column("title", ColumnRole.EMBEDDING),),
    embedding_model="all-MiniLM-L6-v2",
    embedding_dimensions=384,
    embedding_provider_id="ep_1",
)
PROVIDER = EmbeddingProvider(id="ep_1", provider="local", base_url=None)
NOWHERE = Connection(id="conn_1", name="gone", provider="postgresql", mode="managed", status="failed")
LIMITS = StoreCapabilities(max_dimensions=16_000, max_name_length=255)
NO_RUNTIME = cast(Runtime, SimpleNamespace(store_capabilities=lambda *_: LIMITS))


@pytest.mark.parametrize(
    ("mode", "schedule", "interval"),
    [
        (SyncMode.BATCH, None, None),
        (SyncMode.BATCH, "*/15 * * * *", None),
        (SyncMode.BATCH, "0 3 * * mon-fri", None),
        (SyncMode.CDC, None, None),
        (SyncMode.CDC, None, 1),
        (SyncMode.CDC, None, 3600),
    ],
)
def test_good_schedules(mode: SyncMode, schedule: str | None, interval: int | None) -> None:
    validation.check_schedule(mode, schedule, interval)


@pytest.mark.parametrize(
    ("mode", "schedule", "interval", "says"),
    [
        (SyncMode.BATCH, None, 5, "sync_interval_seconds"),
        (SyncMode.CDC, "* * * * *", None, "sync_schedule"),
        (SyncMode.CDC, None, 0, "sync_interval_seconds"),
        (SyncMode.CDC, None, 3601, "sync_interval_seconds"),
        (SyncMode.BATCH, "", None, "sync_schedule"),
        (SyncMode.BATCH, "* * * *", None, "sync_schedule"),
        (SyncMode.BATCH, "* * * * * *", None, "sync_schedule"),
        (SyncMode.BATCH, "60 * * * *", None, "sync_schedule"),
        (SyncMode.BATCH, "@hourly", None, "sync_schedule"),
        (SyncMode.BATCH, "* * * * tomorrow", None, "sync_schedule"),
        (SyncMode.BATCH, "٥ * * * *", None, "sync_schedule"),
        (SyncMode.BATCH, "r r r r r", None, "sync_schedule"),
        (SyncMode.BATCH, "0 0 30 2 *", None, "sync_schedule"),
    ],
)
def test_bad_schedules(mode: SyncMode, schedule: str | None, interval: int | None, says: str) -> None:
    with pytest.raises(ValidationFailed, match=says):
        validation.check_schedule(mode, schedule, interval)


def test_a_source_that_is_down_does_not_stop_what_does_not_concern_it() -> None:
    assert _change() == CONFIGURATION
    with pytest.raises(NotReady) as caught:
        _change(columns=(Column("other", ColumnRole.EMBEDDING),))
    assert caught.value.code == "connection_not_ready"


def test_a_change_is_checked_by_itself_before_anything_is_asked() -> None:
    for dimensions in (0, 100, 16_001):
        with pytest.raises(ValidationFailed, match="embedding_dimensions"):
            _change(embedding_dimensions=dimensions)
    with pytest.raises(ValidationFailed, match="role `embedding`"):
        _change(columns=(Column("price", ColumnRole.METADATA, filter_type=FilterType.FLOAT),))


def _change(**changes: Any) -> VectorConfiguration:
    new = replace(CONFIGURATION, **changes)
    return validation.admit_change(NO_RUNTIME, NOWHERE, PROVIDER, CONFIGURATION, new)
