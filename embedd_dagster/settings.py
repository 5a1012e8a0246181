"""The only reader of the environment: every `EMBEDD_…` variable, its type, its default and its reason."""

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
    """The installation's settings; `embedd up` sets those of its embedded parts itself."""

    model_config = SettingsConfigDict(env_prefix="EMBEDD_", frozen=True, extra="ignore")

    database_url: SecretStr = Field(description="The catalog: postgresql://user:password@host:port/database")
    encryption_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        description="Comma-separated base64 of 32 bytes each; the first encrypts, all decrypt"
    )
    qdrant_url: str = Field(description="Where managed vectors live")
    qdrant_api_key: SecretStr | None = None
    dagster_url: str | None = Field(default=None, description="Dagster's webserver; unset, the sensor launches alone")

    dagster_token: SecretStr | None = Field(default=None, description="Opens Dagster's UI and its GraphQL to the API")

    api_url: str | None = Field(default=None, description="Where users reach the API; linked from Dagster's metadata")
    rate_limit_per_minute: int = Field(default=60, ge=0, description="Requests a minute a key; 0 = off")
    redis_url: SecretStr | None = Field(default=None, description="Counts rate limits across processes")
    max_body_bytes: int = Field(default=2 * 2**20, ge=1024)
    max_connections: int = Field(
        default=1000,
        ge=8,
        description="Connections to one API process; fewer where its file descriptors do not suffice",
    )
    request_timeout_seconds: float = Field(
        default=30.0, gt=0, description="How long a request waits for a source, for a store and for a provider, each"
    )
    deny_private_networks: bool = Field(default=False, description="Refuse sources and providers in private networks")
    allow_unix_sockets: bool = Field(
        default=False,
        description="Let a connection's host be the directory of a Unix socket; a password is needed there too",
    )
    database_silence_seconds: float = Field(
        default=60.0,
        gt=0,
        description="After so long without a byte from a user's database, it is asked whether it still works; if it does"
        " not answer, the read fails and is tried again",
    )

    max_failed_rows_percent: float = Field(default=5.0, ge=0, le=100)
    max_task_attempts: int = Field(default=3, ge=1, le=20)
    shard_count: int = Field(default=2, ge=1, le=64, description="Key ranges of one table that are read at once")
    shard_pool: ShardPoolKind = Field(
        default=ShardPoolKind.THREADS,
        description="Where they are loaded: threads of the run's process, or processes of their own",
    )
    heartbeat_seconds: float = Field(default=5.0, gt=0)
    stale_after_seconds: float = Field(default=30.0, gt=0, description="A run without a heartbeat for so long is dead")
    retired_set_grace_seconds: float = Field(
        default=30.0, ge=0, description="How long a replaced vector set outlives the swap, for queries under way"
    )
    sync_schedule: str = Field(default="0 * * * *", description="Cron of batch tables that name none")
    full_sync_every: int = Field(
        default=24, ge=0, description="Every so-manieth sync compares all rows, whatever the digests say; 0 = never"
    )
    cdc_sync_schedule: str = Field(
        default="0 3 * * *", description="Cron (UTC) by which cdc tables are compared with their source all the same"
    )
    follow_poll_seconds: float = Field(
        default=0.1, gt=0, description="How long a follower waits before it looks for changes again"
    )
    follow_patience_seconds: float = Field(
        default=60.0,
        ge=0,
        description="How long one table's provider or store may hold up the others of its connection; then a sync is owed",
    )
    follow_renew_seconds: float = Field(
        default=6 * 3600.0, gt=0, description="After so long a follower's run is replaced, before its event log grows"
    )
    cdc_max_lag_bytes: int = Field(
        default=10 * 2**30, ge=0, description="Above so much log kept by a source for us, an alarm is given; 0 = never"
    )
    cdc_drop_above_max_lag: bool = Field(
        default=False, description="Then let the source forget its log, and compare by a sync instead"
    )
    run_retention_days: int = Field(
        default=30,
        ge=0,
        description="How long ended runs, with their events and logs, and ended tasks are kept; 0 = for ever",
    )
    outage_patience_seconds: float = Field(
        default=600.0, ge=0, description="How long a run waits for a source, store or provider that is down"
    )

    @field_validator("encryption_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("redis_url", "qdrant_api_key", "dagster_url", "dagster_token", "api_url", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        # compose files pass variables that are not set as ""
        return None if value == "" else value


class WebserverSettings(BaseSettings):
    """What Dagster's UI behind its guard needs: neither the catalog nor its keys."""

    model_config = SettingsConfigDict(env_prefix="EMBEDD_", frozen=True, extra="ignore", hide_input_in_errors=True)

    dagster_token: SecretStr = Field(description="Whoever has it may do everything in Dagster's UI")
    dagster_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Comma-separated names, without ports, that reach the UI beside the loopback ones"
    )

    @field_validator("dagster_token")
    @classmethod
    def _check_token(cls, value: SecretStr) -> SecretStr:
        token = value.get_secret_value()
        if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("at least 16 characters of ASCII without spaces (`openssl rand -hex 32`)")
        return value

    @field_validator("dagster_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        hosts = tuple(part.strip().lower() for part in value.split(",") if part.strip())
        if any("/" in host or (":" in host and not host.startswith("[")) for host in hosts):
            raise ValueError("names alone, as in dagster.example.com: no scheme, no port, no path")
        return hosts


def read_settings() -> Settings:
    """The settings of the present environment. Raises ConfigurationError that names each variable at fault."""
    return _read(Settings)


def read_webserver_settings() -> WebserverSettings:
    """As `read_settings`, for Dagster's webserver."""
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
