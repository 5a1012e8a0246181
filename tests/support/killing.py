"""Starts a program that kills itself at a point of its own choice, and sees to it that it did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from embedd_dagster.settings import Settings

ROOT = Path(__file__).parents[2]


def environment_of(settings: Settings) -> dict[str, str]:
    """The variables by which another process reads these settings."""
    return {
        "EMBEDD_DATABASE_URL": settings.database_url.get_secret_value(),
        "EMBEDD_ENCRYPTION_KEYS": settings.encryption_keys[0].get_secret_value(),
        "EMBEDD_QDRANT_URL": settings.qdrant_url,
    }


def kill_at(settings: Settings, victim: Path, *arguments: str) -> None:
    """Runs a victim by these settings, and asserts that it killed itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment_of(settings)}
    killed = subprocess.run(
        [sys.executable, str(victim), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
