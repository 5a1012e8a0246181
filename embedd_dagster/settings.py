"""The only reader of the environment: every `EMBEDD_…` variable with its type, default and meaning.

`docs/reference/settings.md` is generated from this module: run `make docs` after a change.
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from typing import Annotated, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from embedd_dagster.errors import ConfigurationError

S = TypeVar("S", bound=BaseSettings)


class ShardPoolKind(StrEnum):
    """Where the shards of a backfill run."""

    THREADS = "threads"
    PROCESSES = "processes"


class Settings(BaseSettings):
    """The settings of all services. `embedd up` sets those of its embedded parts itself."""

    model_config = SettingsConfigDict(env_prefix="EMBEDD_", frozen=True, extra="ignore")

    database_url: SecretStr = Field(description="The catalog database: `postgresql://user:password@host:port/database`")
    encryption_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        description="Keys for stored credentials: base64 of 32 bytes each, comma-separated. The first one encrypts, all decrypt"
    )
    managed_store: str = Field(default="qdrant", description="The connector that stores the vectors of managed tables")
    qdrant_url: str = Field(description="The Qdrant server that stores the vectors of managed tables")
    qdrant_grpc_port: int | None = Field(
        default=6334,
        ge=0,
        le=65_535,
        description="Qdrant's gRPC port on the same host, for bulk writes; 0 or empty = REST only",
    )
    qdrant_api_key: SecretStr | None = Field(default=None, description="API key of that Qdrant server")
    dagster_url: str | None = Field(
        default=None,
        description="Dagster's webserver. If unset, the API launches no runs itself; the sensor `reconcile` does",
    )
    dagster_token: SecretStr | None = Field(
        default=None, description="Token with which the API logs in to Dagster's webserver"
    )
    api_url: str | None = Field(
        default=None,
        description="Address at which users reach the API, for links in Dagster's UI and in error messages",
    )
    rate_limit_per_minute: int = Field(default=60, ge=0, description="Requests per minute and API key; 0 = no limit")
    redis_url: SecretStr | None = Field(
        default=None, description="Redis in which all API processes count rate limits together; needs the extra `redis`"
    )
    max_body_bytes: int = Field(default=2 * 2**20, ge=1024, description="Largest body of a request")
    max_connections: int = Field(
        default=1000,
        ge=8,
        description="Open connections to one API process; fewer if the process may not open enough files",
    )
    request_timeout_seconds: float = Field(
        default=30.0, gt=0, description="How long a request waits for a source, a store and a provider, each"
    )
    deny_private_networks: bool = Field(
        default=False, description="Reject sources and providers with addresses in private networks"
    )
    allow_unix_sockets: bool = Field(
        default=False,
        description="Accept the directory of a Unix socket as the host of a connection; a password is still required",
    )
    database_silence_seconds: float = Field(
        default=60.0,
        gt=0,
        description="If a user's database sends nothing for so long, a second connection checks it. If the check fails, the "
        "read fails and is retried",
    )

    max_failed_rows_percent: float = Field(
        default=5.0, ge=0, le=100, description="A backfill with more failed rows than this fails and publishes nothing"
    )
    max_task_attempts: int = Field(default=3, ge=1, le=20, description="Runs that may work on a task before it fails")
    shard_count: int = Field(
        default=2, ge=1, le=64, description="Shards (key ranges) of one table that a backfill reads at once"
    )
    shard_pool: ShardPoolKind = Field(
        default=ShardPoolKind.THREADS,
        description="Where shards run: `threads` of the run's process, or child `processes`",
    )
    heartbeat_seconds: float = Field(default=5.0, gt=0, description="Time between two heartbeats of a run")
    stale_after_seconds: float = Field(
        default=30.0, gt=0, description="A run without a heartbeat for so long counts as dead"
    )
    retired_set_grace_seconds: float = Field(
        default=30.0, ge=0, description="How long a replaced vector set is kept, for queries in progress"
    )
    sync_schedule: str = Field(default="0 * * * *", description="Cron (UTC) of batch tables without a schedule")
    full_sync_every: int = Field(
        default=24, ge=0, description="Every Nth sync compares all rows, even if the digests match; 0 = never"
    )
    cdc_sync_schedule: str = Field(
        default="0 3 * * *", description="Cron (UTC) of the sync that compares CDC tables with their source"
    )
    follow_poll_seconds: float = Field(
        default=0.1, gt=0, description="How long a CDC consumer waits before it looks for changes again"
    )
    follow_patience_seconds: float = Field(
        default=60.0,
        ge=0,
        description="How long the provider or store of one table may delay the other tables of a CDC stream. After that the "
        "consumer goes on without the table, which is resynced",
    )
    follow_renew_seconds: float = Field(
        default=6 * 3600.0,
        gt=0,
        description="A CDC consumer's run is replaced after so long, to keep its event log short",
    )
    cdc_max_lag_bytes: int = Field(
        default=10 * 2**30,
        ge=0,
        description="Report an error when a source keeps more log than this for a CDC stream; 0 = never",
    )
    cdc_drop_above_max_lag: bool = Field(
        default=False, description="Above that limit, drop the slot, so that the source frees its log, and sync instead"
    )
    run_retention_days: int = Field(
        default=30,
        ge=0,
        description="How long ended runs, with their events and logs, and ended tasks are kept; 0 = forever",
    )
    outage_patience_seconds: float = Field(
        default=600.0, ge=0, description="How long a run retries a source, store or provider that is down"
    )

    @field_validator("encryption_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator(
        "redis_url", "qdrant_api_key", "qdrant_grpc_port", "dagster_url", "dagster_token", "api_url", mode="before"
    )
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        # Compose passes a variable that is not set as ""
        return None if value == "" else value


class WebserverSettings(BaseSettings):
    """The settings of Dagster's webserver, which needs neither the catalog nor its encryption keys."""

    model_config = SettingsConfigDict(env_prefix="EMBEDD_", frozen=True, extra="ignore", hide_input_in_errors=True)

    dagster_token: SecretStr = Field(
        description="Password for Dagster's UI, and token of the API; at least 16 characters"
    )
    dagster_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Host names under which the UI answers, besides loopback: comma-separated, without ports",
    )

    @field_validator("dagster_token")
    @classmethod
    def _check_token(cls, value: SecretStr) -> SecretStr:
        token = value.get_secret_value()
        if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("at least 16 ASCII characters without spaces are needed (`openssl rand -hex 32`)")
        return value

    @field_validator("dagster_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        hosts = tuple(part.strip().lower() for part in value.split(",") if part.strip())
        if any("/" in host or (":" in host and not host.startswith("[")) for host in hosts):
            raise ValueError("only host names are accepted, such as dagster.example.com: no scheme, no port, no path")
        return hosts


def read_settings() -> Settings:
    """The settings from the environment. Raises ConfigurationError that names each missing or invalid variable."""
    return _read(Settings)


def read_webserver_settings() -> WebserverSettings:
    """The settings of Dagster's webserver. Raises ConfigurationError as `read_settings` does."""
    return _read(WebserverSettings)


def _read(kind: type[S]) -> S:
    try:
        return kind()
    except ValidationError as error:
        faults = "; ".join(
            f"EMBEDD_{'_'.join(str(part) for part in fault['loc']).upper()}: {fault['msg']}" for fault in error.errors()
        )
        raise ConfigurationError(
            f"The environment does not configure embedd: {faults}.",
            resolution="Set the variables named, or start everything with `embedd up`, which sets them.",
        ) from None


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return read_settings()
