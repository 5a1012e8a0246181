"""Queries."""

from __future__ import annotations

from fastapi import APIRouter

from ..auth import Reader
from ..error_codes import error_responses
from ..query_route import QueryRoute
from ..schemas.base import VectorTableId
from ..schemas.queries import QueryAnswer, QueryBody

router = APIRouter(prefix="/vector-tables/{vector_table_id}", tags=["Query"], route_class=QueryRoute)


@router.post(
    "/query",
    responses=error_responses(
        "vector_table_not_found",
        "vector_table_not_ready",
        "embedding_failed",
        "vector_store_unavailable",
        "too_many_queries",
    ),
)
def query_vector_table(vector_table_id: VectorTableId, body: QueryBody, caller: Reader) -> QueryAnswer:
    """Query a vector table: the rows nearest to a question by cosine similarity, highest first.

    The answer comes from the live vectors and their model, also while a backfill builds new ones. A `read_only` key may query.
    The header `Server-Timing` has the time of each stage in milliseconds: `catalog`, `embed`, `search`, and `total`.
    """
    raise NotImplementedError("QueryRoute answers this operation")
