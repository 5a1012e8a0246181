"""Queries."""

from __future__ import annotations

import json
from typing import Any

import orjson
from fastapi import APIRouter, Response

from api.auth import Reader
from api.errors import answers
from api.schemas.base import VectorTableId
from api.schemas.queries import QueryAnswer, QueryBody
from api.strict_json import StrictRoute
from embedd_dagster.core.keys import render_key
from embedd_dagster.errors import RowError, ValidationFailed

router = APIRouter(prefix="/vector-tables/{vector_table_id}", tags=["Query"], route_class=StrictRoute)


@router.post(
    "/query",
    response_model=QueryAnswer,
    responses=answers(
        "vector_table_not_found", "vector_table_not_ready", "embedding_failed", "vector_store_unavailable"
    ),
)
def query_vector_table(vector_table_id: VectorTableId, body: QueryBody, caller: Reader) -> Response:
    """Ask a vector table: the nearest rows to a question by cosine similarity, highest first.

    Answers from the live vectors, with their model, also while others are being built. A `read_only` key may query.
    """
    try:
        found = caller.state.searcher.search(
            caller.environment.id,
            vector_table_id,
            query=body.query,
            limit=body.limit,
            min_similarity_score=body.min_similarity_score,
            filters=body.filters,
        )
    except RowError:
        raise ValidationFailed(
            "query: the embedding provider refuses this text.", resolution="Ask in other words."
        ) from None
    results = [
        {
            "id": render_key(hit.key),
            "similarity_score": hit.similarity_score,
            "metadata": hit.metadata,
            "embedded_text": hit.embedded_text,
        }
        for hit in found.hits
    ]
    answer = {"results": results, "query": body.query, "model": found.model, "total_results": len(results)}
    return Response(_dumped(answer), media_type="application/json")


def _dumped(answer: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(answer)
    except TypeError:  # a numeric key beyond 64 bits
        return json.dumps(answer).encode()
