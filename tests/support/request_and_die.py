"""Sends one request to the API in a process of its own and kills that (SIGKILL) at a named point of an idempotent creation.

Called with the settings in the environment: `request_and_die.py POINT KEY IDEMPOTENCY_KEY NAME`; it creates an API key.
"""

from __future__ import annotations

import sys
from typing import Any

from fastapi.testclient import TestClient

from api.app import create_app
from api.idempotency import IdempotentRequest
from embedd_dagster.catalog import api_keys, idempotency
from tests.support.run_and_die import die_at

POINTS: dict[str, tuple[Any, str]] = {
    "after:claim": (idempotency, "claim"),  # before it is committed
    "before:create": (api_keys, "create"),
    "after:create": (api_keys, "create"),
    "after:keep": (idempotency, "keep"),  # before both are committed
    "before:exit": (IdempotentRequest, "__exit__"),  # after it
}


def main() -> None:
    point, key, idempotency_key, name = sys.argv[1:]
    die_at(*POINTS[point], point.partition(":")[0], 1)
    with TestClient(create_app()) as client:
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": idempotency_key}
        client.post("/v1/api-keys", json={"name": name}, headers=headers)


if __name__ == "__main__":
    main()
