"""The application: `uvicorn embedd_api.app:create_app --factory --http embedd_api.http_limits:LimitedHttp`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

from embedd_dagster import __version__
from embedd_dagster.settings import Settings, get_settings

from . import docs, errors, idempotency, logs
from .http_facts import STATE, HttpFacts
from .middleware import BodyLimit, RequestContext
from .parameters import KNOWN_PARAMETERS, KNOWN_PARAMETERS_WITHOUT_KEY
from .routers import (
    api_keys,
    connections,
    embedding_models,
    embedding_providers,
    environments,
    health,
    metrics,
    queries,
    tasks,
    vector_table_sync,
    vector_tables,
)
from .state import ApiState
from .strict_json import StrictRoute

_DESCRIPTION = """Keeps tables of your database searchable by meaning.

Every request except `/health`, `/ready` and `/metrics` needs `Authorization: Bearer sk_…` (`embedd keys create` makes a key).
`X-Environment-Id` selects its environment; the default is `prod`. The body of every response that is not 2xx is an error
envelope; [/docs/errors](/docs/errors) lists the codes. A POST that creates or starts something takes an `Idempotency-Key`."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application with these settings, by default those of the environment. It opens its connections when it starts."""
    settings = settings or get_settings()
    logs.configure()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        state = ApiState.open(settings)
        app.state.embedd = state
        try:
            yield {STATE: HttpFacts(settings.api_url, settings.max_connections)}
        finally:
            state.close()

    app = FastAPI(
        title="embedd",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.router.route_class = StrictRoute
    errors.install(app)
    idempotency.install(app)
    # the last one added is the outermost
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestContext)
    # first: routes are matched in order, and most requests are queries
    app.include_router(queries.router, prefix="/v1")
    app.include_router(health.router, dependencies=KNOWN_PARAMETERS_WITHOUT_KEY)
    app.include_router(metrics.router, dependencies=KNOWN_PARAMETERS_WITHOUT_KEY)
    v1 = APIRouter(prefix="/v1", route_class=StrictRoute, dependencies=KNOWN_PARAMETERS)
    for module in (
        environments,
        api_keys,
        connections,
        embedding_providers,
        embedding_models,
        vector_tables,
        vector_table_sync,
        tasks,
    ):
        v1.include_router(connections.build_router() if module is connections else module.router)
    app.include_router(v1)
    app.include_router(docs.router)
    return app
