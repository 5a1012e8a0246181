"""The command line: `embedd up | down | status | demo | keys | migrate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from embedd_dagster import logs
from embedd_dagster.errors import EmbeddError

P = ParamSpec("P")
R = TypeVar("R")

# No markup anywhere: in help, messages and tables, what stands in [brackets] is text.
app = typer.Typer(
    help="Keeps the tables of your database searchable by meaning.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(
    help="API keys, and the key that stored credentials are encrypted with.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(keys_app, name="keys")

StateDir = Annotated[Path, typer.Option("--state-dir", help="Where the embedded stack keeps its state.")]
_DEFAULT_STATE_DIR = Path(".embedd")
_console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
_errors = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _explained(command: Callable[P, R]) -> Callable[P, R]:
    """Our own errors, and the system's about files, end a command with a message and what to do, not with a stack trace."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        logs.lose_unwritable_lines()
        try:
            return command(*args, **kwargs)
        except EmbeddError as error:
            _fail(error.message, error.resolution)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}", "Check the file's permissions and the space left on its disk.")

    return run


def _fail(message: str, resolution: str) -> NoReturn:
    _errors.print(Text.assemble(("Error:", "bold red"), " ", message))
    _errors.print(resolution)
    raise typer.Exit(1)


@app.command()
@_explained
def up(
    state_dir: StateDir = _DEFAULT_STATE_DIR,
    *,
    code_location: Annotated[
        str, typer.Option(help="The module of Dagster's definitions; your own contains embedd's (docs/how-to).")
    ] = "embedd_dagster.definitions",
) -> None:
    """Run the whole stack until Ctrl-C: API, Dagster, and PostgreSQL and Qdrant unless you name your own."""
    from embedd_dagster.stack.control import Endpoints
    from embedd_dagster.stack.stack import Stack, StackSettings

    def ready(endpoints: Endpoints) -> None:
        _console.print("embedd is up.", style="bold green")
        _console.print(f"  API      {endpoints.api}/docs")
        _console.print(f"  Dagster  {endpoints.dagster_login}")
        _console.print(f"  Qdrant   {endpoints.qdrant}   (its key is in endpoints.json)")
        _console.print(f"  State    {state_dir.resolve()}   (addresses in endpoints.json, logs in logs/)")
        _console.print("Make a key with `embedd keys create`. Ctrl-C stops everything.")

    def stopping() -> None:
        _console.print("Stopping … Runs hand their tasks back first. Ctrl-C again stops at once.")

    _console.print("Starting …")
    settings = StackSettings(code_location_module=code_location, tell=lambda step: _console.print(f"  {step}"))
    Stack(state_dir, settings=settings).up(on_ready=ready, on_stopping=stopping)
    _console.print("Stopped.")


@app.command()
@_explained
def down(
    state_dir: StateDir = _DEFAULT_STATE_DIR,
    *,
    remove_state: Annotated[bool, typer.Option("--remove-state", help="Also delete everything it has stored.")] = False,
) -> None:
    """Stop the stack that `embedd up` started, children included."""
    from embedd_dagster.stack import control

    stopped = control.down(state_dir)
    if remove_state:
        control.discard(state_dir)
    _console.print("Stopped." if stopped else "Nothing was running.")


@app.command()
@_explained
def status(state_dir: StateDir = _DEFAULT_STATE_DIR) -> None:
    """Show which parts of the stack run, and where."""
    from embedd_dagster.stack import control

    found = control.status(state_dir)
    problems = control.find_problems(state_dir, found)
    state = "degraded" if problems and found.state == "ready" else found.state
    _console.print(Text.assemble((state, "bold"), f" (process {found.pid})" if found.pid else ""))
    for name, child in found.children.items():
        _console.print(f"  {name:18} {child['state']}")
    if found.endpoints:
        _console.print(f"API {found.endpoints.api}/docs · Dagster {found.endpoints.dagster_login}")
    for problem in problems:
        _console.print(problem)


