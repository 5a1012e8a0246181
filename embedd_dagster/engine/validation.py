"""What is checked before a vector table is created or changed: by itself, against the catalog, against the source.

Nothing is written here, neither to the catalog nor to a source or store, so nothing half-made stays behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final
from urllib.parse import urlsplit

from croniter import CroniterError, croniter  # type: ignore[import-untyped]

from embedd_dagster.catalog import connections, embedding_providers
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.connections import ConnectionStatus
from embedd_dagster.catalog.tables import Connection, EmbeddingProvider
from embedd_dagster.catalog.vector_tables import NewVectorTable
from embedd_dagster.connectors import registry
from embedd_dagster.core.models import check_model
from embedd_dagster.core.vector_table import Column, Mode, SyncMode, VectorConfiguration, check_columns
from embedd_dagster.deadlines import current_deadline
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import (
    ConfigurationError,
    NotReady,
    SourceRejected,
    SourceTableNotFound,
    ValidationFailed,
    VectorStoreRejected,
)
from embedd_dagster.protocols.cdc import CdcTable
from embedd_dagster.protocols.source import Selection, Source, SourceTable

MAX_SYNC_INTERVAL_SECONDS: Final = 3600
_CONNECT_TIMEOUT_SECONDS: Final = 5
_STATEMENT_TIMEOUT_SECONDS: Final = 30.0
_CRON_FIELDS: Final = 5
# without croniter's own `r` and `h`, which mean another time at every look
_CRON_FIELD: Final = re.compile(
    r"(\*|\?|\d{1,2}|[a-z]{3}|l\d?|\d#\d)([,/-](\*|\d{1,3}|[a-z]{3}|l\d?|\d#\d))*", re.ASCII
)


def open_source_briefly(
    runtime: Runtime, connection: Connection, *, statement_timeout_seconds: float = _STATEMENT_TIMEOUT_SECONDS
) -> Source:
    """The source behind a connection for somebody who waits for the answer; the caller closes it.

    Raises SecretUnreadable, ConfigurationError.
    """
    timeout = runtime.settings.request_timeout_seconds
    return registry.open_source(
        connection.provider,
        connections.open_credentials(connection, runtime.box),
        # libpq takes whole seconds, from 2 on
        connect_timeout_seconds=max(2, min(_CONNECT_TIMEOUT_SECONDS, round(timeout))),
        statement_timeout_seconds=min(statement_timeout_seconds, timeout),
        deny_private_networks=runtime.settings.deny_private_networks,
        allow_unix_sockets=runtime.settings.allow_unix_sockets,
        current_deadline=current_deadline,
    )


def check_connection(runtime: Runtime, connection: Connection) -> None:
    """Returns when the source answers and, in platform mode, vectors could be kept in it. Raises what is wrong."""
    with open_source_briefly(runtime, connection) as source:
        source.check()
    if connection.mode == Mode.PLATFORM:
        with runtime.open_platform_store(connection) as store:
            store.check()


def validate_vector_table(runtime: Runtime, environment_id: str, new: NewVectorTable) -> NewVectorTable:
    """The request as it may be written: columns spelled as the source does, with the schema of a platform table.

    Raises:
        ValidationFailed: A field is wrong by itself, or does not fit another, the provider, or the source's column.
        NotFound: There is no such connection or provider in the environment.
        NotReady: The connection has not passed its test.
        SourceTableNotFound: The table, or a column, is not in the source.
        SourceAccessDenied: The source refuses reading, or in platform mode writing.
    """
    configuration = new.configuration
    check_columns(configuration.columns)
    check_schedule(new.sync_mode, new.sync_schedule, new.sync_interval_seconds)
    with runtime.catalog.transaction() as session:
        connection = connections.get(session, environment_id, new.connection_id)
        provider_id = configuration.embedding_provider_id
        provider = embedding_providers.get(session, environment_id, provider_id) if provider_id is not None else None
    if connection.mode != new.mode:
        raise ValidationFailed(
            f"mode: the vector table is in {new.mode} mode, connection {connection.name!r} is in {connection.mode} mode.",
            resolution="Use a connection of the same mode.",
        )
    check_embedding(runtime, connection, provider, configuration)
    limits = runtime.store_capabilities(new.mode, connection)
    checked = _check_source(runtime, connection, configuration, check_key=True, sync_mode=new.sync_mode)
    name = _platform_name(runtime, connection) if new.mode is Mode.PLATFORM else None
    _check_prefixes(runtime, connection, checked.columns)
    return replace(new, configuration=checked, platform_name=name, max_name_length=limits.max_name_length)


def admit_change(
    runtime: Runtime,
    connection: Connection,
    provider: EmbeddingProvider | None,
    old: VectorConfiguration,
    new: VectorConfiguration,
) -> VectorConfiguration:
    """The changed configuration, ready to be written. Asks the source only if columns differ.

    Raises as `validate_vector_table`.
    """
    if new.columns != old.columns:
        check_columns(new.columns)
    if (new.embedding_model, new.embedding_dimensions) != (old.embedding_model, old.embedding_dimensions):
        check_embedding(runtime, connection, provider, new)
    is_moved = new.source_table != old.source_table
    if new.columns == old.columns and not is_moved:
        return new
    checked = _check_source(runtime, connection, new, check_key=is_moved)
    _check_prefixes(runtime, connection, checked.columns)
    return checked


def source_key_type(runtime: Runtime, connection: Connection, configuration: VectorConfiguration) -> str:
    """The source's own type name of the primary key. Raises as `Source.reader`."""
    selection = Selection(configuration.source_table, configuration.primary_key_column, configuration.column_names)
    with open_source_briefly(runtime, connection) as source:
        return source.reader(selection).key_type


