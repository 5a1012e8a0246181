"""The vector of one search question, ready for a store."""

from __future__ import annotations

from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.text_cutting import cut_at_unknown_tokens
from embedd_dagster.core.unit_length import to_unit_length
from embedd_dagster.errors import TextRejected
from embedd_dagster.protocols.embedder import Embedder


def embed_question(embedder: Embedder, text: str) -> Vectors:
    """The vector of a question, of length 1. A question that the provider calls too long is cut once at the stated limit.

    Raises as `Embedder` says, and TextRejected for a vector that finds nothing in any store.
    """
    try:
        vector = embedder.embed_query(text)
    except TextRejected as error:
        stated = error.details.get("max_input_tokens")
        if stated is None:
            raise
        vector = embedder.embed_query(cut_at_unknown_tokens(text, stated).text)
    unit, usable = to_unit_length(vector.reshape(1, -1))
    if usable is not None:
        raise TextRejected(
            "The provider gives this text a vector without a direction: only zeros, or numbers that are not finite.",
            resolution="Use other words. If it happens for every text, check the model behind the embedding provider.",
        )
    found: Vectors = unit[0]
    return found
