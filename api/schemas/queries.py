"""Queries."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from ..schemas.base import Answer, Body

MAX_QUERY_LENGTH = 8000


def _not_blank(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("blank", "a text that is not blank is expected")
    return value


class QueryBody(Body):
    """A question to a vector table."""

    query: Annotated[str, StringConstraints(min_length=1, max_length=MAX_QUERY_LENGTH), AfterValidator(_not_blank)] = (
        Field(
            description="What to search for, as text",
            examples=["waterproof hiking boots"],
            json_schema_extra={"pattern": r"^[^\u0000]*[^\s\u0000][^\u0000]*$"},
        )
    )
    limit: int = Field(default=10, ge=1, le=100, description="Largest number of results")
    min_similarity_score: float | None = Field(default=None, ge=0, le=1, description="Smallest cosine similarity")
    filters: dict[str, Any] | None = Field(
        default=None,
        description="Conditions on metadata columns: `eq neq gt gte lt lte in nin exists`; a plain value means `eq`. All "
        "conditions must match; `$or` takes a list of filter objects. null matches only `exists: false`, `neq` and `nin`",
        examples=[{"category": {"eq": "boots"}, "price": {"gte": 10, "lte": 50}, "$or": [{"in_stock": True}]}],
    )


class QueryResult(Answer):
    """A row that was found."""

    id: int | float | str = Field(description="The primary key, with its type in the source", examples=[42])
    similarity_score: float = Field(description="Cosine similarity", examples=[0.83])
    metadata: dict[str, Any] = Field(description="The metadata columns", examples=[{"category": "boots"}])
    embedded_text: str = Field(description="The text that was embedded for the row")


class QueryAnswer(Answer):
    """The nearest rows, highest similarity first."""

    results: list[QueryResult]
    query: str
    model: str = Field(description="The model of the live vectors, which also embedded the question")
    total_results: int = Field(description="Number of results in this answer")
