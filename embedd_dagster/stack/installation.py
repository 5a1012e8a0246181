"""What the stack's children are given: where things are, under which key, in which variables.

These variables are the contract with the services, which read them through `settings.py`. They are read here too,
because each one that is set replaces an embedded part.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from embedd_dagster.errors import ConfigurationError
from embedd_dagster.settings import read_webserver_settings
from embedd_dagster.stack import files
from embedd_dagster.stack.state_dir import kept_encryption_keys, kept_secret

PROJECT_ROOT = Path(__file__).resolve().parents[2]
CATALOG_DATABASE = "embedd"
DAGSTER_DATABASE = "dagster"
_SOCKET_PATH_LIMIT = 100  # the kernel takes 107 characters; gRPC prefixes some


@dataclass(frozen=True, slots=True)
class External:
    """The parts that the user runs; none of them set means all embedded."""

    database_url: str | None
    dagster_database_url: str | None
    qdrant_url: str | None
    encryption_keys: str | None
    qdrant_api_key: str | None
    dagster_token: str | None

    @classmethod
    def of_environment(cls) -> External:
        """As the environment says; an empty variable is an unset one."""
        return cls(
            database_url=os.environ.get("EMBEDD_DATABASE_URL") or None,
            dagster_database_url=os.environ.get("EMBEDD_DAGSTER_DATABASE_URL") or None,
            qdrant_url=os.environ.get("EMBEDD_QDRANT_URL") or None,
            encryption_keys=os.environ.get("EMBEDD_ENCRYPTION_KEYS") or None,
            qdrant_api_key=os.environ.get("EMBEDD_QDRANT_API_KEY") or None,
            dagster_token=os.environ.get("EMBEDD_DAGSTER_TOKEN") or None,
        )


def find_encryption_keys(state_dir: Path, external: External) -> str:
    """The keys that stored credentials are encrypted with; generated at the first start of an embedded catalog.

    Raises:
        ConfigurationError: The catalog is the user's own and no key is given. One that lay in this directory would be
            lost with it, and every credential in the catalog with the key. Or the file of keys is damaged.
    """
    if external.encryption_keys:
        return external.encryption_keys
    if external.database_url:
        raise ConfigurationError(
            "EMBEDD_DATABASE_URL names your own database, but EMBEDD_ENCRYPTION_KEYS is not set.",
            resolution="Set it to the base64 of 32 random bytes (`openssl rand -base64 32`), and keep it safe: "
            "credentials in that database cannot be read without it.",
        )
    return kept_encryption_keys(state_dir)


def find_qdrant_api_key(state_dir: Path, external: External) -> str:
    """What the embedded Qdrant asks for, "" for a Qdrant of the user's that asks for nothing.

    Loopback alone protects it from nobody who opens a page: a browser sends what a page tells it to, also to 127.0.0.1.
    """
    if external.qdrant_api_key or external.qdrant_url:
        return external.qdrant_api_key or ""
    return kept_secret(state_dir / "qdrant_api_key")


def find_dagster_token(state_dir: Path, external: External) -> str:
    """What opens Dagster's UI; generated at the first start, and the same until its file is removed.

    Raises ConfigurationError if the environment's own one is too weak.
    """
    if external.dagster_token:
        return read_webserver_settings().dagster_token.get_secret_value()
    return kept_secret(state_dir / "dagster_token")


def driver_url(url: str, driver: str) -> str:
    """The URL for that driver of SQLAlchemy's, or for PostgreSQL's own programs where the driver is "postgresql"."""
    try:
        return make_url(url).set(drivername=driver).render_as_string(hide_password=False)
    except ArgumentError:
        raise ConfigurationError(
            "A database URL cannot be read.", resolution="Write it as postgresql://user:password@host:port/database."
        ) from None


def sibling_database_url(url: str, database: str) -> str:
    """Another database on the same server, by the same user."""
    return make_url(driver_url(url, "postgresql")).set(database=database).render_as_string(hide_password=False)


def open_dagster_home(state_dir: Path) -> Path:
    """Dagster's home, with the project's `dagster.yaml` as it is now."""
    home = state_dir / "dagster_home"
    files.write_private(home / "dagster.yaml", find_deployment_file("dagster.yaml").read_text(encoding="utf-8"))
    return home


def find_deployment_file(path: str) -> Path:
    """The copy that the wheel puts into this package, or else the file of the checkout, by its path there."""
    for candidate in (Path(__file__).with_name("deployment") / Path(path).name, PROJECT_ROOT / path):
        if candidate.is_file():
            return candidate
    raise ConfigurationError(
        f"{Path(path).name} is missing from the installation in {PROJECT_ROOT}.",
        resolution="Install it again: from a wheel, or in a checkout with `make setup`.",
    )


def find_code_socket(state_dir: Path) -> Path:
    """A path that a socket can have, in a directory that only this user can enter."""
    directory = state_dir / "run"
    if len(str(directory / "code.sock")) > _SOCKET_PATH_LIMIT:
        # The user's id is in the name, because another user's directory is rejected below.
        digest = hashlib.sha256(str(state_dir).encode()).hexdigest()[:12]
        directory = Path(tempfile.gettempdir()) / f"embedd-{os.getuid()}-{digest}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = directory.lstat()
    if directory.is_symlink() or owner.st_uid != os.getuid():
        raise ConfigurationError(f"{directory} belongs to somebody else.", resolution="Remove it, or set TMPDIR.")
    directory.chmod(0o700)
    return directory / "code.sock"


def child_environment(
    *, database_url: str, dagster_database_url: str, qdrant_url: str, qdrant_grpc_port: int | None, dagster_url: str,
    api_url: str, encryption_keys: str, qdrant_api_key: str, dagster_token: str, dagster_home: Path, code_socket: Path,
) -> dict[str, str]:  # fmt: skip
    """The environment of every child except PostgreSQL; without `qdrant_grpc_port`, that port stays as it is set."""
    grpc_port = {} if qdrant_grpc_port is None else {"EMBEDD_QDRANT_GRPC_PORT": str(qdrant_grpc_port)}
    return {
        **os.environ,
        **grpc_port,
        "EMBEDD_DATABASE_URL": database_url,
        "EMBEDD_DAGSTER_DATABASE_URL": driver_url(dagster_database_url, "postgresql+psycopg2"),
        "EMBEDD_QDRANT_URL": qdrant_url,
        "EMBEDD_DAGSTER_URL": dagster_url,
        "EMBEDD_QDRANT_API_KEY": qdrant_api_key,
        "EMBEDD_DAGSTER_TOKEN": dagster_token,
        "EMBEDD_API_URL": os.environ.get("EMBEDD_API_URL") or api_url,
        "EMBEDD_ENCRYPTION_KEYS": encryption_keys,
        "EMBEDD_DAGSTER_CODE_SOCKET": str(code_socket),
        "DAGSTER_HOME": str(dagster_home),
        "DAGSTER_DISABLE_TELEMETRY": "yes",
        "PYTHONUNBUFFERED": "1",  # a child that crashes leaves its last lines in the log
    }
