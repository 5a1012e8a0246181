"""The known embedding models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter

from embedd_dagster.connectors import registry
from embedd_dagster.core.models import EmbeddingModel

from ..auth import Reader
from ..error_codes import error_responses
from ..pagination import text_filter, whole_list
from ..schemas.embedding_providers import EmbeddingModelAnswer, EmbeddingModelList
from ..strict_json import StrictRoute

router = APIRouter(prefix="/embedding-models", tags=["Embedding providers"], route_class=StrictRoute)


def _shown(provider: str, model: EmbeddingModel) -> EmbeddingModelAnswer:
    return EmbeddingModelAnswer(
        provider=provider,
        model=model.name,
        dimensions=model.dimensions,
        accepted_dimensions=model.accepted_dimensions,
        min_dimensions=model.min_dimensions,
        other_dimensions=list(model.other_dimensions),
        max_tokens=model.max_tokens,
        price_per_million_tokens=model.price_per_million_tokens,
    )


@router.get("", responses=error_responses())
def list_embedding_models(
    caller: Reader,  # noqa: ARG001 - the operation needs a key
    name: Annotated[str | None, text_filter("Only the models with exactly this name", max_length=200)] = None,
) -> EmbeddingModelList:
    """List the known embedding models, all in one page."""
    found = [_shown(*known) for known in registry.embedding_models() if name in (None, known[1].name)]
    return whole_list(EmbeddingModelList, found)
