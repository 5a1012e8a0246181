"""Log lines: what they look like, and a log that cannot be written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.tenants import Tenant, unique


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_log_line_that_cannot_be_written_does_not_fail_a_committed_request(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = unique("full-disk")
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        patch.setattr(sys, "stdout", full)
        created = tenant.client.post(
            "/v1/environments", json={"name": name}, headers={"Authorization": f"Bearer {tenant.key}"}
        )
        assert created.status_code == 201, created.text
        full.close = lambda: None  # type: ignore[method-assign]
    listed = tenant.client.get("/v1/environments", headers={"Authorization": f"Bearer {tenant.key}"}).json()
    assert name in [one["name"] for one in listed["data"]]


def test_lines_are_json_also_if_the_dagster_code_was_loaded_before() -> None:
    script = """
from api import logs
from embedd_dagster.logs import lose_unwritable_lines
import structlog
lose_unwritable_lines()
logs.configure()
structlog.get_logger().info("hello", number=1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stderr)["event"] == "hello"
    assert done.stdout == ""
