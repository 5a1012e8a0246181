"""The whole stack, once a session: real PostgreSQL, Qdrant engine, Dagster daemon, webserver, code server, API.

Every test has a database of its own in the same PostgreSQL as the customer's, and a provider of its own on loopback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from sqlalchemy import make_url

from embedd_dagster.catalog import api_keys, environments
from embedd_dagster.catalog.api_keys import Permission
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.stack.control import discard
from embedd_dagster.stack.stack import Stack, StackSettings
from tests.support.e2e import API_KEY, Embedd
from tests.support.openai_server import RunningServer, running_openai_server


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running stack; a test that stops one of its children starts it again."""
    settings = StackSettings(
        extra_env={
            "EMBEDD_RATE_LIMIT_PER_MINUTE": "0",
            "EMBEDD_HEARTBEAT_SECONDS": "1",
            "EMBEDD_STALE_AFTER_SECONDS": "8",
            "EMBEDD_RETIRED_SET_GRACE_SECONDS": "2",
        }
    )
    state_dir: Path = tmp_path_factory.mktemp("stack")
    try:
        with Stack(state_dir, settings=settings) as running:
            yield running
    finally:
        discard(state_dir)


@pytest.fixture(scope="session")
def api(stack: Stack) -> Iterator[httpx.Client]:
    """A client with a full key of the environment `prod`."""
    catalog = Catalog(stack.endpoints.database_url)
    with catalog.transaction() as session:
        organization_id = environments.ensure_defaults(session).org_id
        key = api_keys.create(session, organization_id, None, "e2e", Permission.FULL)
    catalog.close()
    headers = {"Authorization": f"Bearer {key.raw}"}
    with httpx.Client(base_url=stack.endpoints.api, headers=headers, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def provider() -> Iterator[RunningServer]:
    """A loopback server that speaks OpenAI's embeddings protocol; its behaviour can be changed while it runs."""
    with running_openai_server(api_key=API_KEY) as server:
        yield server


@pytest.fixture
def embedd(stack: Stack, api: httpx.Client, provider: RunningServer) -> Iterator[Embedd]:
    """The product as a user has it: a database of their own, a connection, a provider, and the API."""
    name = f"customer_{uuid4().hex[:8]}"
    address = make_url(stack.endpoints.database_url)
    with psycopg.connect(stack.endpoints.database_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    customer = Embedd(stack, api, provider, address.set(database=name))
    yield customer
    customer.close()


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """Waits until a condition holds: `eventually(lambda: …)`; the value, or an AssertionError with the last one."""

    def wait(condition: Callable[[], Any], *, within: float = 180.0) -> Any:
        deadline = time.monotonic() + within
        while True:
            last = condition()
            if last:
                return last
            assert time.monotonic() < deadline, f"did not become true within {within} s: {last!r}"
            time.sleep(0.2)

    return wait
