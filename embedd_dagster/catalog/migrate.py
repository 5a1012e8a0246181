"""Brings the catalog up to date: its schema (Alembic), and the environment `prod`. Safe to run by several at once."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import Session

from embedd_dagster.catalog.environments import ensure_defaults

_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK_ID = 0x656D6265  # "embe": one migration at a time


def alembic_config() -> Config:
    """Alembic's configuration, without an ini file."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    return config


def upgrade(database_url: str) -> None:
    """Applies every migration that is missing, and makes `prod`. Idempotent; waits for another process that is at it."""
    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
    config = alembic_config()
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:id)"), {"id": _LOCK_ID})
            try:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                with Session(connection) as session:
                    ensure_defaults(session)
                    session.commit()
            finally:
                connection.rollback()
                connection.execute(text("SELECT pg_advisory_unlock(:id)"), {"id": _LOCK_ID})
                connection.commit()
    finally:
        engine.dispose()
