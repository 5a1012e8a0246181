"""Dagster's own webserver, mounted behind the guard in this process: it listens on no other port."""

from __future__ import annotations

import argparse
from pathlib import Path

import uvicorn
from dagster import DagsterInstance
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._utils.log import configure_loggers
from dagster_webserver.app import create_app_from_workspace_process_context
from dagster_webserver.version import __version__

from embedd_dagster.settings import WebserverSettings, read_webserver_settings
from embedd_dagster.webserver.guard import Guard

# as `dagster-webserver` has them
_STATEMENT_TIMEOUT_MILLISECONDS = 15_000
_POOL_RECYCLE_SECONDS = 3_600
_POOL_MAX_OVERFLOW = 20
_POLL_MILLISECONDS = 2_000


def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(prog="python -m embedd_dagster.webserver", description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--workspace", type=Path, required=True, help="Dagster's workspace.yaml")
    arguments = parser.parse_args()
    serve(read_webserver_settings(), host=arguments.host, port=arguments.port, workspace=arguments.workspace)


def serve(settings: WebserverSettings, *, host: str, port: int, workspace: Path) -> None:
    """The UI of the instance in DAGSTER_HOME, on that address, for those who have the token."""
    configure_loggers(log_level="INFO")
    with DagsterInstance.get() as instance:
        instance.optimize_for_webserver(_STATEMENT_TIMEOUT_MILLISECONDS, _POOL_RECYCLE_SECONDS, _POOL_MAX_OVERFLOW)
        with WorkspaceProcessContext(
            instance, version=__version__, workspace_load_target=WorkspaceFileTarget(paths=[str(workspace)])
        ) as context:
            app = create_app_from_workspace_process_context(context, live_data_poll_rate=_POLL_MILLISECONDS)
            guarded = Guard(app, token=settings.dagster_token.get_secret_value(), hosts=settings.dagster_hosts)
            uvicorn.run(
                guarded,
                host=host,
                port=port,
                log_level="warning",
                access_log=False,  # it would hold the token of a login link
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=5,
            )
