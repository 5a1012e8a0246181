"""Liveness and readiness; no key is needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, Final, Literal

import httpx
from fastapi import APIRouter, Query, Request, Response

from embedd_dagster import __version__
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import EmbeddError

from ..error_codes import ErrorEnvelope
from ..errors import error_response
from ..schemas.health import HealthAnswer, NotReadyAnswer, PartAnswer, ReadyAnswer, ServiceAnswer
from ..state import ApiState

router = APIRouter(tags=["Health"])

_TIMEOUT_SECONDS: Final = 3.0
_CODES: Final = {
    "catalog": "catalog_unavailable",
    "dagster": "orchestrator_unavailable",
}


_LINKS: Final = {
    "documentation": "/docs",
    "openapi": "/openapi.json",
    "error_codes": "/docs/errors",
    "health": "/health",
    "ready": "/ready",
    "metrics": "/metrics",
    "api": "/v1",
}


@router.get("/")
async def get_service() -> ServiceAnswer:
    """Tell what answers here, and where its documentation is."""
    return ServiceAnswer(name="embedd", version=__version__, links=_LINKS)


@router.get("/health")
async def get_health() -> HealthAnswer:
    """Tell that the process lives."""
    # in the event loop: the threads may all be waiting for somebody
    return HealthAnswer(status="ok")


@router.get(
    "/ready",
    response_model=ReadyAnswer,
    responses={
        422: {"model": ErrorEnvelope, "description": "`validation_error`: a parameter is not accepted"},
        503: {"model": NotReadyAnswer, "description": "A part that the service needs does not answer"},
    },
)
def get_ready(
    request: Request,
    purpose: Annotated[
        Literal["query"] | None,
        Query(alias="for", description="`query`: only what queries need, so without Dagster; left out, everything"),
    ] = None,
) -> Any:
    """Tell whether the catalog, Dagster and the vector store answer, each by name."""
    state: ApiState = request.app.state.embedd
    parts = check_parts(state, without={"dagster"} if purpose == "query" else frozenset())
    checks = {name: part.model_dump() for name, part in parts.items()}
    down = [name for name, part in parts.items() if part.status == "down"]
    if not down:
        return {"status": "ready", "checks": checks}
    first = down[0]
    response: Response = error_response(
        request.scope,
        _CODES.get(first, "vector_store_unavailable"),
        f"Not ready: {', '.join(down)} down. {parts[first].error}",
        "Check that it is up and reachable from here.",
        headers={"Retry-After": "5"},
        extra={"status": "not_ready", "checks": checks},
    )
    return response


def check_parts(state: ApiState, *, without: Set[str] = frozenset()) -> dict[str, PartAnswer]:
    """Every part (without some), asked at the same time."""
    token = state.settings.dagster_token
    dagster_headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token else {}
    checks: dict[str, Callable[[], None] | None] = {
        "catalog": state.runtime.catalog.check,
        "dagster": _get(f"{state.settings.dagster_url.rstrip('/')}/server_info", dagster_headers)
        if state.settings.dagster_url
        else None,
        state.settings.managed_store: partial(_check_store, state.runtime),
    }
    checks = {name: check for name, check in checks.items() if name not in without}
    with ThreadPoolExecutor(len(checks)) as workers:
        return dict(zip(checks, workers.map(_check, checks.values()), strict=True))


def _get(url: str, headers: dict[str, str] | None = None) -> Callable[[], None]:
    def get() -> None:
        with httpx.Client(timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
            client.get(url, headers=headers).raise_for_status()

    return get


def _check_store(runtime: Runtime) -> None:
    # by the store's own call, which needs the key: a wrong key is not ready
    with runtime.open_managed_store(read_timeout_seconds=_TIMEOUT_SECONDS) as store:
        store.check()


def _check(check: Callable[[], None] | None) -> PartAnswer:
    if check is None:
        return PartAnswer(status="not_configured", latency_ms=None, error=None)
    begun = time.perf_counter()
    status: Literal["ok", "down"] = "ok"
    fault: str | None = None
    try:
        check()
    except EmbeddError as error:
        status, fault = "down", error.message
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        status, fault = "down", f"It does not answer ({type(error).__name__})."
    return PartAnswer(status=status, latency_ms=round((time.perf_counter() - begun) * 1000, 1), error=fault)