def check_embedding(
    runtime: Runtime,
    connection: Connection,
    provider: EmbeddingProvider | None,
    configuration: VectorConfiguration,
) -> None:
    """Returns when the model gives these dimensions, and the store can hold them. Raises ValidationFailed."""
    model, dimensions = configuration.embedding_model, configuration.embedding_dimensions
    store = runtime.store_capabilities(Mode(connection.mode), connection)
    if not 1 <= dimensions <= store.max_dimensions:
        raise ValidationFailed(f"embedding_dimensions: a number from 1 to {store.max_dimensions} is accepted.")
    if provider is None:
        if registry.source_spec(connection.provider).embeds_itself:
            return
        raise ValidationFailed(
            f"embedding_provider_id: required, as source {connection.provider!r} cannot embed by itself.",
            resolution="Make one with POST /v1/embedding-providers, and give its id.",
        )
    spec, base_url = registry.embedder_spec(provider.provider), provider.base_url
    check_model(
        provider.provider,
        spec.models,
        model,
        dimensions,
        own_server=base_url is not None,
        own_models=base_url is not None and urlsplit(base_url).hostname not in spec.hosts,
    )


def check_schedule(mode: SyncMode, schedule: str | None, interval_seconds: int | None) -> None:
    """Returns when the fields are those of the sync mode, and the schedule is a cron. Raises ValidationFailed."""
    if mode is SyncMode.CDC and schedule is not None:
        raise ValidationFailed("sync_schedule: only batch tables have one; cdc tables have sync_interval_seconds.")
    if mode is SyncMode.BATCH and interval_seconds is not None:
        raise ValidationFailed("sync_interval_seconds: only cdc tables have one; batch tables have sync_schedule.")
    if interval_seconds is not None and not 1 <= interval_seconds <= MAX_SYNC_INTERVAL_SECONDS:
        raise ValidationFailed(
            f"sync_interval_seconds: a number from 1 to {MAX_SYNC_INTERVAL_SECONDS} is accepted, not {interval_seconds}."
        )
    if schedule is None:
        return
    if not _is_cron(schedule):
        raise ValidationFailed(
            "sync_schedule: a cron expression of five fields is accepted, such as `*/15 * * * *` (every 15 minutes, UTC)."
        )


def _is_cron(schedule: str) -> bool:
    """Whether it is a cron of five fields that comes round, as 30 February does not."""
    fields = schedule.lower().split()
    if len(fields) != _CRON_FIELDS or not all(_CRON_FIELD.fullmatch(field) for field in fields):
        return False
    try:
        croniter(schedule, now()).get_next()
    except (CroniterError, ValueError, TypeError, KeyError):
        return False
    return True


