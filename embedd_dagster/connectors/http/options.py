"""The options of an embedder behind an HTTP API, from those that every embedder is opened with."""

from __future__ import annotations

from typing import Any

from embedd_dagster.connectors.spec import EmbedderOptions


def http_options(options: EmbedderOptions) -> dict[str, Any]:
    """What `HttpEmbedder` takes."""
    from embedd_dagster.connectors.http.transport import ANSWER_TO_ONE_TEXT, LARGEST_ANSWER

    return {
        "api_key": options.credentials.get("api_key"),
        "base_url": options.credentials.get("base_url"),
        "concurrency": options.limits.get("concurrency"),
        "timeout_seconds": options.timeout_seconds,
        "max_input_tokens": options.limits.get("max_input_tokens"),
        "deny_private_networks": options.deny_private_networks,
        "largest_answer": ANSWER_TO_ONE_TEXT if options.one_text_at_a_time else LARGEST_ANSWER,
    }
