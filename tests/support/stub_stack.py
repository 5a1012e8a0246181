"""A stack with real PostgreSQL and Dagster and stubs for the rest: `python -m tests.support.stub_stack STATE_DIR` is its `up`."""

import sys
from pathlib import Path

from embedd_dagster.stack.stack import Stack, StackSettings

_SERVICE = [sys.executable, str(Path(__file__).with_name("stub_service.py")), "{port}"]


def stub_settings(**others):
    defaults = {
        "code_location_module": "tests.support.stub_code_location",
        "replace": {"api": _SERVICE, "qdrant": _SERVICE},
        "migrate": lambda database_url: None,
    }
    return StackSettings(**{**defaults, **others})


if __name__ == "__main__":
    Stack(Path(sys.argv[1]), settings=stub_settings()).up(on_ready=lambda endpoints: print(endpoints.api, flush=True))