def _check_source(
    runtime: Runtime,
    connection: Connection,
    configuration: VectorConfiguration,
    *,
    check_key: bool,
    sync_mode: SyncMode = SyncMode.BATCH,
) -> VectorConfiguration:
    """The configuration with its columns spelled as the source does."""
    if connection.status != ConnectionStatus.CONNECTED:
        raise NotReady(
            f"Connection {connection.name!r} has not passed its test; its status is `{connection.status}`.",
            code="connection_not_ready",
            resolution="Correct its credentials and test it with POST /v1/connections/{id}/test.",
        )
    with open_source_briefly(runtime, connection) as source:
        table = source.describe(configuration.source_table)
        _check_key_type(table, configuration.primary_key_column)
        _check_columns_exist(source, table, configuration)
        spelled = replace(
            configuration,
            primary_key_column=_spelled(table, configuration.primary_key_column),
            columns=tuple(replace(column, name=_spelled(table, column.name)) for column in configuration.columns),
        )
        check_columns(spelled.columns)
        _check_filter_types(table, spelled.columns)
        if check_key:
            _check_key(source, spelled)
            if sync_mode is SyncMode.CDC:
                _check_followable(source, spelled)
    return spelled


def _check_columns_exist(source: Source, table: SourceTable, configuration: VectorConfiguration) -> None:
    names = (configuration.primary_key_column, *configuration.column_names)
    # by the database's own rules of case, and with its own message, which names what is missing
    source.reader(Selection(configuration.source_table, configuration.primary_key_column, configuration.column_names))
    if missing := [name for name in dict.fromkeys(names) if table.column(_spelled(table, name)) is None]:
        listed = ", ".join(repr(name) for name in missing)
        raise SourceTableNotFound(f"Table {configuration.source_table!r} has no column {listed}.", columns=missing)


def _spelled(table: SourceTable, name: str) -> str:
    """The column's name as the source spells it; the name itself where it has none like it."""
    known = [column.name for column in table.columns]
    alike = [spelling for spelling in known if spelling.lower() == name.lower()]
    for candidate in (name, name.lower(), name.upper(), *alike):
        if candidate in known:
            return candidate
    return name


def _check_filter_types(table: SourceTable, columns: Sequence[Column]) -> None:
    for index, column in enumerate(columns):
        described = table.column(column.name)
        if described is None or column.filter_type is None or column.filter_type in described.filter_types:
            continue
        accepted = ", ".join(sorted(described.filter_types))
        raise ValidationFailed(
            f"columns[{index}].filter_type: column {column.name!r} is of type {described.type}, whose values a"
            f" {column.filter_type} filter cannot hold; accepted: {accepted or 'none, it cannot be a metadata column'}."
        )


def _check_key_type(table: SourceTable, name: str) -> None:
    described = table.column(_spelled(table, name))
    if described is not None and not described.is_key_type:
        raise ValidationFailed(
            f"primary_key_column: column {described.name!r} is of type {described.type}; integers, text, uuid, numeric,"
            " dates and timestamps are accepted."
        )


def _check_key(source: Source, configuration: VectorConfiguration) -> None:
    try:
        source.check_key(configuration.source_table, configuration.primary_key_column)
    except SourceRejected as error:
        raise ValidationFailed(f"primary_key_column: {error.message}", resolution=error.resolution) from None


def _check_followable(source: Source, configuration: VectorConfiguration) -> None:
    try:
        source.check_cdc_eligible(CdcTable(configuration.source_table, configuration.primary_key_column))
    except SourceRejected as error:
        raise ValidationFailed(f"sync_mode: {error.message}", resolution=error.resolution) from None


def _platform_name(runtime: Runtime, connection: Connection) -> Callable[[str], str]:
    """Makes the name that users query from the name that a vector table is stored under."""
    try:
        with runtime.open_platform_store(connection) as store:
            store.check()
            return partial(registry.platform_store_spec(connection.provider).public_ref, store.schema)
    except (VectorStoreRejected, ConfigurationError) as error:
        raise ValidationFailed(f"mode: {error.message}", resolution=error.resolution) from None


def _check_prefixes(runtime: Runtime, connection: Connection, columns: Sequence[Column]) -> None:
    """Raises ValidationFailed for what would be in front of every text, where a platform database cannot hold it."""
    prefixes = [column.name_prefix or "" for column in columns]
    if connection.mode != Mode.PLATFORM or all(prefix.isascii() for prefix in prefixes):
        return
    with runtime.open_platform_store(connection) as store:
        refused = store.unholdable(prefixes)
    for index, reason in refused.items():
        raise ValidationFailed(
            f"columns[{index}].name_prefix: {reason}", resolution="Choose another name_prefix, or leave it out."
        )


def estimate_rows(runtime: Runtime, connection: Connection, source_table: str) -> int | None:
    """About how many rows the table has, by the source's own statistics: quick, and wrong after bulk changes.

    None where the source cannot say without counting. Raises as `Source.describe`.
    """
    with open_source_briefly(runtime, connection, statement_timeout_seconds=2.0) as source:
        return source.describe(source_table).row_estimate
