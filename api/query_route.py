"""The short way of a query through the process: one thread, one question to the catalog, no dependencies to be solved.

Queries are what there are many of, so their route does by hand what FastAPI does for every other one, in the same order
and with the same answers: key, rate limit, environment, id, body. Its declaration in `routers/queries.py` is what the
OpenAPI says of it. They have threads of their own: those that wait for a slow provider hold up nobody but each other.
"""

from __future__ import annotations

import json
import time
from typing import Any, Final

import orjson
from anyio import to_thread
from fastapi import Response
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from embedd_dagster.catalog.environments import DEFAULT_ENVIRONMENT, EnvironmentWanted
from embedd_dagster.catalog.live_tables import LiveTable, authorize_query, find_live
from embedd_dagster.core.keys import render_key
from embedd_dagster.engine.search import Question, SearchAnswer, StageSeconds
from embedd_dagster.errors import NotFound, RowError, TransientError, ValidationFailed

from .auth import MAX_SHOWN, check_key_form
from .parameters import refuse_unknown_parameters
from .schemas.base import known_form
from .schemas.queries import QueryBody
from .state import ApiState
from .strict_json import StrictRoute, validate_body

_MAX_WAITING: Final = 256
_check_table_id: Final = known_form("vt", "vector_table")


class TooManyQueries(TransientError):
    """So many queries wait for a thread that another one would hardly be answered in time."""

    default_code = "too_many_queries"
    default_resolution = "Wait as long as Retry-After says. If it goes on: more API processes, or a faster provider."


class QueryRoute(StrictRoute):
    """Answers a POST by itself; what else comes is FastAPI's."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. What is raised becomes an envelope further out, as for every route."""
        if scope["method"] != "POST":
            await super().handle(scope, receive, send)
            return
        begun = time.perf_counter()
        state: ApiState = scope["app"].state.embedd
        queries = state.queries
        if queries.number >= queries.threads.total_tokens + _MAX_WAITING:
            raise TooManyQueries("Too many queries are under way.", retry_after_seconds=1.0)
        content = (await receive()).get("body", b"")  # whole: BodyLimit has read it
        query = _Query(state, scope, content)
        queries.number += 1
        try:
            answer = await to_thread.run_sync(query.answer, limiter=queries.threads)
        finally:
            queries.number -= 1
            state.metrics.query(query.stages, time.perf_counter() - begun)
        await Response(answer, media_type="application/json")(scope, receive, send)


class _Query:
    """One request, answered in a thread."""

    def __init__(self, state: ApiState, scope: Scope, content: bytes) -> None:
        self._state = state
        self._scope = scope
        self._content = content
        self.stages = StageSeconds()

    def answer(self) -> bytes:
        """The answer's body. Raises as every route does."""
        headers = Headers(scope=self._scope)
        scheme, key = get_authorization_scheme_param(headers.get("authorization"))
        raw_key = check_key_form(key if scheme.lower() == "bearer" and key else None)
        environment_id, vector_table_id, table = self._authorize(raw_key, headers.get("x-environment-id"))
        body = validate_body(QueryBody, headers.get("content-type"), self._content)
        question = Question(body.query, body.limit, body.min_similarity_score, body.filters)

        def refresh() -> LiveTable:
            return _found(find_live(self._state.runtime.catalog, environment_id, vector_table_id), vector_table_id)

        # from here on the answer's headers tell where the time goes
        self._scope["state"]["stages"] = self.stages
        try:
            found = self._state.searcher.search(
                _found(table, vector_table_id), question, refresh=refresh, stages=self.stages
            )
        except RowError:
            raise ValidationFailed(
                "query: the embedding provider refuses this text.", resolution="Ask in other words."
            ) from None
        return _rendered(body.query, found)

    def _authorize(self, raw_key: str, environment_id: str | None) -> tuple[str, str, LiveTable | None]:
        """The environment, the table's id, and the table if it is there. Raises as `auth.authenticate` does, and NotFound."""
        vector_table_id: str = self._scope["path_params"]["vector_table_id"]
        begun = time.perf_counter()
        access = authorize_query(
            self._state.runtime.catalog,
            raw_key,
            EnvironmentWanted.read(environment_id),
            _as_parameter(vector_table_id),
        )
        self.stages.catalog = time.perf_counter() - begun
        request_state = self._scope["state"]
        request_state["key_prefix"] = access.key_prefix
        standing, excess = self._state.rate_limiter.hit(access.counted_as)
        request_state["rate_limit"] = standing
        if excess is not None:
            raise excess
        if access.environment_id is None:
            wanted = DEFAULT_ENVIRONMENT if environment_id is None else environment_id
            raise NotFound("environment", wanted[:MAX_SHOWN])
        refuse_unknown_parameters(self._scope)
        return access.environment_id, _check_table_id(vector_table_id), access.table


def _as_parameter(vector_table_id: str) -> str:
    # what no database takes as a text, and is no id
    return "" if "\x00" in vector_table_id or not vector_table_id.isascii() else vector_table_id


def _found(table: LiveTable | None, vector_table_id: str) -> LiveTable:
    if table is None:
        raise NotFound("vector_table", vector_table_id)
    return table


def _rendered(query: str, found: SearchAnswer) -> bytes:
    results = [
        {
            "id": render_key(hit.key),
            "similarity_score": hit.similarity_score,
            "metadata": hit.metadata,
            "embedded_text": hit.embedded_text,
        }
        for hit in found.hits
    ]
    answer: dict[str, Any] = {
        "results": results,
        "query": query,
        "model": found.model,
        "total_results": len(results),
    }
    try:
        return orjson.dumps(answer)
    except TypeError:  # a numeric key beyond 64 bits
        return json.dumps(answer).encode()
