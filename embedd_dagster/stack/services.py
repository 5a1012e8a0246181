"""The children of a stack: what each runs, and how one sees that it is ready."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedd_dagster.stack.installation import PROJECT_ROOT, find_deployment_file
from embedd_dagster.stack.ports import LOOPBACK
from embedd_dagster.stack.postgres import EmbeddedPostgres
from embedd_dagster.stack.readiness import DaemonHeartbeat, accepts, answers, code_locations_loaded
from embedd_dagster.stack.supervisor import ChildSpec


@dataclass(frozen=True, slots=True)
class Services:
    """All that the children's commands are made of."""

    state_dir: Path
    environment: Mapping[str, str]
    ports: Mapping[str, int]
    code_socket: Path
    code_location_module: str
    dagster_database_url: str
    dagster_token: str
    postgres: EmbeddedPostgres | None
    """None where the user brings a database; the same for Qdrant below."""
    embedded_qdrant: bool
    replace: Mapping[str, Sequence[str]]


def service_specs(services: Services) -> dict[str, ChildSpec]:
    """By name, in the order in which they need each other."""
    specs = []
    if services.postgres is not None:
        specs.append(_postgres(services.postgres))
    if services.embedded_qdrant:
        specs.append(_qdrant(services))
    specs += [_code_server(services), _webserver(services), _daemon(services), _api(services)]
    return {spec.name: spec for spec in specs}


def _postgres(postgres: EmbeddedPostgres) -> ChildSpec:
    return ChildSpec(
        name="postgres",
        command=postgres.command(),
        environment=postgres.environment,
        directory=Path("/"),
        is_ready=postgres.is_ready,
        before_start=postgres.prepare,
        account=postgres.location.account,
        stop_signal=signal.SIGINT,  # "fast": cuts open connections, which SIGTERM would wait for
        death_signal=signal.SIGINT,
        ends_its_own_children=True,
        grace_seconds=15,
    )


def _qdrant(services: Services) -> ChildSpec:
    port = services.ports["qdrant"]
    data = services.state_dir / "qdrant"
    command = ["embedd_dagster.stack.qdrant.server", "--data", str(data), "--port", str(port), "--host", LOOPBACK]
    command += ["--grpc-port", str(services.ports["qdrant-grpc"])]
    return _python(services, "qdrant", command, is_ready=lambda: answers(port, "/readyz") == 200)


def _code_server(services: Services) -> ChildSpec:
    socket_path = services.code_socket
    command = ["dagster", "api", "grpc", "--socket", str(socket_path), "-m", services.code_location_module]
    command += ["--location-name", "embedd"]
    return _python(
        services,
        "code-server",
        command,
        is_ready=lambda: accepts(socket_path),
        # Runs are its children: a run that is asked to stop writes its checkpoint and hands its task back first.
        grace_seconds=30,
        # A killed server's socket would keep the next one from binding.
        before_start=lambda: socket_path.unlink(missing_ok=True),
    )


def _webserver(services: Services) -> ChildSpec:
    port = services.ports["dagster-webserver"]
    command = ["embedd_dagster.webserver", "--host", LOOPBACK, "--port", str(port)]
    command += ["--workspace", str(find_deployment_file("workspace.yaml"))]
    return _python(
        services,
        "dagster-webserver",
        command,
        is_ready=lambda: code_locations_loaded(port, services.dagster_token),
    )


def _daemon(services: Services) -> ChildSpec:
    heartbeat = DaemonHeartbeat(services.dagster_database_url)
    command = ["dagster._daemon", "run", "-w", str(find_deployment_file("workspace.yaml"))]
    return _python(services, "dagster-daemon", command, is_ready=heartbeat.beats, before_start=heartbeat.reset)


def _api(services: Services) -> ChildSpec:
    port = services.ports["api"]
    command = ["uvicorn", "embedd_api.app:create_app", "--factory", "--host", LOOPBACK, "--port", str(port)]
    # clients let go of idle connections first (httpx after 5 s): else a request meets one that is being closed
    command += ["--timeout-graceful-shutdown", "5", "--timeout-keep-alive", "75"]
    command += ["--http", "embedd_api.http_limits:LimitedHttp"]
    # Any answer: it listens when the application has started, and it may well say that another part is down.
    return _python(services, "api", command, is_ready=lambda: answers(port, "/health") is not None)


def _python(
    services: Services, name: str, module_and_arguments: Sequence[str], *, is_ready: Callable[[], bool], **others: Any
) -> ChildSpec:
    command = [sys.executable, "-m", *module_and_arguments]
    if name in services.replace:
        port = services.ports.get(name)
        command = [part.replace("{port}", str(port)) for part in services.replace[name]]
    return ChildSpec(
        name=name,
        command=command,
        environment=services.environment,
        directory=PROJECT_ROOT,  # where the packages `embedd_dagster` and `embedd_api` are found
        is_ready=is_ready,
        ready_timeout_seconds=300,  # a busy machine takes minutes to import Dagster
        **others,
    )
