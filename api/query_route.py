"""Queries take a short path through the process: one thread, one read of the catalog, no dependencies to resolve.

Most requests are queries, so their route calls by hand what FastAPI calls for every other route, in the same order: the
functions of `auth`, `parameters`, `strict_json` and the schema. The declaration in `routers/queries.py` is what the OpenAPI
document shows.
"""

from __future__ import annotations

import json
import time
from typing import Any, Final

import orjson
from anyio import to_thread
from fastapi import Response
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from embedd_dagster.catalog.live_tables import LiveTable, find_live
from embedd_dagster.core.keys import render_key
from embedd_dagster.engine.search import Question, SearchAnswer, StageSeconds
from embedd_dagster.errors import NotFound, RowError, ValidationFailed

from .auth import admit, find_caller_access
from .parameters import reject_unknown_parameters
from .schemas.base import valid_id
from .schemas.queries import QueryBody
from .state import ApiState
from .strict_json import StrictRoute, validate_body

_check_table_id: Final = valid_id("vt", "vector_table")


class QueryRoute(StrictRoute):
    """Answers a POST itself; FastAPI answers the other methods."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. As in every route, the application answers an exception with an error envelope."""
        if scope["method"] != "POST":
            await super().handle(scope, receive, send)
            return
        begun = time.perf_counter()
        state: ApiState = scope["app"].state.embedd
        with state.queries:
            content = (await receive()).get("body", b"")  # all of it: BodyLimit has read it
            query = _Query(state, scope, content)
            try:
                answer = await to_thread.run_sync(query.answer, limiter=state.query_threads)
            finally:
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
        """The body of the response. Raises the same errors as other routes."""
        state, request_state = self._state, self._scope["state"]
        headers = Headers(scope=self._scope)
        vector_table_id: str = self._scope["path_params"]["vector_table_id"]
        wanted = headers.get("x-environment-id")
        begun = time.perf_counter()
        access = find_caller_access(state, headers, wanted, _as_parameter(vector_table_id))
        self.stages.catalog = time.perf_counter() - begun
        environment_id = admit(state, request_state, access, wanted).id
        reject_unknown_parameters(self._scope)
        _check_table_id(vector_table_id)
        body = validate_body(QueryBody, headers.get("content-type"), self._content)
        question = Question(body.query, body.limit, body.min_similarity_score, body.filters)

        def refresh() -> LiveTable:
            return _found(find_live(state.runtime.catalog, environment_id, vector_table_id), vector_table_id)

        request_state["stages"] = self.stages  # for the header Server-Timing
        table = _found(access.table, vector_table_id)
        try:
            found = state.searcher.search(table, question, refresh=refresh, stages=self.stages)
        except RowError:
            raise ValidationFailed(
                "query: the embedding provider rejects this text.", resolution="Use other words."
            ) from None
        return _rendered(body.query, found)


def _as_parameter(vector_table_id: str) -> str:
    # a text that is not an id, and that the database may not accept as a parameter
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
    except TypeError:  # a numeric key of more than 64 bits
        return json.dumps(answer).encode()