@app.command()
@_explained
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Embed a few modules instead of the whole library.")] = False,
) -> None:
    """Set up everything, embed Python's own documentation, ask it three questions, and shut down again."""
    from embedd_dagster.stack.demo import run_demo
    from embedd_dagster.stack.stdlib_docs import SMALL_SELECTION

    run_demo(_console, SMALL_SELECTION if quick else None)


@app.command()
@_explained
def migrate() -> None:
    """Bring the catalog behind EMBEDD_DATABASE_URL up to date; for installations without `embedd up`."""
    from embedd_dagster.catalog.migrate import upgrade
    from embedd_dagster.settings import read_settings

    upgrade(read_settings().database_url.get_secret_value())
    _console.print("The catalog is up to date.")


@keys_app.command("create")
@_explained
def create_key(
    environment: Annotated[
        str | None, typer.Option(help="Restrict the key to this environment; otherwise it is for all of them.")
    ] = None,
    *,
    read_only: Annotated[bool, typer.Option("--read-only", help="Only GETs and queries.")] = False,
    name: Annotated[str, typer.Option(help="What the key is for.")] = "command line",
    state_dir: StateDir = _DEFAULT_STATE_DIR,
) -> None:
    """Print a new API key. It is shown this once."""
    from embedd_dagster.catalog import api_keys, environments
    from embedd_dagster.catalog.api_keys import Permission
    from embedd_dagster.catalog.database import Catalog
    from embedd_dagster.errors import NotFound

    catalog = Catalog(_catalog_url(state_dir), pool_size=1)
    try:
        with catalog.transaction() as session:
            organization_id = environments.ensure_defaults(session).org_id
            scope = None
            if environment is not None:
                scope = environments.find_by_name(session, organization_id, environment)
                if scope is None:
                    raise NotFound("environment", environment, resolution="Make it with POST /v1/environments.")
            permission = Permission.READ_ONLY if read_only else Permission.FULL
            key = api_keys.create(session, organization_id, scope.id if scope else None, name, permission)
    finally:
        catalog.close()
    # nothing else on standard output: `KEY=$(embedd keys create)` must work
    sys.stdout.write(key.raw + "\n")


@keys_app.command("new-encryption-key")
def new_encryption_key() -> None:
    """Print a fresh key for EMBEDD_ENCRYPTION_KEYS."""
    from embedd_dagster.catalog.secrets import new_encryption_key as make

    sys.stdout.write(make() + "\n")


@keys_app.command("rotate-encryption")
@_explained
def rotate_encryption(state_dir: StateDir = _DEFAULT_STATE_DIR) -> None:
    """Re-encrypt all stored credentials under the first encryption key, while the service runs.

    Put the new key before the old one (in EMBEDD_ENCRYPTION_KEYS, or for the embedded catalog in .embedd/encryption_keys),
    restart the services, run this, then remove the old key.
    """
    from embedd_dagster.catalog.database import Catalog
    from embedd_dagster.catalog.rotation import rotate_encryption as rotate
    from embedd_dagster.catalog.secrets import SecretBox
    from embedd_dagster.stack.installation import External, find_encryption_keys

    keys = find_encryption_keys(state_dir.resolve(), External.of_environment()).split(",")
    box = SecretBox([key.strip() for key in keys if key.strip()])
    catalog = Catalog(_catalog_url(state_dir), pool_size=1)
    try:
        for table, count in rotate(catalog, box).items():
            _console.print(f"{count} {table.replace('_', ' ')} re-encrypted.")
    finally:
        catalog.close()


def _catalog_url(state_dir: Path) -> str:
    """The catalog's URL: of the running stack, otherwise of the environment."""
    from embedd_dagster.settings import read_settings
    from embedd_dagster.stack import control

    endpoints = control.status(state_dir).endpoints
    return endpoints.database_url if endpoints else read_settings().database_url.get_secret_value()


if __name__ == "__main__":
    app()
